"""Scores against closed forms, and the judge that they are taken by."""

import errno
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import randn, seeded, snapshot

import data
import sample
from lib import scores
from lib.errors import CheckpointError, RunError
from lib.files import save
from lib.scores import (
    HeldOut,
    Judge,
    compared,
    frechet_distance,
    held_out,
    judge_accuracy,
    precision_recall,
    score,
    score_table,
)

# ---------------------------------------------------------------------------------------------
# Distances of distributions
# ---------------------------------------------------------------------------------------------


def white(n, d, seed):
    """n points whose mean is exactly 0 and whose covariance is exactly I."""
    x = randn(n, d, seed=seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_frechet_distance_of_independent_coordinates():
    """Σ (μ_a - μ_b)² + Σ (σ_a - σ_b)² where both covariances are diagonal."""
    mean_a, mean_b = randn(5, seed=1), randn(5, seed=2)
    std_a, std_b = randn(5, seed=3).abs(), randn(5, seed=4).abs()
    a = white(40, 5, seed=5) * std_a + mean_a
    b = white(30, 5, seed=6) * std_b + mean_b
    want = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(want.item(), rel=1e-8)


def test_frechet_distance_of_correlated_coordinates():
    """tr (Σ_a Σ_b)^½ is the sum of the roots of the eigenvalues of the product."""
    a = white(40, 4, seed=1) @ randn(4, 4, seed=2)
    b = white(30, 4, seed=3) @ randn(4, 4, seed=4)
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real)
    want = np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum()
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-8)


def test_frechet_distance_is_zero_for_the_same_set_and_symmetric():
    """Also where the covariance is singular: 8 points in 11 dimensions."""
    a, b = randn(8, 11, seed=1), 2 + 3 * randn(9, 11, seed=2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, b) > 1


def test_precision_and_recall_of_identical_sets_are_1():
    x = randn(60, 3)
    assert precision_recall(x, x.clone()) == (1, 1)


def test_precision_and_recall_of_sets_far_apart_are_0():
    assert precision_recall(randn(60, 3), 100 + randn(60, 3, seed=1)) == (0, 0)


def test_dropping_a_mode_costs_recall_and_not_precision():
    """Reals in two places, fakes in one of them: every fake is good, half the reals unreached."""
    here, there = randn(300, 2, seed=1), 50 + randn(300, 2, seed=2)
    precision, recall = precision_recall(torch.cat([here, there]), randn(300, 2, seed=3))
    assert precision > 0.9
    assert 0.4 < recall <= 0.5


def test_adding_a_mode_costs_precision_and_not_recall():
    """The other way round, half of the fakes are nowhere near a real."""
    here, there = randn(300, 2, seed=1), 50 + randn(300, 2, seed=2)
    precision, recall = precision_recall(randn(300, 2, seed=3), torch.cat([here, there]))
    assert 0.4 < precision <= 0.5
    assert recall > 0.9


# ---------------------------------------------------------------------------------------------
# Rows and tables
# ---------------------------------------------------------------------------------------------


class FakeJudge:
    """Answers what it was told to, with features of its own."""

    def __init__(self, answers):
        self.answers = answers

    def read(self, images):
        return randn(len(images), 3, seed=len(images)), self.answers


def test_alignment_is_the_share_of_images_with_every_attribute_right():
    """Of 8 images one has its first attribute wrong, one its second, one both: 5/8 are aligned."""
    labels = torch.arange(16).reshape(8, 2)
    answers = labels.clone()
    answers[2, 0] += 1
    answers[5, 1] += 1
    answers[6] += 1
    images = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    row = score([images], labels, randn(9, 3, seed=8), FakeJudge(answers))
    assert row["alignment"] == 5 / 8


def test_scores_of_the_reference_itself_are_perfect():
    """Fréchet distance 0, precision and recall 1, alignment 1."""
    labels = torch.zeros(8, 1, dtype=torch.int64)
    images = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    row = score([images], labels, randn(8, 3, seed=8), FakeJudge(labels))
    assert row == dict(alignment=1, frechet=pytest.approx(0, abs=1e-6), precision=1, recall=1)


