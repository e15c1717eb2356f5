"""The plan: what it reckons without data is what real updates take."""

import functools
import io
import sys

import pytest
from conftest import randn
from test_lib_parallel import launch

import data
import ladd
from lib.files import save
from lib.loop import Watch
from lib.run import Run
from lib.streams import RULE
from mmdit import MMDiT
from tests.peak import peak_bytes
from tools.plan import main, meta_networks, plan
from tools.train import given_settings


@functools.cache
def plan_of(words, gpus=1):
    return plan(given_settings(words.split())[0], gpus)


def forward_of(p):
    """FLOPs of one forward of all images."""
    way = p["ways"][False]
    return way["flops"] / way["forwards"]


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


def measured(words, out):
    """Two real updates of `distil` -> the most bytes that PyTorch's allocator held at a time."""
    words = f"{words} --iterations 2 --heads-warmup 0 --synthetic 64 --device cpu --out {out}"
    s, _ = given_settings(words.split())
    dataset = data.load("shapes", s.sizes)
    text = data.text_features(dataset, s.text_dim, s.text_length)
    run = Run(s, dataset, text, Watch(0, "test"))
    run.save("teacher", run.make(MMDiT, **s.model()), 0)
    samples = dict(x0=randn(64, 3, 16, 16).half(), captions=dataset.captions[:64], seed=2)
    save(samples | dict(index=list(range(64)), noise=RULE), out / "synthetic" / "00000.pt")
    return s, peak_bytes(lambda: ladd.distil(run))


@pytest.mark.parametrize("words", ["", "--taps 0,1,2,3 --batch 16", "--lora 8"])
def test_the_plan_of_memory_agrees_with_real_updates(words, tmp_path):
    """nano in float32: weights, gradients, optimiser and what is kept for backward, within 10 %."""
    s, real = measured(f"--precision fp32 {words}", tmp_path)
    assert plan(s)["ways"][False]["total"] == pytest.approx(real, rel=0.1)


def test_the_plan_with_checkpointing_is_not_below_real_updates(tmp_path):
    """It has the gradients all the time, as accumulation does: up to an eighth too much here."""
    s, real = measured("--precision fp32 --checkpointing", tmp_path)
    p = plan(s)
    assert real <= p["ways"][True]["total"] < 1.13 * real
    assert p["ways"][True]["activations"] < p["ways"][False]["activations"] / 3


def test_the_plan_counts_the_state_of_every_weight():
    """float32: student, average, teacher, 1 + 1 + 1 copies; gradients 1; AdamW 2 of the trained."""
    p = plan_of("--precision fp32 --width 32 --depth 2 --taps 0 --batch 2")
    P, K, share = p["parameters"]["student"], p["parameters"]["heads"], p["share"]
    assert share["weights"] == 4 * (3 * P + K) and share["gradients"] == 4 * (P + K)
    assert share["optimiser"] == pytest.approx(8 * (P + K), rel=0.01)  # and its step counters
    assert share["tables"] == 3 * 4 * 32 * 32**2


def test_the_plan_with_adapters_counts_the_base_once():
    """bf16: 2 bytes of the teacher's weights for all; 20 of an adapter's, and of the heads' 16."""
    words = f"{SHORT} --batch 1 --precision bf16 --lora 64"
    p, whole = plan_of(words), plan_of(words.replace("64", "0"))
    A, K, share = p["parameters"]["student"], p["parameters"]["heads"], p["share"]
    T = whole["parameters"]["student"]
    assert p["parameters"]["teacher"] == whole["parameters"]["teacher"] == T and A < T / 20
    assert sum(share.values()) - share["tables"] == 2 * T + 20 * A + 16 * K
    assert share["tables"] == whole["share"]["tables"] / 5
    saved = whole["ways"][False]["forwards"] - p["ways"][False]["forwards"]
    assert 0.8 < saved < 1  # the gradients of W; those of A and B, of rank 64, are there


# Runs of nano by one process of two, which keeps the most bytes that it held in `distil`.
MEASURE = """
import json, os, sys
import ladd
from tests.peak import peak_bytes
from tools import report

report.report = lambda run: None
report.show = lambda *arguments: None

def measured(run):
    held = peak_bytes(lambda: ladd.distil(run))
    (run.out / f"held-{os.environ['RANK']}").write_text(str(held))

def work(commands, ports):
    for words, os.environ["MASTER_PORT"] in zip(commands, ports):
        assert ladd.main(words.split(), distil=measured) == 0

commands, *ports = json.loads(sys.argv[1])
"""


DIVIDED = "--iterations 2 --heads-warmup 0 --synthetic 64 --device cpu --precision fp32 --shard"
DIVIDED += " --muon-lr 0 --teacher-iterations 1 --teacher-batch 2 --synthetic-steps 1"
DIVIDED += " --sample-every 1000 --lora "


def make_divided(root):
    """Runs of nano, divided in two: the student's own weights, "0", and an adapter, "8"."""
    commands = [f"{DIVIDED}{lora} --out {root / lora}" for lora in "08"]
    status, errors = launch(2, commands, root / "errors", MEASURE)
    assert status == [0, 0], errors


@pytest.fixture(scope="module")
def divided(beside):
    return beside(make_divided)


@pytest.mark.parametrize("lora", ["0", "8"])
def test_the_plan_of_memory_agrees_with_two_processes(divided, lora):
    """What either process holds at the most, within 10 %."""
    planned = plan_of(DIVIDED + lora, gpus=2)["ways"][False]["total"]
    for process in range(2):
        held = int((divided / lora / f"held-{process}").read_text())
        assert planned == pytest.approx(held, rel=0.1)


