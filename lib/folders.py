"""Folders and zips of captioned images as plain arrays.

Captions stand in a captions.jsonl, or in a .txt beside each image, or are the names of the class
folders. One line says what is there and what is left out; pictures that can't be read are named.
"""

import hashlib
import io
import json
import os
import posixpath
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from lib.archive import Files
from lib.captions import class_attributes, word_attributes
from lib.errors import DataError, clean, plural, some
from lib.images import SUFFIXES, decode

# Folders that programs put beside a person's pictures, and that are no classes.
THUMBNAILS = re.compile(
    r"(?is)(.*/)?(_?thumb(nail)?s|[@#][^/]*|\$RECYCLE\.BIN|System Volume Information|lost\+found)/"
)
SPLITS = {"train", "training", "val", "valid", "validation", "eval", "dev", "test", "testing"}


def read_rows(files, name, keys):
    """The texts of `keys` in every line of a .jsonl. Yields where it stands, [text, …]"""
    form = ", ".join(f'"{key}": "…"' for key in keys)
    for number, line in enumerate(io.StringIO(files.text(name)), 1):
        where = f"{files.path}: {name} line {number}"
        if line.strip():
            try:
                row = json.loads(line)
                texts = [row[key] + "" for key in keys]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise DataError(f"{where} is not {{{form}}}.") from None
            yield where, texts


def read_list(files, name, captions):
    """Adds the captions of a captions.jsonl to {image name: caption}."""
    for where, (file, caption) in read_rows(files, name, ("file", "caption")):
        file = files.called(posixpath.normpath(posixpath.join(posixpath.dirname(name), file)))
        if file in captions:
            raise DataError(f"{where} names {file} a second time.")
        captions[file] = clean(caption)
    if missing := sorted(set(captions) - set(files.names)):
        number = plural(len(missing), "missing file")
        raise DataError(f"{files.path}: {name} names {number}: {missing[0][:200]} …")


def find_captions(files):
    """-> {image name: caption}, and whether these are the names of class folders. Prints a line."""
    images = [n for n in files.names if n.lower().endswith(SUFFIXES)]
    names, captions, left_out = set(files.names), {}, dict(files.left_out)
    lists = [n for n in files.names if posixpath.basename(n) == "captions.jsonl"]
    beside = {n: posixpath.splitext(n)[0] + ".txt" for n in images if not lists}
    classes = not lists and names.isdisjoint(beside.values())
    if classes:
        left_out["in thumbnail or system folders"] = [n for n in images if THUMBNAILS.match(n)]
        images = [n for n in images if not THUMBNAILS.match(n)]
    if lists:
        for name in lists:
            read_list(files, name, captions)
    elif not classes:
        captions = {n: clean(files.text(t)) for n, t in beside.items() if t in names}
    elif all("/" in n for n in images):
        captions = {n: clean(n.split("/")[-2].replace("_", " ")) for n in images}
    else:
        raise DataError(
            f"{files.path}: images without captions, {some([n for n in images if '/' not in n])}. "
            "Put them into one folder per class, or add a captions.jsonl of "
            '{"file": "…", "caption": "…"} lines, or a .txt beside each image.'
        )
    left_out["without a caption"] = [n for n in images if n not in captions]
    told = (images, lists, beside.values(), captions, *left_out.values())
    for name in sorted(names.difference(*told)):
        kind = posixpath.splitext(name)[1].lower() or "without a suffix"
        left_out.setdefault(kind, []).append(name)
    rest = listed(left_out)
    if not images:
        raise DataError(
            f"{files.path}: no images in it. Expected files ending in {', '.join(SUFFIXES)}{rest}."
        )
    if not captions:
        raise DataError(f"{files.path}: none of its images has a caption.")
    found = sorted(set(captions.values()))
    kinds = plural(len(found), "caption")
    if classes:
        kinds = f"{plural(len(found), 'class', 'es')} ({some(found)})"
    what = f"{plural(len(captions), 'image')}, {kinds}{merged_parts(captions, classes)}{rest}"
    print(clean(f"{files.path}: {what}", 2000), file=sys.stderr)
    return captions, classes