def test_captions_without_attributes_are_scored_all_but_the_alignment():
    """Where no word divides the set there is nothing to be right about, and no table of lies."""
    images = torch.randint(0, 256, (40, 3, 8, 8), generator=seeded(), dtype=torch.uint8)
    labels = torch.zeros(40, 0, dtype=torch.int64)
    judge = Judge([], width=8, size=(8, 8))
    reference, _ = judge.read(images)
    row = score([images], labels, reference, judge)
    assert row["alignment"] is None
    assert row["frechet"] == pytest.approx(0, abs=1e-4)


def noise(side, count, more):
    """Held out: `count` images with captions from 0 on, and `more` others to compare with."""
    draw = torch.randint(0, 256, (count + more, 3, side, side), generator=seeded(side))
    images, caption = draw.to(torch.uint8), torch.arange(count)
    return HeldOut(images[:count], caption, ["x"] * count, (side, side), images[count:])


class Copies:
    """A generator whose samples are the images that it is given."""

    def __init__(self, parts):
        self.parts = parts

    def sample_parts(self, parts, *, seed, stream, progress, steps, cfg):
        assert parts == [(part.captions, part.size) for part in self.parts]
        return [part.images for part in self.parts]


def test_a_table_has_the_real_images_first_and_all_sizes_together():
    """Two sizes; who returns the held-out images scores as they do, and counts its evaluations."""
    parts = [noise(8, 20, 30), noise(12, 10, 12)]
    labels = torch.zeros(20, 0, dtype=torch.int64)
    candidates = [("a", Copies(parts), dict(steps=3, cfg=1.0))]
    candidates += [("b", Copies(parts), dict(steps=3, cfg=2.0))]
    judge = Judge([], width=8, size=(8, 8))
    rows = score_table(parts, labels, judge, candidates, 0, lambda x: x)
    assert [row["name"] for row in rows] == ["real, held out", "a", "b"]
    assert [row.get("evaluations") for row in rows] == [None, 3, 6]
    for row in rows[1:]:
        for key in ("alignment", "frechet", "precision", "recall"):
            assert row[key] == rows[0][key]
    reference = torch.cat([judge.read(part.reference)[0] for part in parts])
    features = torch.cat([judge.read(part.images)[0] for part in parts])
    assert rows[0]["frechet"] == pytest.approx(frechet_distance(reference, features), rel=1e-6)


def test_samples_that_are_not_finite_are_not_scored():
    """As pixels they would be black, and a number would stand in the table."""
    part = noise(8, 20, 30)
    broken = Copies([part])
    broken.sample_parts = lambda *_, **options: [part.images.float() * math.inf]
    rows = [("student, 1 step", broken, dict(steps=1, cfg=1.0))]
    labels, judge = torch.zeros(8, 0, dtype=torch.int64), Judge([], width=8, size=(8, 8))
    with pytest.raises(RunError, match="student, 1 step: its samples are not finite"):
        score_table([part], labels, judge, rows, 0, lambda x: x)


@pytest.mark.parametrize(
    ("levels", "few"),
    [(4, ["4 steps", "2 steps", "1 step"]), (3, ["2 steps", "1 step"]), (1, ["1 step"])],
)
def test_what_is_compared_are_teacher_untrained_and_student(levels, few):
    """In as many steps as there are levels; of the teacher or the student alone what there is."""
    settings = SimpleNamespace(levels=[1.0] * levels, teacher_steps=7, cfg=2.5)
    teacher, student = SimpleNamespace(settings=settings), SimpleNamespace(settings=settings)
    own = ["teacher, 7 steps, CFG 2.5", *(f"untrained, {n}" for n in few)]
    distilled = [f"student, {n}" for n in few]
    rows = compared(teacher, student)
    assert [name for name, _, _ in rows] == own + distilled
    assert [who for _, who, _ in rows] == [teacher] * len(own) + [student] * len(distilled)
    assert rows[0][2] == dict(steps=7, cfg=2.5)
    for _, _, options in rows[1:]:
        assert options["cfg"] == 1 and options["sampler"] == "renoise"
    assert [name for name, _, _ in compared(teacher, None)] == own
    assert [name for name, _, _ in compared(None, student)] == distilled


# ---------------------------------------------------------------------------------------------
# The judge
# ---------------------------------------------------------------------------------------------


def judge_of(dataset, folder, steps=2, **other):
    s = SimpleNamespace(size=(8, 8), judge_steps=steps, judge_width=8)
    return sample.judge_of(dataset, s, "cpu", folder, "fp32", **other)


