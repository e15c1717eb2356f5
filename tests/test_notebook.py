"""docs/ladd.ipynb runs from its first cell to its last, as a course would run it."""

import json
import re
import sys
import warnings
from pathlib import Path

import pytest

import ladd

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "docs" / "ladd.ipynb"
CELLS = json.loads(PATH.read_text("utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
SMALL = dict(IMAGES=4, TEACHER_STEPS=(1, 2), SAMPLES=8, UPDATES=2)


def test_the_notebook_is_short_stored_without_large_outputs_and_copies_nothing():
    """Functions and classes of the repository are imported, and none is written again."""
    assert PATH.stat().st_size < 300_000
    assert max(code.count("\n") for code in CODE) < 18
    theirs = re.findall(r"^(?:def|class) (\w+)", "\n".join(CODE), re.M)
    ours = "\n".join(
        path.read_text("utf-8")
        for path in (p for f in ("", "lib", "tools", "sd3") for p in (ROOT / f).glob("*.py"))
    )
    assert theirs and not set(theirs) & set(re.findall(r"^ *(?:def|class) (\w+)", ours, re.M))


def test_every_cell_runs_in_order_with_small_numbers(tmp_path, monkeypatch, capsys):
    """In a copy of docs/, so that its run lands elsewhere; every picture shows something."""
    pytest.importorskip("matplotlib").use("agg")
    import matplotlib.pyplot as plt

    assert re.findall(r"^(\w+) = ", CODE[0], re.M) == list(SMALL)
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("lib", "tools", "pretrained"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(ladd.PRESETS, "nano", dict(judge_steps=2))
    names, drawn = dict(SMALL), 0
    for code in CODE[1:]:
        exec(compile(code, PATH.name, "exec"), names)
        drawn += len(plt.get_fignums())
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a letter that the font lacks
            for number in plt.get_fignums():
                plt.figure(number).canvas.draw()
        plt.close("all")
    assert drawn == 10
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "student.pt").exists() and "L_D = " in capsys.readouterr().out
