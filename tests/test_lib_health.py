"""Verdicts on a stage from its log, and whether samples of one caption are alike."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import COLLAPSES, alike

import data
from lib.health import commonest, diversity, judge_stages, symptoms
from lib.report import SIGNS, verdicts

# ---------------------------------------------------------------------------------------------
# Signs
# ---------------------------------------------------------------------------------------------


def rows(n, **changes):
    """A healthy distillation's rows; the changes hold in those from `start` to `stop`."""
    start, stop = changes.pop("start", 0), changes.pop("stop", n)
    healthy = dict(loss_d=1.87, ranked=0.63, loss_g=0.1, grad_norm=12.0, diversity=1.0)
    return [
        dict(step=20 * (i + 1), **(healthy | changes if start <= i < stop else healthy))
        for i in range(n)
    ]


SICK = [dict(loss_d=0.1), dict(grad_norm=0.1), dict(diversity=0.6)]


@pytest.mark.parametrize("sign", SICK)
def test_a_sign_is_suspicious_for_a_tenth_of_a_stage_and_a_failure_for_half(sign):
    """Of 100 rows: 9 in a row are nothing, 10 are suspicious, 50 a failure; the figure is told."""
    signs = SIGNS["distillation"]
    for length, want in ((9, []), (10, ["suspicious"]), (49, ["suspicious"]), (50, ["failed"])):
        found = symptoms(rows(100, start=30, stop=30 + length, **sign), signs)
        assert [verdict for verdict, _, _ in found] == want
        for _, _, figure in found:
            number, value = next(iter(sign.items()))
            assert figure == f"{number} {value:.3g}, updates 620 to {620 + 20 * (length - 1)}"
    assert symptoms(rows(100), signs) == []


def test_a_sign_is_measured_by_the_rows_that_are_expected():
    """In the course of a run, too: 20 bad rows are all there are, but a tenth of 200."""
    signs, bad = SIGNS["distillation"], rows(20, diversity=0.1)
    assert [verdict for verdict, _, _ in symptoms(bad, signs)] == ["failed"]
    assert [verdict for verdict, _, _ in symptoms(bad, signs, expected=200)] == ["suspicious"]
    assert symptoms(bad, signs, expected=201) == []


def test_rows_of_the_heads_alone_are_no_sign():
    """While the student waits there is no loss_g, and the heads may win outright."""
    alone = [dict(step=20 * i, loss_d=0.01, ranked=1.0) for i in range(1, 200)]
    assert symptoms(alone, SIGNS["distillation"]) == []


def test_a_teacher_that_does_not_learn_has_failed():
    told = [dict(step=i, loss=1.0 - 0.8 * (i > 4)) for i in range(1, 60)]
    assert symptoms(told, SIGNS["teacher"]) == []
    ((verdict, _, _),) = symptoms([dict(row, loss=1.0) for row in told], SIGNS["teacher"])
    assert verdict == "failed"


def test_skipped_updates_are_part_of_the_verdict():
    """Any is suspicious, more than a tenth a failure."""
    for n, want in ((1, "suspicious"), (200, "suspicious"), (201, "failed")):
        skipped = [dict(step=i, skipped=i) for i in range(1, n + 1)]
        ((verdict, _, figure),) = symptoms(skipped + rows(100), SIGNS["distillation"])
        assert verdict == want and f"{n} of 2000" in figure


def test_the_verdict_is_the_worst_of_what_was_found_with_all_of_it():
    found = [("suspicious", "alike", "0.6"), ("failed", "blind", "2.0")]
    verdicts = judge_stages([], {}, dict(synthesis=[], distillation=found))
    assert verdicts == dict(synthesis="healthy", distillation="failed: alike (0.6); blind (2.0)")


def test_every_stage_is_judged_by_its_own_rows():
    """A stage with too few rows is not; what was found otherwise counts with them."""
    log = [dict(row, stage="distillation") for row in rows(100, diversity=0.1)]
    log += [dict(stage="teacher", step=1, loss=1.0), dict(settings={}), dict(finished=True)]
    more = dict(teacher=[], synthesis=[], distillation=[("suspicious", "worse", "9")], report=[])
    found = judge_stages(log, SIGNS, more)
    assert found["teacher"] == "not judged: 1 rows of log.jsonl are too few"
    assert found["synthesis"] == found["report"] == "healthy"
    assert found["distillation"].startswith("failed: the student's samples are alike")
    assert found["distillation"].endswith("worse (9)")


@pytest.mark.parametrize("frechet, blind", [(60, False), (140, True)])
def test_heads_near_chance_are_a_fault_only_where_the_student_is_far_from_its_teacher(
    frechet, blind
):
    """Teacher 20, untrained 200: a student at 60 has learned from them, one at 140 has not."""
    log = [dict(row, stage="distillation") for row in rows(100, loss_d=1.99, ranked=0.51)]
    run = SimpleNamespace(
        log=SimpleNamespace(rows=lambda: log), settings=SimpleNamespace(teacher="")
    )
    names = ("real", "teacher, 32 steps", "untrained, 1 step", "student, 1 step")
    table = [
        dict(name=name, frechet=f, alignment=1.0)
        for name, f in zip(names, (5, 20, 200, frechet), strict=True)
    ]
    assert ("the heads see nothing" in verdicts(run, table)["distillation"]) is blind


# ---------------------------------------------------------------------------------------------
# Diversity
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", COLLAPSES)
def test_diversity_is_one_in_health_and_falls_with_every_collapse(case):
    collapse, low, high = COLLAPSES[case]
    real, fake = (alike(seed).flatten(2) for seed in (1, 2))
    assert low <= diversity(real, collapse(fake)).item() <= high


def test_a_batch_of_one_says_nothing_of_diversity():
    assert diversity(alike(0)[:1], alike(1)[:1]) == 1


class Batch(NamedTuple):
    x0: torch.Tensor
    text: data.Text


def test_the_commonest_captions_come_first_with_four_different_samples_each():
    """Of captions a, b, b, c × 6: four of c, two of b, then a; equal samples count once."""
    pooled = torch.tensor([[0.0], [1], [1], [2], [2], [2], [2], [2], [2]])
    x0 = torch.arange(9.0)[:, None]
    batch = Batch(x0, data.Text(pooled, pooled))
    assert commonest([batch], 9).x0[:, 0].tolist() == [3, 4, 5, 6, 1, 2, 0]
    assert commonest([batch], 5).text.pooled[:, 0].tolist() == [2, 2, 2, 2, 1]
    x0[4] = x0[3]
    assert commonest([batch], 9).x0[:, 0].tolist() == [3, 5, 6, 7, 1, 2, 0]


def test_the_commonest_are_looked_for_in_all_batches_of_the_first_ones_size():
    """And there are no more of them than a batch has."""
    batches = [
        Batch(
            torch.full(shape, float(i)), data.Text(torch.zeros(n, 1), torch.full((n, 1), caption))
        )
        for i, (shape, n, caption) in enumerate(
            [((2, 3), 2, 1.0), ((2, 4), 2, 7.0), ((2, 3), 2, 7.0), ((2, 3), 2, 7.0)]
        )
    ]
    found = commonest(batches, 32)
    assert found.x0[:, 0].tolist() == [2, 3] and set(found.text.pooled.flatten().tolist()) == {7}
