"""methods/edit.py: pairs of pictures that an instruction leads from one to the other, and runs."""

import json

import numpy as np
import pytest
import torch
from conftest import CPU
from PIL import Image
from test_inpaint import LAST, TUNE, check_that_a_cut_run_goes_on, picture, run_to

import data
import ladd
import sample
from lib.scores import distances
from lib.shapes import object_cover
from methods import edit
from methods.edit import EDITS, Pairs

METHOD = dict(distil=edit.distil, method="edit", kind=edit.Settings)
NAMES = ("size", "colour", "shape", "background", "pattern")
INDEX = np.arange(400)


@pytest.fixture(scope="module")
def pairs():
    return Pairs(16, 20, seed=3)


@pytest.fixture(scope="session")
def edits(tmp_path_factory, whole, cache):
    """A finished run with its report, nobody cut it."""
    out = tmp_path_factory.mktemp("edits") / "run"
    flags = f"--from {whole} --evaluation 20 --judge-steps 5 --data-dir {cache}"
    return run_to(out, METHOD, flags)


# ---------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------


def test_a_pair_differs_only_in_what_its_instruction_names(pairs):
    """In the numbers that both are drawn of: one attribute, or the place along one axis."""
    (u, values), (place, after), caption = pairs.edited(INDEX)
    moves = {"left": (5, 0), "right": (5, 1), "up": (6, 0), "down": (6, 1)}
    seen = set()
    for i in INDEX:
        words = pairs.captions[caption[i]].split()
        changed = [n for n, a, b in zip(NAMES, values, after, strict=True) if a[i] != b[i]]
        columns = (u[i] != place[i]).nonzero()[0].tolist()
        if words[0] == "move":
            column, value = moves[words[2]]
            assert changed == [] and columns == [column] and place[i, column] == value
        else:
            (name,) = changed
            answer = list(pairs.attributes[name])[after[NAMES.index(name)][i]]
            assert columns == [] and words[-1] == answer
            assert ("background" in words) == (name == "background")
            assert ("a" in words) == (name == "shape")
        seen.add((words[0], *changed, *columns))
    assert len(seen) == 6  # four attributes, two axes


def test_the_rest_of_the_picture_is_the_same_pixel_by_pixel(pairs):
    """Another colour changes the object alone, another background all but the object; whatever
    else is asked for leaves what neither object covers."""
    (u, values), (place, after), caption = pairs.edited(INDEX)
    region = pairs.region(INDEX)[:, 0].numpy()
    covers = [
        object_cover(16, 20, v[0], v[2], p[:, 4:7], np.full(len(u), -1))[..., 0]
        for p, v in ((u, values), (place, after))
    ]
    for i in INDEX:
        sentence = pairs.captions[caption[i]]
        before, now = (cover[i] for cover in covers)
        if "background" in sentence:
            assert not region[i][before == 1].any() and region[i].any()
        else:
            assert not region[i][(before == 0) & (now == 0)].any()


def test_a_new_colour_is_neither_the_objects_nor_the_backgrounds(pairs):
    """So that the picture changes, and the object can be seen."""
    (_, values), (_, after), _ = pairs.edited(np.arange(3000))
    new = (values[1] != after[1]) | (values[3] != after[3])
    assert (after[1] != after[3]).all()
    counts = np.bincount(np.where(values[1] != after[1], after[1], after[3])[new], minlength=8)
    assert counts.min() > 0.5 * counts.mean()


def test_a_captions_attributes_are_those_of_the_picture_after_the_edit(pairs):
    """By which the judge scores whether the instruction was followed."""
    _, (place, after), caption = pairs.edited(INDEX)
    images, rows = pairs.batch(INDEX)
    assert torch.equal(rows, torch.from_numpy(caption))
    assert torch.equal(pairs.labels[rows], torch.from_numpy(np.stack(after, axis=1)))
    assert torch.equal(images, pairs.draw(place, after))
    assert len(pairs.captions) == len(pairs.labels) and len(set(pairs.captions)) == 26
    assert all(sentence.split()[0] in ("make", "move") for sentence in EDITS)


def test_the_condition_is_the_picture_before_as_the_plain_set_draws_it(pairs):
    plain = data.Shapes(16, 20, seed=3, pairs=False)
    assert torch.equal(data.to_uint8(pairs.condition(INDEX)), plain.batch(INDEX)[0])
    assert torch.equal(pairs.condition(INDEX)[7:9], pairs.condition(INDEX[7:9]))


def test_held_out_pairs_are_the_same_for_every_seed_and_others_than_those_learnt(pairs):
    other = Pairs(16, 20, seed=4)
    for a, b in zip(pairs.edited(INDEX, True), other.edited(INDEX, True), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(pairs.batch(INDEX)[0], other.batch(INDEX)[0])
    assert not torch.equal(pairs.batch(INDEX)[0], pairs.batch(INDEX, True)[0])


def test_the_exact_picture_is_at_no_distance_and_the_one_before_only_inside(pairs):
    truth, region = pairs.batch(INDEX)[0], pairs.region(INDEX)
    assert distances(truth, truth, region) == dict(inside=0, outside=0)
    before = distances(data.to_uint8(pairs.condition(INDEX)), truth, region)
    assert before["inside"] > 20 and before["outside"] == 0


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


def test_student_and_teacher_see_the_picture_before_and_learn_the_one_after(
    train, whole, monkeypatch
):
    seen, features = [], ladd.features_of_both
    monkeypatch.setattr(ladd, "features_of_both", lambda *a: seen.append(a) or features(*a))
    train("out", f"--from {whole} {TUNE} --seed 1", LAST, **METHOD)
    *_, b, s = seen[-1]
    pairs, index = Pairs(12, 12, 1), np.arange(5 * 4, 6 * 4)  # the last of 6 batches of 4
    assert torch.equal(b.x0, data.to_float(pairs.batch(index)[0]))
    assert torch.equal(b.text.condition, pairs.condition(index)) and s.targets == "real"


def test_the_report_has_a_row_of_the_pictures_as_given(edits):
    """Nothing outside is changed there, and nothing inside is as it should be."""
    *_, given = json.loads((edits / "metrics.json").read_text())["rows"]
    assert given["name"] == "as given" and given["outside"] == 0 and given["inside"] > 20


def test_a_run_that_was_cut_goes_on_bit_for_bit(train, whole, monkeypatch):
    check_that_a_cut_run_goes_on(train, f"--from {whole}", monkeypatch, **METHOD)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--data cifar10", "--data cifar10: pairs of pictures"),
        ("--data tests", "--data tests: pairs of pictures"),
    ],
)
def test_other_data_than_shapes_is_refused(launch, tmp_path, capsys, flags, named):
    assert launch("out", f"{flags} --smoke", **METHOD) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_instruction_edits_a_picture_of_the_user(edits, tmp_path, capsys):
    """And its words are known."""
    start = picture(tmp_path / "a.png", np.full((12, 12, 3), 200))
    out = tmp_path / "made.png"
    words = [edits, "--init-image", start, "--prompt", "make it blue", "--out", out, *CPU]
    assert sample.main([*map(str, words)]) == 0
    assert np.asarray(Image.open(out)).std() > 0
    assert "never seen" not in capsys.readouterr().err


def test_an_editing_run_without_a_picture_is_one_line(edits, refused, tmp_path):
    picture(tmp_path / "a.png", np.zeros((12, 12, 3)))
    words = [edits, "--prompt", "make it blue", *CPU]
    refused(sample, words, 2, "edits pictures: give one with --init-image")
    words += ["--init-image", "a.png", "--mask", "a.png"]
    refused(sample, words, 2, "fills no pictures")
