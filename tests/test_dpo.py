"""methods/dpo.py, its pairs and lib/pairs.py: what preferences do, and how pairs are given."""

import errno
import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    FEW,
    MAKING,
    cut_at,
    folder,
    lines,
    plain,
    randn,
    same,
    train_whole,
    updates,
    weights,
)
from test_lib_parallel import WORK, launch, worst

import data
import ladd
import sample
from lib.errors import DataError, UsageError
from lib.log import Log
from lib.optim import make_optimizers
from lib.pairs import best_and_worst, read_list, read_pairs, tensors_of, write_pairs
from lib.run import Run
from lib.scores import Judge
from methods import dpo
from methods.dpo_pairs import rewards
from tools import sweep
from tools.train import given_settings

HOW = dict(distil=dpo.distil, method="dpo", kind=dpo.Settings)
BOTH = "--judge-steps 5 --evaluation 8 --save-every 2 --t-hat-std 1"  # at higher t̂ logits tie
OWN = f"{BOTH} --tie 0 --tuning-iterations 5 --lora 3"
BY_DPO = WORK.replace("words.split())", "words.split(), dpo.distil, 'dpo', dpo.Settings)")
BY_DPO = (
    BY_DPO.replace("(0, 75)", "(0, 75, 143)")
    + """
import signal
from methods import dpo, dpo_pairs

def make_pairs(run, make=dpo_pairs.make_pairs):
    if run.out.name == "cut":
        os.kill(os.getpid(), signal.SIGTERM)
    return make(run)

dpo_pairs.make_pairs = make_pairs
"""
)
FILES = ("adapter.pt", "student.pt", "tuned/teacher.pt", "tuned/heads.pt", "tuned/student.pt")


def run_of(words):
    s, _ = given_settings([*FEW.split(), *OWN.split(), *map(str, words)], kind=dpo.Settings)
    dataset = data.load(s.data, s.sizes, seed=s.seed)
    return Run(s, dataset, data.text_features(dataset, s.text_dim, s.text_length), watch=None)


