"""curves.png shows every logged number over its updates."""

import numpy as np
import pytest
from conftest import lines, run_of, same
from PIL import Image

import ladd
from lib import curves
from tools import report


def log(n=20):
    """A log of two stages, with rows that hold no numbers between theirs."""
    rows = [dict(settings={}), dict(stage="teacher", step=1, skipped=1, not_finite=["loss"])]
    rows += [dict(stage="teacher", step=k, loss=1 / k, images_per_s=9.0) for k in range(1, n)]
    more = dict(ranked=0.5, loss_g=float("nan"))
    rows += [dict(stage="distillation", step=k, d_real=k, d_fake=-k, **more) for k in range(1, n)]
    return [*rows, dict(stage="distillation", finished=True, seconds=3.0)]


def test_a_panel_holds_the_numbers_that_are_compared():
    panels = curves.panels_of(log())
    assert list(panels) == [
        ("teacher", "loss"),
        ("distillation", "d_real"),
        ("distillation", "ranked"),
    ]
    assert list(panels["distillation", "d_real"]) == ["d_real", "d_fake"]
    assert panels["teacher", "loss"]["loss"][:2] == [(1, 1.0), (2, 0.5)]


def test_the_lines_of_a_panel_rise_and_fall_as_their_numbers_do():
    """d_real goes up from the middle in the first colour, d_fake down in the second."""
    lines = curves.panels_of(log())["distillation", "d_real"]
    image = np.asarray(curves.draw_panel("distillation", lines)).astype(int)[27:123, 57:349]
    blue, red = image[..., 2] - image[..., 0] > 60, image[..., 0] - image[..., 2] > 60
    heights = [[np.nonzero(c[:, x])[0].mean() for x in (20, 150, 280)] for c in (blue, red)]
    assert heights[0][0] > heights[0][1] > heights[0][2]
    assert heights[1][0] < heights[1][1] < heights[1][2]


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 1e-30], [-1e30, 1e30]])
def test_any_numbers_can_be_drawn(values):
    rows = [dict(stage="a", step=k, loss=value) for k, value in enumerate(values)]
    assert np.asarray(curves.draw_curves(rows)).std() > 1


def test_a_log_without_numbers_gives_no_picture():
    assert curves.draw_curves([dict(settings={}), dict(stage="report", finished=True)]) is None


def test_every_grid_of_the_students_has_its_scores_in_one_step_and_they_change_no_number(
    train_and_show,
):
    """They are that student's own, as another judge of the same settings finds them."""
    folder = train_and_show("run", "--sample-every 4")
    rows = [row for row in lines(folder) if "step" in row and "frechet" in row]
    assert [row["step"] for row in rows] == [4, 6]
    run = run_of(["--out", folder, "--data-dir", folder / "other"])
    last = report.glance(run.dataset, ladd.generator(run, "student"), run.settings.data_dir)
    assert last == pytest.approx({name: rows[1][name] for name in ("alignment", "frechet")})
    wanted = {("distillation", "alignment"), ("distillation", "frechet")}
    assert wanted <= curves.panels_of(rows).keys()
    fewer = train_and_show("fewer", "--sample-every 6")
    assert same(folder / "student.pt", fewer / "student.pt")


def test_the_curves_are_drawn_with_the_grids_before_there_is_a_report(train_and_show):
    """And are drawn anew: those of two stages are higher than those of one."""
    heights = []
    for stage in ("teacher", "synthesis", "distillation"):
        folder = train_and_show("run", stages=[stage])
        with Image.open(folder / "curves.png") as picture:
            heights.append(picture.height)
    assert heights[0] == heights[1] < heights[2]
