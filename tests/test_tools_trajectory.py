"""tools/trajectory.py: the frames are the steps of both samplers."""

import numpy as np
from conftest import run_folder
from PIL import Image, ImageSequence

import data
import sample
from lib.pictures import grid
from tools.trajectory import main


def test_trajectories_begin_with_the_same_noise_and_end_with_the_samples(tmp_path):
    """A frame a step of the longer way; the shorter one waits at its end."""
    made = run_folder(tmp_path / "made")
    assert main([str(made), "--out", str(tmp_path / "way.gif"), "--num", "4"]) == 0
    with Image.open(tmp_path / "way.gif") as moving:
        frames = [np.asarray(f.convert("RGB"), int) for f in ImageSequence.Iterator(moving)]
    assert len(frames) == 1 + 4  # the student's four steps, the teacher's two
    assert frames[0].shape == (24 + 80, 320 + 16 + 320, 3)
    left, right = (slice(0, 320), slice(336, 656))
    assert (frames[0][24:, left] == frames[0][24:, right]).all()
    assert (frames[2][24:, left] == frames[4][24:, left]).all()
    assert (frames[3][24:, right] != frames[4][24:, right]).any()
    generator = sample.load_generator(made)
    ((captions, _),) = data.held_out_captions(data.load("shapes", [(8, 8)]), 4)
    want = grid(data.to_uint8(generator.sample(captions, seed=3)), 4)
    off = np.abs(frames[-1][24:, right] - np.asarray(want, int))
    assert np.median(off) < 16  # a palette of 160 colours


def test_trajectories_of_no_run_are_one_line(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "way.gif")]) == 2
    said = capsys.readouterr().err
    assert "teacher.pt: no such file" in said and said.count("\n") == 1
    assert not (tmp_path / "way.gif").exists()


def test_a_file_that_this_program_did_not_make_is_not_replaced(tmp_path, capsys):
    (tmp_path / "way.gif").write_bytes(b"mine")
    assert main([str(tmp_path), "--out", str(tmp_path / "way.gif")]) == 2
    assert "way.gif" in capsys.readouterr().err
    assert (tmp_path / "way.gif").read_bytes() == b"mine"