def listed(left_out):
    """{why: names} of what is left out, as text."""
    kinds = [f"{len(names)} {why} ({some(names)})" for why, names in left_out.items() if names]
    return f"; left out: {', '.join(kinds)}" if kinds else ""


def merged_parts(captions, classes):
    """Says what becomes of a training and a validation part, which have no meaning here."""
    parts = sorted({f for n in captions for f in n.split("/")[:-1] if f.lower() in SPLITS})
    if len(parts) < 2:
        return ""
    as_classes = classes and any(n.split("/")[-2] in parts for n in captions)
    how = "seen as classes" if as_classes else "read as one set"
    return f"; {'/ and '.join(parts)}/ are {how}"


def in_threads(function, names):
    """The function of every name, in order; while one file is read, others are."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, names)


def decode_all(files, names, sizes, bad, total):
    """Every image as (3, H, W) uint8, that of `sizes` of the nearest aspect. -> {name: pixels}

    Those that can't be read are left out, named, and added to `bad`. DataError where these are more
    than 1 % of the `total` images of the set."""

    def read(name):
        try:
            return decode(files.read(name), sizes)
        except Exception as error:  # Pillow and zipfile raise nearly anything on damaged files
            return clean(error) or type(error).__name__  # the error itself would keep the bytes

    quiet = len(names) < 2000 or None  # None: quiet where stderr is not a terminal
    done = in_threads(read, names)
    done = list(tqdm(done, "reading images", len(names), disable=quiet, leave=False))
    good, before = {}, len(bad)
    for name, found in zip(names, done, strict=True):
        if not isinstance(found, str):
            good[name] = found
            continue
        bad.append(name)
        if len(bad) <= 10:
            print(clean(f"skipped {files.path}: {name}: {found}", 1000), file=sys.stderr)
    if len(bad) > before:
        print(f"skipped {len(bad)} of {total} images that can't be read", file=sys.stderr)
    if len(bad) > 0.01 * total:
        few = f"{len(bad)} of {total} images can't be read, more than 1 %"
        raise DataError(f"{files.path}: {few}. First: {bad[0]}.")
    return good


def split_off(names):
    """A tenth of the images, at most 10,000, chosen by their names, is held out of training.
    -> those that are, those that are trained on"""

    def key(name):
        return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()

    order = sorted(names, key=key)
    cut = min(10_000, max(1, len(order) // 10))
    return order[:cut], order[cut:] if len(order) > 1 else order


def read_folder(path, sizes):
    """The images of a folder or a zip, each cropped to that of `sizes` of the nearest aspect.

    -> [(train, held out)] of each size, where a part is (images (n, 3, H, W) uint8, rows of the
    captions (n,)); what is in it, with a digest of names, captions and files; captions, attributes,
    labels"""
    files = Files(path)
    caption_of, classes = find_captions(files)
    pixels = decode_all(files, sorted(caption_of), sizes, [], len(caption_of))
    shapes = Counter(x.shape for x in pixels.values())
    alone = [name for name, x in pixels.items() if shapes[x.shape] == 1]
    if 0 < len(alone) < len(pixels):
        number = plural(len(alone), "image")
        print(f"left out {number}, each alone in its size: {some(alone)}", file=sys.stderr)
        pixels = {name: x for name, x in pixels.items() if name not in alone}
    counts = Counter(caption_of[name] for name in pixels)
    captions = sorted(counts)
    rows = {caption: i for i, caption in enumerate(captions)}
    content = repr([(name, caption_of[name], files.sums[name]) for name in sorted(pixels)])
    if not classes and all(f"/{caption_of[n]}/" in "/" + n.replace("_", " ") for n in pixels):
        content += " as they are"  # of class folders with these names, captions are sentences
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    content = f"{len(pixels)} images, {len(captions)} captions, digest {digest}"

    def part(names):
        images = torch.from_numpy(np.stack([pixels[name] for name in names]))
        return images, torch.tensor([rows[caption_of[name]] for name in names])

    sets = []
    for shape in sorted({x.shape for x in pixels.values()}):  # each holds out its own tenth
        held_out, train = split_off([name for name in pixels if pixels[name].shape == shape])
        sets.append((part(train), part(held_out)))
    if classes:
        return sets, content, *class_attributes(captions)
    return sets, content, captions, *word_attributes(captions, [counts[c] for c in captions])
