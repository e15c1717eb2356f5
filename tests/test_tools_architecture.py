"""tools/architecture.py: the picture of the documents is of this code."""

import json
import sys

import pytest
from PIL import Image

import ladd
from tools import architecture


def test_the_picture_of_the_architecture_has_the_numbers_of_the_code():
    assert architecture.main(["--check"]) == 0


@pytest.mark.parametrize("change", [dict(taps=(0, 2)), dict(head_width=32), dict(qk_norm=False)])
def test_a_picture_of_another_network_is_found_out(monkeypatch, capsys, change):
    monkeypatch.setitem(ladd.PRESETS, "nano", change)
    assert architecture.main(["--check"]) == 1
    assert "python -m tools.architecture" in capsys.readouterr().out


def test_who_receives_gradient_is_read_off_the_code(monkeypatch):
    """Were the heads to learn from L_G too, the picture would say so."""
    assert architecture.read_code()["L_G"] == ["student"]

    def careless(heads, fake, real, b, s):
        return ladd.hinge_g(ladd.logits_of(heads, fake, b, s)), None

    monkeypatch.setattr(ladd, "student_losses", careless)
    assert architecture.read_code()["L_G"] == ["student", "heads"]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(architecture, "PICTURE", tmp_path / "architecture.png")
    return tmp_path / "architecture.png"


def test_a_picture_that_is_drawn_passes_the_check(drawn):
    assert architecture.main([]) == 0
    assert architecture.main(["--check"]) == 0
    with Image.open(drawn) as picture:
        assert json.loads(picture.text["numbers"])["x0"] == "32×3×16×16"
        assert picture.width > 1500 and len(picture.convert("RGB").getcolors()) > 20


def test_words_stay_in_the_picture_and_no_box_covers_another(drawn, monkeypatch):
    seen = []
    save = architecture.Diagram.save

    def watched(diagram, path, **notes):
        save(diagram, path, **notes)
        for text in diagram.axes.texts:
            if text.get_text():
                box = text.get_bbox_patch() or text
                seen.append((text.get_text(), box.get_window_extent()))
        width, height = diagram.figure.canvas.get_width_height()
        for words, extent in seen:
            assert extent.x0 > 0 and extent.x1 < width, words
            assert extent.y0 > 0 and extent.y1 < height, words

    monkeypatch.setattr(architecture.Diagram, "save", watched)
    assert architecture.main([]) == 0
    for i, (words, extent) in enumerate(seen):
        for other, its in seen[:i]:
            assert not extent.overlaps(its), (words, other)


def test_without_matplotlib_one_line_names_the_command(drawn, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert architecture.main([]) == 2
    said = capsys.readouterr().err
    assert "pip install matplotlib" in said and said.count("\n") == 1
    assert not drawn.exists()
