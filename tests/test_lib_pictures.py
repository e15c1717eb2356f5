"""Grids, sheets and animations, pixel by pixel; a stranger's file is never replaced."""

import os
import weakref

import numpy as np
import pytest
import torch
from conftest import seeded
from PIL import Image

from lib import pictures
from lib.errors import UsageError


def test_a_grid_shows_image_i_in_row_i_div_columns_and_column_i_mod_columns():
    """5 images of 3 × 7 pixels, 2 columns, enlarged twice, with a white border of one pixel."""
    images = torch.randint(0, 255, (5, 3, 3, 7), generator=seeded(), dtype=torch.uint8)
    sheet = np.asarray(pictures.grid(images, 2, scale=2))
    assert sheet.shape == (3 * (3 + 2) * 2, 2 * (7 + 2) * 2, 3)
    small = sheet[::2, ::2]
    assert (np.kron(small, np.ones((2, 2, 1), np.uint8)) == sheet).all()  # not smoothed
    for i, image in enumerate(images):
        row, column = divmod(i, 2)
        cell = small[5 * row : 5 * row + 5, 9 * column : 9 * column + 9]
        assert (cell[1:-1, 1:-1] == image.permute(1, 2, 0).numpy()).all()
        assert (cell[[0, -1]] == 255).all() and (cell[:, [0, -1]] == 255).all()
    assert (small[10:, 9:] == 255).all()  # the sixth place is empty


def test_small_images_are_enlarged_to_64_pixels():
    image = torch.zeros(3, 12, 20, dtype=torch.uint8)
    assert pictures.grid([image], 1).size == (3 * 22, 3 * 14)
    assert pictures.grid([torch.zeros(3, 64, 100, dtype=torch.uint8)], 1).size == (102, 66)