# ---------------------------------------------------------------------------------------------
# Work, and how it is divided
# ---------------------------------------------------------------------------------------------

# Two blocks of sd3-8b at its full width and length: what is checked is the same for 38.
SHORT = "--preset sd3-8b --depth 2"


def test_an_update_costs_six_forwards_and_eight_with_checkpointing():
    """Student 1 + 2, teacher on fakes 1 + 1, on reals 1; the way back of attention costs 2.5 times
    its forward, for the teacher too, so that with n = 4,250 tokens it is somewhat more."""
    p = plan_of(SHORT)
    assert 5.9 < p["ways"][False]["forwards"] < 6.7
    assert 7.8 < p["ways"][True]["forwards"] < 8.8
    D, tokens = 2432, 128 * 128 // 4
    linear = 2 * (12 * D * D * tokens * 2 + (12 + 3) * D * D * 154)  # two blocks; last: pre-only
    attention = 2 * 4 * (tokens + 154) ** 2 * D
    assert forward_of(p) / p["images"] == pytest.approx(linear + attention, rel=0.02)


def test_more_gpus_divide_state_and_arithmetic():
    """All but the heads, which every GPU holds whole."""
    one, eight = (plan_of(f"{SHORT} --batch 8", gpus=n) for n in (1, 8))
    for name, bytes_each in dict(weights=4, gradients=4, optimiser=8).items():
        whole = bytes_each * one["parameters"]["heads"]
        assert eight["share"][name] - whole == pytest.approx((one["share"][name] - whole) / 8)
    assert eight["share"]["tables"] == one["share"]["tables"]  # buffers are not divided
    assert (one["images"], eight["images"]) == (8, 1)
    assert one["ways"][False]["flops"] == pytest.approx(eight["ways"][False]["flops"], rel=1e-6)
    assert one["ways"][False]["activations"] == pytest.approx(
        8 * eight["ways"][False]["activations"], rel=0.01
    )
    assert one["traffic"] == 0 and one["share"]["gathered"] == 0
    # bf16 gathered 2 + 3 times, float32 gradients once, 7 of 8 parts from elsewhere
    assert eight["traffic"] == pytest.approx(one["parameters"]["student"] * 14 * 7 / 8)


def test_a_plan_with_r1_is_the_plan_without_it():
    """A gradient of a gradient of the small heads: left out of the count, not a traceback."""
    assert plan_of("--r1 1") == plan_of("")


def test_a_plan_of_parts_has_the_memory_of_one_part_and_nine_forwards():
    """A batch in two parts: what one of half of it keeps; fakes and reals pass for each player."""
    whole, half, parts = (
        plan_of(f"{SHORT} --batch 4 {more}") for more in ("", "--batch 2", "--accumulate 2")
    )
    assert parts["ways"][False]["activations"] == half["ways"][False]["activations"]
    for again in (False, True):
        more = parts["ways"][again]["forwards"] - whole["ways"][again]["forwards"]
        assert more == pytest.approx(3, abs=0.05)


def test_a_plan_divides_by_the_processes_that_share_a_network():
    """8 GPUs in 2 replicas: a quarter each; without --shard all of it, and gradients to swap."""
    whole, hybrid, copies = (
        plan_of(f"{SHORT} --batch 8 {more}", gpus=8) for more in ("", "--replicas 2", "--no-shard")
    )
    for name, bytes_each in dict(weights=4, gradients=4, optimiser=8).items():
        heads = bytes_each * whole["parameters"]["heads"]
        divided = whole["share"][name] - heads
        assert hybrid["share"][name] - heads == pytest.approx(2 * divided)
        assert copies["share"][name] - heads == pytest.approx(8 * divided)
    assert copies["share"]["gathered"] == 0
    assert copies["traffic"] == pytest.approx(8 * copies["parameters"]["student"] * 7 / 8)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = f"{SHORT} --dry-run --gpus 4 --batch 4 --data nowhere"
    assert ladd.main(words.split()) == 0
    text = capsys.readouterr().out
    student = meta_networks(given_settings(SHORT.split())[0])[0]
    P = sum(p.numel() for p in student.parameters())
    assert f"{P:,}" in text and "80 GB" in text and "141 GB" in text
    assert not list(tmp_path.iterdir())
    assert main(words.replace("--dry-run", "").split()) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    "words",
    ["--gpus 0", "--gpus 1.5", "--tflops 0", "--tflops nan", "--tflops inf", "--utilisation -1"],
)
def test_what_is_no_machine_is_refused_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert words.split()[0] in line and line.count("\n") == 1


def test_settings_that_ladd_refuses_are_refused_in_one_line(capsys):
    assert main(["--taps", "7"]) == 2
    line = capsys.readouterr().err
    assert "--taps 7" in line and line.count("\n") == 1


@pytest.mark.parametrize("words", ["--batch 32 --gpus 3", "--replicas 7 --gpus 2 --shard"])
def test_what_so_many_gpus_would_refuse_is_not_planned_for_them(words, capsys):
    assert main(words.split()) == 2
    line = capsys.readouterr().err
    assert words.partition(" --gpus")[0] in line and line.count("\n") == 1


def test_a_reader_who_has_gone_is_one_line(monkeypatch, capsys):
    """As in `ladd.py --dry-run | head -1`."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError("nobody reads")

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main([]) == 1
    assert capsys.readouterr().err == "ladd.py: nobody reads\n"
