"""tools/architecture.py: the picture of the documents is of this code."""

import json
from pathlib import Path

import pytest
from PIL import Image

import ladd
from tools.architecture import draw_architecture, read_code

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "architecture.png"


def numbers_of(path):
    with Image.open(path) as picture:
        return json.loads(picture.text["numbers"])


def test_the_picture_of_the_architecture_has_the_numbers_of_the_code():
    """Where it has not: python -m tools.pictures."""
    assert numbers_of(PICTURE) == read_code()


@pytest.mark.parametrize("change", [dict(taps=(0, 2)), dict(head_width=32), dict(qk_norm=False)])
def test_a_picture_of_another_network_is_found_out(monkeypatch, change):
    monkeypatch.setitem(ladd.PRESETS, "nano", change)
    assert numbers_of(PICTURE) != read_code()


def test_who_receives_gradient_is_read_off_the_code(monkeypatch):
    """Were the heads to learn from L_G too, the picture would say so."""
    assert read_code()["L_G"] == ["student"]

    def careless(heads, targets, weights, fake, b, s):
        return ladd.hinge_g(ladd.logits_of(heads, fake, b, s)), None

    monkeypatch.setattr(ladd, "student_losses", careless)
    assert read_code()["L_G"] == ["student", "heads"]


def test_words_stay_in_the_picture_and_no_box_covers_another(tmp_path):
    pytest.importorskip("matplotlib")
    figure, seen = draw_architecture(read_code()), []
    figure.savefig(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        width, height = picture.size
        assert width > 1500 and len(picture.convert("RGB").getcolors(10**6)) > 20
    for text in figure.axes[0].texts:
        if words := text.get_text():
            its = (text.get_bbox_patch() or text).get_window_extent()
            assert its.x0 > 0 and its.x1 < width and its.y0 > 0 and its.y1 < height, words
            for other, extent in seen:
                assert not its.overlaps(extent), (words, other)
            seen.append((words, its))
