"""tools/benchmark.py: what it times is what it says, and a row is a ratio."""

import copy

import pytest
import torch

import ladd
from tools import benchmark

SMALL = "--width 32 --depth 2 --attention-heads 2 --taps 0,1 --batch 4 --precision fp32"


def test_contestants_take_turns_and_the_first_rounds_do_not_count():
    calls = []
    seconds = benchmark.rounds(dict(a=lambda: calls.append("a"), b=lambda: calls.append("b")), 2)
    assert calls == ["a", "b"] * 5
    assert list(seconds) == ["a", "b"] and all(0 < value < 1 for value in seconds.values())


def test_no_rounds_are_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--rounds", "0"])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_an_iteration_moves_both_players_and_the_average_but_not_the_teacher():
    d = benchmark.Distillation(benchmark.settings("nano", *SMALL.split()), torch.device("cpu"))
    networks = d.networks | dict(teacher=d.teacher)
    before = copy.deepcopy(networks)
    d.iteration()
    moved = {
        name: any(
            not torch.equal(a, b)
            for a, b in zip(network.parameters(), before[name].parameters(), strict=True)
        )
        for name, network in networks.items()
    }
    assert moved == dict(student=True, ema=True, heads=True, teacher=False)
    d.forward()


def test_the_hosts_time_is_that_of_drawing_batches_of_a_few_numbers(monkeypatch):
    """As many images as in an update, all in memory."""
    batches = []
    for name in ("draw_teacher_batch", "draw_batch"):
        draw = getattr(ladd, name)
        monkeypatch.setattr(ladd, name, lambda *given, draw=draw: batches.append(draw(*given)))
    monkeypatch.setattr(benchmark.Joined, "__getitem__", None)  # which reads from files
    seconds = benchmark.drawing("nano", 1)
    assert list(seconds) == ["teacher", "distillation"] and min(seconds.values()) > 0
    shapes = [tuple(batch[0].shape) for batch in batches]
    assert shapes == 4 * [(64, 3, 4, 4), (32, 3, 4, 4)]  # three rounds warm up


def test_diffusers_network_of_the_same_sizes_has_as_many_weights():
    pytest.importorskip("diffusers")
    s = benchmark.settings("nano")
    ours, theirs = benchmark.MMDiT(**s.model()), benchmark.theirs(s)
    counts = [sum(p.numel() for p in network.parameters()) for network in (ours, theirs)]
    assert counts[0] == counts[1]


def test_a_compiled_iteration_compiles_every_block_and_the_heads(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    s = benchmark.settings("nano", *SMALL.split(), "--compile", "yes")
    d = benchmark.Distillation(s, torch.device("cpu"))
    want = [*d.networks["student"].joint_blocks, *d.teacher.joint_blocks, d.networks["heads"]]
    assert compiled == want


def test_on_a_gpu_the_batch_is_the_largest_whose_plan_fits(monkeypatch):
    way = dict(total=30.0, activations=20.0, flops=8.0, forwards=4.0)  # 5 an image, 10 besides
    monkeypatch.setattr(benchmark, "plan", lambda s: dict(ways={False: way}))
    for free, batch in ((100, 4), (28, 3), (17, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 200))
        s, flops, forward, used = benchmark.fitting("nano", 4)
        assert (s.batch, flops, forward, used) == (batch, 2 * batch, batch / 2, 10 + 5 * batch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16, 200))
    with pytest.raises(torch.OutOfMemoryError, match="15 B"):
        benchmark.fitting("nano", 4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), ImportError("no room")])
def test_a_row_that_cant_be_measured_says_why_and_the_next_ones_follow(error):
    def rows():
        yield "a", "1", "–"
        raise error

    assert [*benchmark.tried("b", rows())] == [("a", "1", "–"), ("b", "not measured: no room", "–")]
