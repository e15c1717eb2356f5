"""Preferences: pairs of pictures of one caption, of which one is the better.

A folder of them has a pairs.jsonl with a line for each pair, which names files in the folder:

    {"winner": "a.png", "loser": "b.png", "caption": "a large red circle"}

In a program a pair is the winner over the loser, (6, H, W) uint8, and the caption.
"""

import json

import numpy as np
import torch
from PIL import Image

from lib.archive import Files
from lib.errors import DataError, clean, pass_on, reason
from lib.files import write_text
from lib.folders import decode_all, listed, read_rows
from lib.images import size_of
from lib.pictures import save_png

LIST = "pairs.jsonl"
SIDES = ("winner", "loser")


def read_list(path):
    """What the list in a folder or a zip names: its files, [(winner, loser, caption)].

    DataError says what is wrong and where; of the pictures only the sizes are read."""
    files, pairs = Files(path), []
    there = set(files.names)
    if LIST not in there:
        raise DataError(f"{path}: no {LIST} in it, which names the pairs{listed(files.left_out)}.")
    for where, (*names, caption) in read_rows(files, LIST, (*SIDES, "caption")):
        if not clean(caption):
            raise DataError(f"{where} has no caption.")
        names = [files.called(name) for name in names]
        if missing := [name for name in names if name not in there]:
            raise DataError(f"{where} names {missing[0]}, which is not there.")
        first, second = (read_size(files, name, where) for name in names)
        if first != second:
            told = "{}×{} and {}×{}".format(*first, *second)
            raise DataError(f"{where}: pictures of {told} pixels; those of a pair have one size.")
        pairs.append((*names, clean(caption)))
    if len(pairs) < 2:
        raise DataError(f"{path}: its {LIST} has {len(pairs)} pairs, and 2 are the least.")
    return files, pairs


def read_size(files, name, where):
    """The (H, W) of a picture, or the DataError that says why not."""
    try:
        with files.open(name) as file:
            return size_of(file)
    except Exception as error:  # Pillow raises nearly anything on damaged files
        pass_on(error, files.path / name)
        raise DataError(f"{where}: {name} can't be read ({reason(error)}).") from None


def read_pairs(path, sizes):
    """All pairs of a folder, cropped to that of `sizes` whose aspect is nearest."""
    files, pairs = read_list(path)
    names = sorted({name for *both, _ in pairs for name in both})
    pixels = decode_all(files, names, sizes, [], len(names))
    return [
        (torch.from_numpy(np.concatenate([pixels[name] for name in both])), caption)
        for *both, caption in pairs
        if pixels.keys() >= set(both)
    ]


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
    row_of = {caption: row for row, caption in enumerate(captions)}
    for shape in sorted({both.shape for both, _ in pairs}):
        alike = [(both, row_of[text]) for both, text in pairs if both.shape == shape]
        images, rows = zip(*alike, strict=True)
        parts.append((torch.stack(images), torch.tensor(rows)))
    return parts, captions


def best_and_worst(images, reward, candidates, tie):
    """Of every `candidates` images in a row yields the best over the worst, and the best one's
    index; nothing where their rewards differ by `tie` or less."""
    for start in range(0, len(images), candidates):
        own = reward[start : start + candidates]
        best, worst = start + int(own.argmax()), start + int(own.argmin())
        if reward[best] - reward[worst] > tie:
            yield torch.cat([images[best], images[worst]]), best