def a_batch(run, n=4):
    """Winner, loser, text, t, noise."""
    images = [randn(n, 3, 12, 12, seed=seed).float() for seed in range(3)]
    return *images[:2], run.text_encoder([f"a {i}" for i in range(n)]), torch.rand(n), images[2]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, cache, whole):
    """A run of the whole method that nobody cut."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    words = [*FEW.split(), *OWN.split(), "--from", whole, "--out", out, "--data-dir", cache]
    words += ["--adapter-scale", "0.5", "--stage", "distillation"]
    assert ladd.main([*map(str, words)], **HOW) == 0
    return out


# ---------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------


def test_before_its_first_update_the_adapter_prefers_nothing(whole):
    """Δ is 0 to the bit, and the loss log 2."""
    run = run_of(["--out", whole])
    teacher = ladd.load(run, "teacher", frozen=True)
    delta = dpo.difference(run.adapted(teacher), teacher, *a_batch(run))
    assert torch.equal(delta, torch.zeros(4))
    assert dpo.preference_loss(delta, 230.0).item() == pytest.approx(math.log(2), abs=1e-6)


def test_a_step_goes_from_the_loser_to_the_winner():
    """A network of one velocity v for all: dL/dv = ½·β·(w - l)/n at Δ = 0, so that against it
    x̂_0 = x_t - t·v goes from l to w. At an error of the loser that has grown, the pair is right."""
    winner, loser, noise = (randn(1, 3, 4, 4, seed=seed) for seed in range(3))
    t, text = torch.tensor([0.5], dtype=torch.float64), (torch.zeros(1, 1, 1), torch.zeros(1, 1))
    v = randn(1, 3, 4, 4, seed=3).requires_grad_()
    network = lambda x, t, *text: (v.expand_as(x), [])  # noqa: E731
    before = v.detach().clone()
    reference = lambda x, t, *text: (before.expand_as(x), [])  # noqa: E731
    batch = winner, loser, text, t, noise
    loss = dpo.preference_loss(dpo.difference(network, reference, *batch), 20.0)
    loss.backward()
    torch.testing.assert_close(v.grad, 0.5 * 20 * (winner - loser) / 48, check_dtype=False)
    with torch.no_grad():
        v -= 0.1 * v.grad
    delta = dpo.difference(network, reference, *batch)
    assert delta < 0 and dpo.preference_loss(delta, 20.0) < loss


def test_winner_and_loser_share_level_and_noise():
    seen = []

    def network(x, t, *text):
        seen.append((x, t))
        return torch.zeros_like(x), []

    winner, loser, noise = (randn(2, 3, 4, 4, seed=seed).float() for seed in range(3))
    t = torch.tensor([0.25, 0.75])
    dpo.errors(network, winner, loser, (torch.zeros(2, 1, 1),), t, noise)
    (x, levels), part = seen[0], t.view(-1, 1, 1, 1)
    assert torch.equal(levels, torch.cat([t, t]))
    for own, x0 in zip(x.chunk(2), (winner, loser), strict=True):
        torch.testing.assert_close(own - (1 - part) * x0, part * noise)


def test_with_the_adapter_off_a_tuned_network_is_the_teacher_bit_for_bit(whole):
    """The reference of the loss: training the adapter leaves the weights, which both share."""
    run = run_of(["--out", whole])
    teacher = ladd.load(run, "teacher", frozen=True)
    batch, given = a_batch(run), weights(whole / "teacher.pt")
    network, before = run.adapted(teacher), dpo.errors(teacher, *batch)
    (optimizer,) = make_optimizers(network, 0.1, 0.9)
    for _ in range(3):
        dpo.preference_loss(dpo.difference(network, teacher, *batch), 230.0).backward()
        optimizer.step()
    assert dpo.difference(network, teacher, *batch).abs().max() > 0
    assert all(map(torch.equal, before, dpo.errors(teacher, *batch)))
    for name, w in teacher.state_dict().items():
        assert torch.equal(w, given[name])
        assert w.data_ptr() == network.state_dict()[name].data_ptr()


# ---------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------


def test_the_best_and_the_worst_of_a_caption_are_a_pair_and_ties_are_skipped():
    images = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 3, 2, 2)
    reward = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 0.5, 0.0, -0.5])
    for tie, wanted in ((0.0, [(1, 0), (6, 8)]), (1.0, [(1, 0)]), (2.0, [])):
        found = list(best_and_worst(images, reward, 3, tie))
        assert [(int(both[0, 0, 0]), int(both[3, 0, 0])) for both, _ in found] == wanted
        assert [winner for _, winner in found] == [winner for winner, _ in wanted]


def test_a_reward_is_the_log_probability_of_all_that_a_caption_says():
    judge = Judge([2, 3], 8, (8, 8))
    images, labels = randn(5, 3, 8, 8).mul(60).byte(), torch.tensor([[0, 2]] * 5)
    with torch.no_grad():
        _, (first, second) = judge(data.to_float(images))
    wanted = (first.softmax(1)[:, 0] * second.softmax(1)[:, 2]).log()
    torch.testing.assert_close(rewards(judge, images, labels, batch=2), wanted)


def test_pairs_are_read_as_they_were_written(tmp_path):
    """Of several sizes; a batch has those of one."""
    made = [(randn(6, 4, w, seed=w).mul(60).byte(), f"a {i % 2}") for i, w in enumerate((4, 8, 4))]
    write_pairs(made, tmp_path)
    found = read_pairs(tmp_path, [(4, 4), (4, 8)])
    assert [text for _, text in found] == [text for _, text in made]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(found, made, strict=True))
    parts, captions = tensors_of(found)
    assert [tuple(images.shape) for images, _ in parts] == [(2, 6, 4, 4), (1, 6, 4, 8)]
    assert [[captions[i] for i in rows] for _, rows in parts] == [["a 0", "a 0"], ["a 1"]]


def pair(winner="a.png", loser="b.png", caption="a cat"):
    return dict(winner=winner, loser=loser, caption=caption)


def test_a_list_of_pairs_may_spell_a_files_accent_otherwise(tmp_path):
    files = {"e\u0301.png": plain(1), "b.png": plain(2)}
    files["pairs.jsonl"] = "\n".join(2 * [json.dumps(pair("\u00e9.png"))]).encode()
    assert read_list(folder(tmp_path, files))[1] == 2 * [("e\u0301.png", "b.png", "a cat")]


GOOD = {"a.png": plain(1), "b.png": plain(2), "long.png": plain(3, (8, 2)), "bad.png": b"none"}
WRONG = {  # the lines of pairs.jsonl, after a good one -> what is said
    "a missing side": (pair(loser="none.png"), "line 2 names none.png, which is not there"),
    "a folder as a side": (pair(winner="."), "line 2 names"),
    "no winner": (dict(loser="b.png", caption="a cat"), 'line 2 is not {"winner"'),
    "no caption": (dict(winner="a.png", loser="b.png"), 'line 2 is not {"winner"'),
    "an empty caption": (pair(caption=" \t"), "line 2 has no caption"),
    "a caption that is no text": (pair(caption=3), "line 2 is not"),
    "a side that is no text": (pair(winner=3), "line 2 is not"),
    "no object": ([1], "line 2 is not"),
    "sizes that differ": (pair(loser="long.png"), "line 2: pictures of 2×3 and 2×8 pixels"),
    "no picture": (pair(loser="bad.png"), "line 2: bad.png can't be read"),
}


def program(words):
    return ladd.main(words, **HOW)


def test_a_folder_that_can_not_be_listed_is_named_with_the_cause(tmp_path, monkeypatch):
    def denied(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(DataError, match=r"no pairs.jsonl in it.*Permission denied"):
        read_list(tmp_path)


@pytest.mark.parametrize("case", [*WRONG, "no folder", "no list", "an empty list", "no text"])
def test_pairs_that_can_not_be_used_are_refused_in_one_line(case, refused, tmp_path):
    """Before anything is made."""
    row, told = WRONG.get(case, (pair(), ""))
    files = dict(GOOD)
    if case != "no list":
        lines = "\n".join(json.dumps(each) for each in (pair(), row))
        files["pairs.jsonl"] = lines.encode()
    if case == "an empty list":
        files["pairs.jsonl"], told = b"\n\n", "has 0 pairs"
    if case == "no text":
        files["pairs.jsonl"], told = b"\xff\xfe", "pairs.jsonl is not UTF-8 text"
    given = folder(tmp_path / "mine", files)
    if case == "no folder":
        given, told = tmp_path / "none", "neither a folder nor a file"
    told = "no pairs.jsonl in it" if case == "no list" else told
    words = ["--smoke", "--pairs", given, "--out", tmp_path / "run", *CPU]
    named = SimpleNamespace(main=program, __file__="-m methods.dpo")
    refused(named, words, 2, given, told)


# ---------------------------------------------------------------------------------------------
# The whole method
# ---------------------------------------------------------------------------------------------


def test_the_run_leaves_teacher_adapter_tuned_teacher_and_student(tuned, whole):
    """teacher.pt is the given one; tuned/ has LADD of the tuned teacher; the student of the run is
    that of tuned/ with the adapter at half its scale, and sample.py takes the adapter."""
    assert same(tuned / "teacher.pt", whole / "teacher.pt")
    assert not same(tuned / "tuned" / "teacher.pt", whole / "teacher.pt")
    adapter = dict(adapter=tuned / "adapter.pt")
    pairs = (
        (sample.read_network(whole, teacher=True, **adapter), tuned / "tuned" / "teacher.pt"),
        (sample.read_network(tuned / "tuned", **adapter, scale=0.5), tuned / "student.pt"),
    )
    for wanted, path in pairs:
        found = weights(path)
        assert all(torch.equal(w, found[name]) for name, w in wanted["weights"].items())
    assert not same(tuned / "tuned" / "student.pt", tuned / "student.pt")
    words = ["--prompt", "a", "--out", tuned / "a.png", "--adapter", tuned / "adapter.pt", *CPU]
    assert sample.main([*map(str, [whole, *words])]) == 0
    (shares,) = (row["ranked_right"] for row in lines(tuned) if "ranked_right" in row)
    assert len(shares) == 3 and all(0 <= share <= 1 for share in shares.values())
    assert not list(tuned.rglob("*state*"))


def test_the_next_command_keeps_the_shares_ranked_right(tuned, tmp_path):
    """It forgets what a cut left in the log."""
    shutil.copy(tuned / "log.jsonl", tmp_path)
    Log(tmp_path).forget()
    assert lines(tmp_path) == lines(tuned)


def test_the_tuned_folder_is_a_run_that_ladds_own_program_reports_on(tuned, cache):
    """With the flags that both know: all but the report is done there."""
    inner = tuned / "tuned"
    before = [inner / f"{kind}.pt" for kind in ("teacher", "student")]
    before = {path: path.read_bytes() for path in before}
    words = [*FEW.split(), *BOTH.split(), "--out", str(inner), "--data-dir", str(cache)]
    assert ladd.main(words) == 0
    assert (inner / "report.md").exists()
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_cut_run_goes_on_bit_for_bit(train_and_show, monkeypatch, whole, tuned):
    """In the adapter's updates, and in LADD's."""
    flags = f"--from {whole} {OWN} --adapter-scale 0.5"
    for stage in ("tuning", "distillation"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            cut_at(patch, stage, 4)
            train_and_show("cut", flags, MAKING[2:], **HOW)
    cut = train_and_show("cut", flags, MAKING[2:], **HOW)
    for name in FILES:
        assert same(cut / name, tuned / name)
    for part in (".", "tuned"):
        assert updates(cut / part) == updates(tuned / part)
    assert not list(cut.rglob("*state*"))


def test_a_users_pairs_train_without_a_judge_and_are_kept(
    train, monkeypatch, whole, tmp_path, capsys
):
    """A run goes on with the pairs that it has begun with, wherever the folder then is."""
    monkeypatch.setattr(sample, "judge_of", None)
    captions = [f"a {i % 3}" + 11 * " far" for i in range(12)]
    rows = "\n".join(json.dumps(pair(caption=caption)) for caption in captions)
    mine = folder(tmp_path / "mine", GOOD | {"pairs.jsonl": rows.encode()})
    out = train("out", f"--from {whole} {OWN} --pairs {mine}", MAKING[2:], **HOW)
    kept = read_pairs(out / "pairs", [(12, 12)])
    assert len(kept) == 12 and {text for _, text in kept} == set(captions)
    assert "--pairs: 3 of 3 captions have more than 12 words" in capsys.readouterr().err
    winner, loser = kept[0][0].chunk(2)
    assert np.unique(winner[0]) == [1] and np.unique(loser[0]) == [2]
    (out / "student.pt").unlink()
    shutil.rmtree(mine)
    train("out", f"--from {whole} {OWN} --pairs {mine}", MAKING[2:], **HOW)
    assert (out / "student.pt").exists()


def make_by_two(root):
    """Run folders of two processes: "two", and "cut", which they left while the first of them made
    the pairs, in the adapter's updates and in LADD's."""
    whole = train_whole(root / "whole", root / "data")
    words = f"{FEW} {OWN} --adapter-scale 0.5 --stage distillation --data-dir {root / 'data'}"
    words += f" --from {whole} --teacher {whole / 'teacher.pt'} --out {root}"
    cut = [f"{words}/cut", f"stop 4|{words}/cut", f"stop 3|{words}/cut", f"{words}/cut"]
    status, errors = launch(2, [f"{words}/two", *cut], root / "errors", BY_DPO)
    assert status == [0, 0] and not errors[1], errors
    assert errors[0].count("stopped, and saved what is done") == 3


@pytest.fixture(scope="module")
def by_two(beside):
    return beside(make_by_two)


def test_two_processes_learn_what_one_does(by_two, tuned):
    """From the same pairs. To 1e-5, as LADD's own (tests/test_lib_parallel.py): sums of float32 in
    another order differ by 1e-7 of a gradient, and an update moves a weight by 1e-4 or more."""
    two = by_two / "two"
    assert (two / "pairs/pairs.jsonl").read_bytes() == (tuned / "pairs/pairs.jsonl").read_bytes()
    for name in FILES:
        assert worst(tuned, two, name, "weights") < 1e-5
    for part in (".", "tuned"):
        for a, b in zip(updates(tuned / part), updates(two / part), strict=True):
            for key in {"loss", "grad_norm", "loss_d", "loss_g", "ranked"} & a.keys():
                assert abs(a[key] - b[key]) < 1e-5


def test_the_shares_ranked_right_are_of_all_processes_pairs(by_two, tuned):
    """Of 64; one may be as near to a tie as rounding."""
    one, two = (
        [row["ranked_right"] for row in lines(run) if "ranked_right" in row]
        for run in (tuned, by_two / "two")
    )
    assert len(one) == len(two) == 1 and two[0] == pytest.approx(one[0], abs=1.01 / 64)


def test_two_processes_go_on_bit_for_bit_where_they_were_cut(by_two):
    two, cut = by_two / "two", by_two / "cut"
    assert all(same(two / name, cut / name) for name in FILES)
    for part in (".", "tuned"):
        assert updates(two / part) == updates(cut / part)
    assert not list(cut.rglob("*state*"))


def test_an_adapter_beyond_all_scales_is_refused_at_the_start():
    """As sample.py --adapter-scale does: a student of such weights has no finite sample."""
    with pytest.raises(UsageError, match="--adapter-scale"):
        given_settings(["--adapter-scale", "1e18"], kind=dpo.Settings)


def test_a_smoke_and_a_scale_shorten_the_tuning_and_a_sweep_knows_the_method():
    assert dpo.Settings(smoke=True).scaled().tuning_iterations == 2
    assert dpo.Settings(tuning_iterations=200, steps_scale=0.1).scaled().tuning_iterations == 20
    assert sweep.method_of("dpo") == (dpo.distil, None, dpo.Settings)
