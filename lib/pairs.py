"""Preferences: pairs of pictures of one caption, of which one is the better.

A folder of them has a pairs.jsonl with a line for each pair, which names files in the folder:

    {"winner": "a.png", "loser": "b.png", "caption": "a large red circle"}

In a program a pair is the winner over the loser, (6, H, W) uint8, and the caption.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib.archive import MOST_BYTES
from lib.errors import DataError, clean, pass_on, reason
from lib.files import write_text
from lib.images import decode, size_of
from lib.pictures import save_png

LIST = "pairs.jsonl"
SIDES = ("winner", "loser")

# ---------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------


def read_list(folder):
    """What the folder's list names: [(winner's path, loser's path, caption)].

    DataError says what is wrong and where; of the pictures only the sizes are read."""
    folder, where = Path(folder), f"--pairs {folder}"
    if not folder.is_dir():
        raise DataError(f"{where}: no such folder.")
    if not (folder / LIST).is_file():
        raise DataError(f"{where}: no {LIST} in it, which names the pairs.")
    try:
        lines = (folder / LIST).read_text("utf-8-sig").splitlines()
    except ValueError:
        raise DataError(f"{where}: its {LIST} is no text in UTF-8.") from None
    lines = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if len(lines) < 2:
        raise DataError(f"{where}: its {LIST} has {len(lines)} pairs, and 2 are the least.")
    return [read_line(folder, line, f"{where}: {LIST} line {i}") for i, line in lines]


def read_line(folder, line, where):
    """A line of the list -> winner's path, loser's path, caption."""
    try:
        row = json.loads(line)
        paths, caption = [folder / row[side] for side in SIDES], clean(row["caption"] + "")
    except (ValueError, KeyError, TypeError, RecursionError):
        form = '{"winner": "FILE", "loser": "FILE", "caption": "TEXT"}'
        raise DataError(f"{where} is not {form}.") from None
    if not caption:
        raise DataError(f"{where} has no caption.")
    sizes = [read_picture(path, where, size_of) for path in paths]
    if sizes[0] != sizes[1]:
        told = " and ".join(f"{h}×{w}" for h, w in sizes)
        raise DataError(f"{where}: pictures of {told} pixels; those of a pair have one size.")
    return *paths, caption


def read_picture(path, where, read):
    """read(path), or the DataError that says why not."""
    if not path.is_file():
        raise DataError(f"{where} names {path.name}, which is not there.")
    try:
        return read(path)
    except Exception as error:  # Pillow raises nearly anything on damaged files
        pass_on(error, path)
        raise DataError(f"{where}: {path.name} can't be read ({reason(error)}).") from None


def read_pairs(folder, sizes):
    """All pairs of a folder, cropped to that of `sizes` whose aspect is nearest."""

    def pixels(path):
        with open(path, "rb") as file:
            return decode(file.read(MOST_BYTES), sizes)

    pairs = []
    for *paths, caption in read_list(folder):
        both = [read_picture(path, f"--pairs {folder}", pixels) for path in paths]
        pairs.append((torch.from_numpy(np.concatenate(both)), caption))
    return pairs


def write_pairs(pairs, folder):
    """Writes a folder that `read_pairs` reads; its list comes last: with it, all is there."""
    rows = []
    for i, (both, caption) in enumerate(pairs):
        row = {side: f"{i:05d}.{side}.png" for side in SIDES}
        for side, image in zip(SIDES, both.chunk(2), strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            save_png(picture, folder / row[side], prompt=caption)
        rows.append(json.dumps(row | dict(caption=caption)) + "\n")
    write_text("".join(rows), folder / LIST)


def tensors_of(pairs):
    """-> [(images (n, 6, H, W), rows of the captions (n,))] of each size, captions"""
    captions, parts = sorted({caption for _, caption in pairs}), []
    for shape in sorted({both.shape for both, _ in pairs}):
        alike = [(both, captions.index(text)) for both, text in pairs if both.shape == shape]
        images, rows = zip(*alike, strict=True)
        parts.append((torch.stack(images), torch.tensor(rows)))
    return parts, captions


# ---------------------------------------------------------------------------------------------
# By rank
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def rewards(judge, images, labels, batch=500):
    """How probable a judge (lib/scores.py) finds all that the captions say, as a logarithm.

    images (n, 3, H, W) uint8, labels (n, A) -> (n,)"""
    device, found = next(judge.parameters()).device, []
    for x, right in zip(images.split(batch), labels.split(batch), strict=True):
        _, answers = judge(x.to(device).float() / 127.5 - 1)
        each = [
            a.float().log_softmax(1).cpu().gather(1, k)
            for a, k in zip(answers, right.split(1, 1), strict=True)
        ]
        found.append(torch.cat(each, 1).sum(1))
    return torch.cat(found)


def best_and_worst(images, reward, candidates, tie):
    """Of every `candidates` images in a row yields the best over the worst, and the best one's
    index; nothing where their rewards differ by `tie` or less."""
    for start in range(0, len(images), candidates):
        own = reward[start : start + candidates]
        best, worst = start + int(own.argmax()), start + int(own.argmin())
        if reward[best] - reward[worst] > tie:
            yield torch.cat([images[best], images[worst]]), best
