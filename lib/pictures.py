"""Pictures that a run writes: grids of samples, side by side, as PNG and GIF.

A file that this program did not make is never replaced.
"""

import math
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

from lib.errors import UsageError, clean, pass_on
from lib.files import replacing

WRITERS = 16  # threads that write the pictures of a folder: they wait for the disk more than work


def grid(images, columns, scale=None):
    """Images (3, H, W) uint8 -> one picture, small images enlarged without smoothing.

    Smaller ones stand in the middle of a place that has room for the largest."""
    H, W = (max(image.shape[k] for image in images) for k in (1, 2))
    rows, scale = math.ceil(len(images) / columns), scale or max(1, 64 // max(H, W))
    sheet = np.full((rows, H + 2, columns, W + 2, 3), 255, np.uint8)
    for i, image in enumerate(images):
        _, h, w = image.shape
        top, left = 1 + (H - h) // 2, 1 + (W - w) // 2
        place = sheet[i // columns, top : top + h, i % columns, left : left + w]
        place[:] = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(sheet.reshape(rows * (H + 2), columns * (W + 2), 3))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def panels(titled, columns):
    """[(title, images)] -> the grids side by side under their titles."""
    grids = [(title, grid(images, columns)) for title, images in titled]
    width = sum(g.width for _, g in grids) + 16 * (len(grids) - 1)
    sheet = Image.new("RGB", (width, grids[0][1].height + 24), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for title, picture in grids:
        draw.text((x + 4, 4), title, fill="black", font_size=14)
        sheet.paste(picture, (x, 24))
        x += picture.width + 16
    return sheet


def stack(pictures):
    """Pictures one below the other, on white."""
    size = max(p.width for p in pictures), sum(p.height for p in pictures)
    sheet = Image.new("RGB", size, "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def refuse_strangers(path):
    """Raises UsageError where a file is that this program did not make."""
    path, ours = Path(path), False
    if not path.exists():
        return
    try:
        if path.is_file():  # opening a pipe might never end
            with Image.open(path, formats=("PNG", "GIF")) as old:
                ours = old.info.get("Software") == "LADD" or old.info.get("comment") == b"LADD"
    except Exception as error:  # Pillow raises nearly anything on damaged files
        pass_on(error, path)
    if not ours:
        raise UsageError(f"{path} exists and was not made by this program; choose another")


def save_png(picture, path, **notes):
    """Writes a PNG that carries the notes; an existing picture is replaced only if this made it."""
    refuse_strangers(path)
    info = PngImagePlugin.PngInfo()
    for key, value in {"Software": "LADD", **notes}.items():
        info.add_itxt(key, clean(value))
    with replacing(path) as file:
        picture.save(file, "PNG", pnginfo=info)


def square(images):
    """As many columns as rows, nearly."""
    return grid(images, math.ceil(math.sqrt(len(images))))


def save_pictures(images, out, prompts, notes):
    """Images (3, H, W) uint8 as one grid, where `out` ends in .png, or as a folder of one PNG each
    with its own prompt.

    images: may be an iterator that makes them: those of a folder are written by threads while it
    makes the next, and are not kept."""
    out = Path(out)
    kind = out.suffix.lower()  # a folder may be named v1.5
    if re.search("[a-z]", kind) and kind != ".png" and not out.is_dir():
        raise ValueError(f"{out}: pictures are written as .png; or name a folder for one PNG each")
    if kind == ".png" or out.is_file():
        refuse_strangers(out)  # before they are drawn
    if kind == ".png":
        save_png(square(list(images)), out, prompt="; ".join(dict.fromkeys(prompts)), **notes)
        return
    if (out / f"{len(prompts):05d}.png").exists():
        raise UsageError(f"{out} has pictures of an earlier, longer command; choose another folder")

    def write(i, image):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        save_png(picture, out / f"{i:05d}.png", prompt=prompts[i], index=i, **notes)

    waiting = deque()
    with ThreadPoolExecutor(WRITERS) as threads:
        for i, image in enumerate(images):
            waiting.append(threads.submit(write, i, image))
            if len(waiting) > 16 * WRITERS:  # what is not written yet is bounded
                waiting.popleft().result()
        for each in waiting:
            each.result()


def save_gif(frames, path):
    """An animation of pictures, the last of them shown longest."""
    refuse_strangers(path)
    first, *more = frames
    pauses = [150] * len(more) + [1500]  # milliseconds
    with replacing(path) as file:
        first.save(
            file, "GIF", comment=b"LADD", optimize=True,
            save_all=True, append_images=more, duration=pauses, loop=0,
        )  # fmt: skip