def test_a_grid_shows_images_of_mixed_sizes_each_in_the_middle_of_its_place():
    images = [torch.full((3, h, w), 10 + h, dtype=torch.uint8) for h, w in ((2, 6), (4, 4), (6, 2))]
    sheet = np.asarray(pictures.grid(images, 3, scale=1))
    assert sheet.shape == (8, 24, 3)
    for i, image in enumerate(images):
        _, h, w = image.shape
        cell = sheet[:, 8 * i : 8 * i + 8]
        assert (cell != 255).any(2).sum() == h * w
        assert (cell[(8 - h) // 2 :][:h, (8 - w) // 2 :][:, :w] == 10 + h).all()


def test_a_smaller_image_stands_in_the_middle_of_its_place():
    """2 × 4 pixels in a place for 4 × 6, on white."""
    large, small = (torch.zeros(3, *size, dtype=torch.uint8) for size in ((4, 6), (2, 4)))
    sheet = np.asarray(pictures.grid([large, small], 2, scale=1))
    cell = sheet[:, 8:]
    assert (cell[2:4, 2:6] == 0).all() and (cell != 0).sum() == 3 * (6 * 8 - 2 * 4)


def test_panels_stand_side_by_side_under_their_titles():
    """Each has the pixels of its grid below a line of 24 pixels; 16 pixels lie between."""
    titled = [("first", torch.zeros(2, 3, 4, 4, dtype=torch.uint8))]
    titled += [("second", torch.full((2, 3, 4, 4), 128, dtype=torch.uint8))]
    grids = [pictures.grid(images, 2) for _, images in titled]
    sheet = pictures.panels(titled, 2)
    assert sheet.size == (grids[0].width + 16 + grids[1].width, grids[0].height + 24)
    for left, own in zip((0, grids[0].width + 16), grids, strict=True):
        below = sheet.crop((left, 24, left + own.width, 24 + own.height))
        assert (np.asarray(below) == np.asarray(own)).all()
        title = np.asarray(sheet.crop((left, 0, left + own.width, 24)))
        assert title.min() < 100 and (title[0] == 255).all()


def test_a_stack_has_its_pictures_one_below_the_other():
    sheet = pictures.stack([Image.new("RGB", (3, 2), "red"), Image.new("RGB", (5, 1), "blue")])
    assert sheet.size == (5, 3)
    assert [sheet.getpixel(at) for at in ((0, 0), (4, 0), (4, 2))] == [
        (255, 0, 0),
        (255, 255, 255),
        (0, 0, 255),
    ]


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def test_a_png_carries_its_notes(tmp_path):
    """Any text can be read back, whatever its alphabet."""
    notes = dict(prompt="ein großer Kreis, 円", seed=7, steps=4, model="student of runs/nano")
    pictures.save_png(Image.new("RGB", (3, 2)), tmp_path / "new" / "a.png", **notes)
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert {k: picture.info[k] for k in notes} == {k: str(v) for k, v in notes.items()}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_picture_of_our_own_is_replaced(tmp_path):
    for colour in ("red", "blue"):
        pictures.save_png(Image.new("RGB", (3, 2), colour), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.getpixel((0, 0)) == (0, 0, 255)


def frames(n):
    """n grids of 3 images each, told apart by their brightness."""
    images = (torch.full((3, 3, 4, 4), 40 * k, dtype=torch.uint8) for k in range(n))
    return [pictures.square(each) for each in images]


def test_an_animation_shows_every_frame_and_the_last_one_longest(tmp_path):
    """One of our own is replaced; 3 images are 2 columns."""
    for n in (2, 4):
        pictures.save_gif(frames(n), tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 4 and film.size == (2 * 6 * 16, 2 * 6 * 16)
        for k in range(4):
            film.seek(k)
            assert film.convert("RGB").getpixel((50, 50)) == (40 * k,) * 3
            assert film.info["duration"] == (1500 if k == 3 else 150)


def test_a_strangers_file_is_never_replaced(tmp_path):
    """A photo, an animation, or anything that is no picture: refused, and not a byte changes."""
    Image.new("RGB", (3, 2), "red").save(tmp_path / "photo.png")
    Image.new("P", (3, 2)).save(tmp_path / "film.gif")
    (tmp_path / "notes.png").write_text("not a picture")
    for path in sorted(tmp_path.iterdir()):
        before = path.read_bytes()
        with pytest.raises(UsageError, match=path.name):
            pictures.save_png(Image.new("RGB", (3, 2), "blue"), path)
        with pytest.raises(UsageError, match=path.name):
            pictures.save_gif(frames(2), path)
        assert path.read_bytes() == before


def test_where_no_file_can_be_the_systems_reason_is_told_and_none_is_called_a_strangers(tmp_path):
    with pytest.raises(OSError, match="File name too long"):
        pictures.refuse_strangers(tmp_path / f"{'a' * 300}.png")


def test_a_pipe_is_refused_and_not_opened(tmp_path):
    """Opening it would wait for another program that writes."""
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UsageError, match="not made by this program"):
        pictures.refuse_strangers(tmp_path / "a.png")


def test_pictures_of_a_folder_are_written_while_the_next_are_made_and_not_kept(tmp_path):
    """Of 1,000 images at most a few hundred are alive at a time, and the first are on the disk
    before the last are made."""
    alive, most = weakref.WeakSet(), 0

    def images():
        nonlocal most
        for i in range(1000):
            if i == 999:
                assert (tmp_path / "00000.png").exists()
            image = torch.full((3, 2, 2), i % 256, dtype=torch.uint8)
            alive.add(image)
            most = max(most, len(alive))
            yield image

    prompts = [f"image {i}" for i in range(1000)]
    pictures.save_pictures(images(), tmp_path, prompts, dict(seed=3))
    assert most <= 20 * pictures.WRITERS
    for i in (0, 1, 567, 999):
        with Image.open(tmp_path / f"{i:05d}.png") as picture:
            assert picture.getpixel((0, 0)) == (i % 256,) * 3
            assert picture.info["prompt"] == f"image {i}" and picture.info["seed"] == "3"
    assert len(list(tmp_path.iterdir())) == 1000


def test_pictures_are_not_mixed_with_those_of_an_earlier_longer_command(tmp_path):
    """A FID of the folder would be of both."""
    images = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    for count in (2, 3, 3):
        pictures.save_pictures(images[:count], tmp_path, ["a"] * count, {})
        assert len(list(tmp_path.iterdir())) == count
    with pytest.raises(UsageError, match="earlier, longer command"):
        pictures.save_pictures(images[:2], tmp_path, ["b"] * 2, {})
    with Image.open(tmp_path / "00000.png") as kept:
        assert kept.info["prompt"] == "a"


def test_a_strangers_picture_in_the_folder_ends_the_drawing(tmp_path):
    """The threads' error is the program's."""
    Image.new("RGB", (3, 2), "red").save(tmp_path / "00007.png")
    before = (tmp_path / "00007.png").read_bytes()
    images = torch.zeros(9, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(UsageError, match="00007"):
        pictures.save_pictures(images, tmp_path, ["a"] * 9, {})
    assert (tmp_path / "00007.png").read_bytes() == before
