"""A batch that is worked through in parts, and the noise levels that a student starts with."""

import pytest
from conftest import FEW, cut_at, run_of, same, updates, weights

import ladd


@pytest.mark.parametrize("flags", ["", "--r1 0.1"])
def test_a_batch_in_parts_gives_the_weights_of_a_whole_one(train, flags):
    """The mean of the parts' gradients is the batch's: teacher, student and heads to 1e-5."""
    flags += " --teacher-batch 8 --iterations 8 --teacher-iterations 8 --muon-lr 0"
    one, parts = train("one", flags), train("parts", f"{flags} --accumulate 4")
    for name in ("teacher.pt", "student.pt", "heads.pt"):
        a, b = weights(one / name), weights(parts / name)
        assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5
    for a, b in zip(updates(one), updates(parts), strict=True):
        for key in a.keys() - {"stage", "step", "skipped", "diversity"}:
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), key


def test_a_run_in_parts_that_was_cut_is_bit_for_bit_the_one_that_was_not(
    launch, train, monkeypatch
):
    flags = "--accumulate 2 --teacher-batch 4 --save-every 3"
    want = train("want", flags)
    for stage in ("teacher", "distillation"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            cut_at(patch, stage, 5)
            launch("cut", f"{FEW} {flags} --stage {stage}")
        assert launch("cut", f"{FEW} {flags} --stage {stage}") == 0
        if stage == "teacher":
            assert launch("cut", f"{FEW} {flags} --stage synthesis") == 0
    cut = want.parent / "cut"
    assert all(same(want / name, cut / name) for name in ("teacher.pt", "student.pt", "heads.pt"))
    assert updates(cut) == updates(want)


@pytest.mark.parametrize(
    "flags",
    ["--level-p 1,0 --level-warmup-p 0,1", "--level-p 0,1 --level-warmup-p 1,0 --level-warmup 1"],
)
def test_the_heads_learn_alone_on_the_levels_that_the_student_starts_with(whole, flags):
    """By level_p, or where there are first updates with other probabilities, by those."""
    run = run_of([*flags.split(), "--levels", "1,0.5", "--heads-warmup", "3", "--out", whole])
    samples = ladd.distillation_samples(run)
    heads_warmup = run.settings.heads_warmup
    drawn = [ladd.draw_batch(run, samples, step, heads_warmup) for step in range(4)]
    assert all((b.t == 1).all() for b in drawn)


def test_a_student_of_one_level_learns(train):
    """level_warmup_p, of four levels, is nothing to it."""
    assert (train("one_level", "--levels 1") / "student.pt").exists()