def test_one_judge_scores_the_runs_of_all_seeds(tmp_path):
    """Trained once per data set: scores of different seeds have the same measure."""
    judges = [judge_of(data.Shapes(8, 8, s), tmp_path) for s in (0, 1)]
    assert len(list(tmp_path.iterdir())) == 1
    a, b = (judge.state_dict() for judge in judges)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_data_that_begin_alike_have_judges_of_their_own(tmp_path):
    """As after labels or pictures were corrected that are not among the first."""
    shapes = data.Shapes(8, 8)
    for name in ("100 images, digest a", "100 images, digest b", "100 images, digest b"):
        shapes.name = name
        judge_of(shapes, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_judge_learns_to_read_the_attributes(tmp_path):
    """Backgrounds of shapes are seen in a few updates; chance is an eighth."""
    dataset = data.Shapes(8, 8)
    judge, held = judge_of(dataset, tmp_path, steps=60), held_out(data.shares(dataset, 200))
    right = judge_accuracy(held, dataset.labels, dataset.attributes, judge)
    assert list(right) == ["size", "colour", "shape", "background", "pattern"]
    assert right["background"] > 0.8


def test_a_network_to_learn_from_is_another_one_than_the_judge_that_scores(tmp_path):
    """Of another seed and with other convolutions, each kept in a file of its own."""
    dataset = data.Shapes(8, 8)
    one, teaches = judge_of(dataset, tmp_path), judge_of(dataset, tmp_path, seed=1, kernel=5)
    assert len(list(tmp_path.iterdir())) == 2
    assert one.body[0].weight.shape[2:] == (3, 3) and teaches.body[0].weight.shape[2:] == (5, 5)
    assert not torch.equal(one.heads[0].weight, teaches.heads[0].weight)
    images, _ = dataset.batch(range(4))
    assert one.read(images)[0].shape == teaches.read(images)[0].shape  # as large


def test_a_run_does_not_end_for_a_judge_that_can_not_be_kept(tmp_path, capsys):
    """A data folder that may only be read, or a full disk: it scores, and one line says so."""
    kept = judge_of(data.Shapes(8, 8), tmp_path / "judges")
    (tmp_path / "file").write_text("")
    judge = judge_of(data.Shapes(8, 8), tmp_path / "file" / "below")  # no folder can be made there
    told = capsys.readouterr().err
    assert told.startswith("The judge can't be kept") and told.count("\n") == 1
    assert torch.equal(judge.heads[0].weight, kept.heads[0].weight)
    again = judge_of(data.Shapes(8, 8), tmp_path / "file" / "below")  # at the next grid of samples
    assert capsys.readouterr().err == ""  # it was not trained a second time
    assert torch.equal(again.heads[0].weight, kept.heads[0].weight)


def test_a_judge_that_may_not_be_read_is_made_anew_and_left_as_it_is(tmp_path, capsys, monkeypatch):
    """Another user's, in a data folder that both share."""
    kept = judge_of(data.Shapes(8, 8), tmp_path)
    before = snapshot(tmp_path)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(scores, "read", refuse)
    for told in (1, 0):  # the second is not trained
        judge = judge_of(data.Shapes(8, 8), tmp_path)
        assert torch.equal(judge.heads[0].weight, kept.heads[0].weight)
        assert capsys.readouterr().err.count("The judge can't be kept") == told
    assert snapshot(tmp_path) == before


def test_a_judge_reads_all_sizes_of_images():
    """To as many features; in batches as at once."""
    judge = Judge([2, 5], width=8, size=(8, 8))
    for size in ((8, 8), (12, 20)):
        images = torch.randint(0, 256, (7, 3, *size), generator=seeded(), dtype=torch.uint8)
        features, answers = judge.read(images)
        assert features.shape == (7, 64) and features.dtype == torch.float64
        assert answers.shape == (7, 2) and (answers < torch.tensor([2, 5])).all()
        again, _ = judge.read(images, batch=3)
        torch.testing.assert_close(again, features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"cut", None], ids=["empty", "cut", "of another"])
def test_a_damaged_judge_is_refused_by_name(tmp_path, content):
    """It is said that deleting it is all that it takes."""
    judge_of(data.Shapes(8, 8), tmp_path)
    (path,) = tmp_path.iterdir()
    if content is None:
        save(dict(weights={}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{path.name}: damaged\. Delete it"):
        judge_of(data.Shapes(8, 8), tmp_path)
