"""The documents say what the runs say."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence
from test_hostile import run_folder

import data
import ladd
import sample

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch):
    """script(name, words) -> exit status of a script of docs/."""

    def script(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "docs" / name), run_name="__main__")
        return stop.value.code

    return script


def test_the_readmes_table_of_results_is_that_of_the_kept_metrics(script):
    assert script("tables.py") == 0


def test_the_picture_of_the_architecture_has_the_numbers_of_the_code(script):
    assert script("architecture.py", "--check") == 0


@pytest.mark.parametrize("change", [dict(taps=(0, 2)), dict(head_width=32), dict(qk_norm=False)])
def test_a_picture_of_another_network_is_found_out(script, monkeypatch, change):
    monkeypatch.setitem(ladd.PRESETS, "nano", change)
    assert script("architecture.py", "--check") == 1


def test_trajectories_begin_with_the_same_noise_and_end_with_the_samples(script, tmp_path):
    """A frame a step of the longer way; the shorter one waits at its end."""
    made = run_folder(tmp_path / "made")
    words = [made, "--out", tmp_path / "way.gif", "--num", 4, "--scale", 2]
    assert script("trajectories.py", *words) == 0
    with Image.open(tmp_path / "way.gif") as moving:
        frames = [np.asarray(f.convert("RGB"), int) for f in ImageSequence.Iterator(moving)]
    assert len(frames) == 1 + 4  # the student's four steps, the teacher's two
    left, right = (slice(0, 80), slice(104, 184))
    assert (frames[0][44:, left] == frames[0][44:, right]).all()
    assert (frames[2][44:, left] == frames[4][44:, left]).all()
    assert (frames[3][44:, right] != frames[4][44:, right]).any()
    generator = sample.load_generator(made)
    ((captions, _),) = sample.held_out_captions(data.load("shapes", 8, 8), 4)
    want = sample.grid(data.to_uint8(generator.sample(captions, seed=3)), 4, 2)
    off = np.abs(frames[-1][44:, right] - np.asarray(want, int))
    assert np.median(off) < 16  # a palette of 160 colours


def test_trajectories_of_no_run_are_one_line(script, tmp_path, capsys):
    assert script("trajectories.py", tmp_path, "--out", tmp_path / "way.gif") == 2
    assert "teacher.pt: no such file" in capsys.readouterr().err
    assert not (tmp_path / "way.gif").exists()


FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"}


def test_every_flag_that_the_readme_names_exists(capsys):
    for program in (ladd, sample, data):
        with pytest.raises(SystemExit):
            program.main(["--help"])
    known = set(FLAG.findall(capsys.readouterr().out)) | TORCHRUN
    named = set(FLAG.findall((ROOT / "README.md").read_text("utf-8")))
    assert named <= known, named - known
