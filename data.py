"""The data: images, captions, text features.

A data set is anything with these four things; `load` makes one from a name or a path:

    captions    list of str                 every distinct caption, in a fixed order
    attributes  {name: [value, ...]}        what a caption says, as questions with few answers
    labels      (len(captions), A) int64    the answers, one column per attribute
    batch(index, held_out=False)            index (B,) of int -> images (B, 3, H, W) uint8,
                                            caption (B,) int64: a row of `captions`

Images of several aspect ratios are one such set per shape, a bucket, with the same captions; all of
them together are a `Buckets`, and every batch comes from one of them.

The same index always gives the same image, whatever was drawn before: a run that is cut and
resumed, or split over several processes, sees the same data. Indices run on for ever; finite sets
are passed over again in a new order (and mirrored at random). Held-out images are never trained on.

Text features need no download: every word is a frozen random vector, hashed from the word itself.
The interface is that of real text encoders: captions -> context (B, M, D_c), pooled (B, D_p), and
the empty caption is the unconditional one. Real encoders' features are computed once, into shards:

    python data.py encode --model SD3_DIR --prompts prompts.txt --out shards/
    python data.py encode --model SD3_DIR --images PATH --out shards/        latents as well
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import posixpath
import re
import stat
import sys
import tarfile
import threading
import urllib.request
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what a picture may be, whatever its name says

# What a file from a stranger may cost.
MOST_BYTES = 1 << 26  # of one file, unpacked, or of a zip's list of names: half a million
MOST_PIXELS = 1 << 26  # of one picture: 8192 × 8192
MOST_CAPTION = 1 << 17  # characters
MOST_PROMPTS = 1 << 27  # bytes of a file of prompts: a million
warnings.filterwarnings("ignore", module="PIL")  # odd metadata; what can't be read raises


class DataError(Exception):
    """Something is wrong with the user's data; the message says what, where and what to do."""


# Training reads images from index 0 on; what must not meet the same images has its own stretch.
SYNTHETIC_INDEX = 1 << 35  # captions of the synthetic set
JUDGE_INDEX = 1 << 36  # images that the judge learns from


def clean(text, most=MOST_CAPTION):
    """A stranger's text, fit for files and terminals: one line, no control characters, cut."""
    text = str(text)[:most].encode("utf-8", "replace").decode()  # "?" for halves of characters
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text).strip()


def read_object(path):
    """The JSON object of a file of a run folder, as a dict; DataError names a damaged one."""
    try:
        value = json.loads(Path(path).read_bytes()) if Path(path).is_file() else None
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: restore it, or choose another folder.")
    return value


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the name `path` once the block has ended well, and not before:
    a cut, an error or a full disk leave the old file, or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the new name, too, outlives a loss of power
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a full disk
            error.filename = str(path)
        raise


def hash_uniform(seed, index, slots):
    """index (B,) -> (B, slots) in [0, 1), uniform, from (seed, index, slot) and nothing else."""
    with np.errstate(over="ignore"):
        x = np.asarray(index, np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
        x = x + np.uint64(seed % (1 << 32)) * np.uint64(0xD1B54A32D192ED03)
        x = x + np.arange(1, slots + 1, dtype=np.uint64) * np.uint64(0x8CB92BA72F3D8DD7)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's finaliser
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) / float(1 << 53)


def to_float(images):
    """uint8 pixels 0…255 -> float32 in [-1, 1], the x_0 of a network that works on pixels.
    Latents, which are no integers, are x_0 as they are."""
    return images.float() if images.is_floating_point() else images.float() / 127.5 - 1


def to_uint8(x0):
    """[-1, 1] -> uint8, rounded; values outside are clipped."""
    return ((x0.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------
# Buckets: one shape each, all of the same area
# ---------------------------------------------------------------------------------------------


def bucket_sizes(side, multiple, aspects):
    """Aspect ratios "width:height" -> their (H, W) with H·W ≈ side², both multiples of `multiple`.

    The square one is side × side; ratios that come out the same are given once."""
    sizes = []
    for aspect in aspects:
        width, height = (int(part) for part in aspect.split(":"))
        ratio = max(width, height) / min(width, height)
        long = max(1, round(side * math.sqrt(ratio) / multiple)) * multiple
        short = max(1, round(side * side / long / multiple)) * multiple
        square = (side, side) if width == height else None
        sizes.append(square or ((short, long) if width > height else (long, short)))
    return list(dict.fromkeys(sizes))


def nearest(sizes, height, width):
    """The one of `sizes` whose aspect ratio is nearest to that of height × width."""
    ratio = lambda h, w: math.log(w / h)  # noqa: E731
    return min(sizes, key=lambda size: abs(ratio(*size) - ratio(height, width)))


class Buckets:
    """Data sets of one shape each that share captions, attributes and labels."""

    def __init__(self, sets):
        self.sets = sets
        self.name, self.captions = sets[0].name, sets[0].captions
        self.attributes, self.labels = sets[0].attributes, sets[0].labels


def buckets_of(dataset):
    """The sets of one shape that a data set consists of: itself, or its buckets."""
    return getattr(dataset, "sets", [dataset])


def share_ends(sets, total):
    """Where each set's share of `total` ends, in proportion to its images (endless: equally)."""
    ends = np.cumsum([s.train_size or 1 for s in sets])
    return ends * (total / ends[-1])


def shares(dataset, count):
    """[(bucket, how many of `count` things are its)], in proportion; without buckets of none."""
    sets = buckets_of(dataset)
    each = np.diff(share_ends(sets, count).round().astype(int), prepend=0).tolist()
    return [(bucket, n) for bucket, n in zip(sets, each, strict=True) if n]


def draw_bucket(dataset, seed, stage, step):
    """The bucket of one batch, drawn in proportion from (seed, stage number, step) alone: the same
    on every rank and after every resume. On average each image is then shown equally often."""
    sets = buckets_of(dataset)
    u = hash_uniform(seed, [step], 17 + stage)[0, -1]  # the slots before are others'
    return sets[int(np.searchsorted(share_ends(sets, 1), u, side="right"))]


# ---------------------------------------------------------------------------------------------
# Text features
# ---------------------------------------------------------------------------------------------


def split_words(caption):
    return re.findall(r"\w+", caption.lower())


class HashedText:
    """Captions to text features by frozen random vectors per word, and sinusoids for word order."""

    def __init__(self, dim, length):
        self.dim, self.length = dim, length  # D_c = D_p, and M
        self.rows = {}  # word -> row of the table; row 0 is "no word"
        self.table = torch.zeros(1, dim)
        angle = torch.arange(length)[:, None] * 1000.0 ** -(torch.arange(dim // 2) / (dim // 2))
        self.positions = torch.cat([angle.sin(), angle.cos()], dim=1)  # (M, D_c)

    def word_vector(self, word):
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        generator = np.random.Generator(np.random.Philox(int.from_bytes(digest, "little")))
        return torch.from_numpy(generator.standard_normal(self.dim, dtype=np.float32))

    def ids(self, captions):
        """captions -> (B, M) int64 rows of the table, cut or padded with 0 to M words."""
        out = np.zeros((len(captions), self.length), np.int64)
        new = []
        for i, caption in enumerate(captions):
            for j, word in enumerate(split_words(caption)[: self.length]):
                if word not in self.rows:
                    self.rows[word] = len(self.rows) + 1
                    new.append(self.word_vector(word))
                out[i, j] = self.rows[word]
        if new:
            self.table = torch.cat([self.table, torch.stack(new).to(self.table.device)])
        return torch.from_numpy(out)

    def to(self, device):
        self.table, self.positions = self.table.to(device), self.positions.to(device)
        return self

    def features(self, ids):
        """ids (B, M) -> context (B, M, D_c), pooled (B, D_p). Rows of 0 (no words) give zeros."""
        words = self.table[ids]  # (B, M, D_c)
        present = (ids > 0)[..., None]  # (B, M, 1)
        context = (words + self.positions) * present
        pooled = words.sum(dim=1) / present.sum(dim=1).clamp(min=1) ** 0.5
        return context, pooled

    def __call__(self, captions):
        return self.features(self.ids(captions).to(self.table.device))


# ---------------------------------------------------------------------------------------------
# Shapes: an endless captioned set, drawn exactly
# ---------------------------------------------------------------------------------------------

COLOURS = {
    "red": (222, 44, 44),
    "green": (44, 160, 64),
    "blue": (40, 84, 224),
    "yellow": (248, 228, 60),
    "purple": (142, 52, 176),
    "orange": (246, 140, 28),
    "white": (246, 246, 246),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
PAIR_SIDE = 32  # from this many pixels on, half of the images hold two objects
HELD_OUT = 1 << 40  # indices from here on are never trained on


class Shapes:
    """Coloured shapes whose captions are exact, so that alignment can be measured without CLIP.

    "a SIZE COLOUR SHAPE on a COLOUR background"; from 32 pixels on also
    "a SIZE COLOUR SHAPE RELATION a SIZE COLOUR SHAPE on a COLOUR background"."""

    name = "shapes"
    train_size = None  # endless

    def __init__(self, height, width, seed=0, pairs=None):
        self.height, self.width, self.seed = height, width, seed
        self.size = (height, width)
        self.palette = np.array(list(COLOURS.values()), np.float32)
        colours = list(COLOURS)
        one = {"size": SIZES, "colour": colours, "shape": SHAPES}
        self.attributes = {**one, "background": colours}
        one_object = np.indices((2, 8, 4, 8)).reshape(4, -1).T  # every combination of values
        labels = one_object[one_object[:, 1] != one_object[:, 3]]
        if min(height, width) >= PAIR_SIDE if pairs is None else pairs:
            # A relation and the second object's attributes; answer "none" where there is no second.
            self.attributes["relation"] = ("none", *RELATIONS)
            self.attributes |= {f"second {k}": ("none", *v) for k, v in one.items()}
            two = np.indices((2, 8, 4, 8, 4, 2, 8, 4), dtype=np.int64).reshape(8, -1).T
            two = two[(two[:, 1] != two[:, 3]) & (two[:, 6] != two[:, 3])]
            two[:, 4:] += 1  # 0 is "none"
            labels = np.concatenate([np.pad(labels, ((0, 0), (0, 4))), two])
        self.labels = torch.from_numpy(labels)
        self.captions = [self.caption(row) for row in labels.tolist()]
        self.rows = np.full([len(v) for v in self.attributes.values()], -1, np.int64)
        self.rows[tuple(labels.T)] = np.arange(len(labels))  # attribute values -> caption

    def caption(self, row):
        words = [list(v)[i] for v, i in zip(self.attributes.values(), row, strict=True)]
        second = f"{words[4]} a {' '.join(words[5:])} " if len(words) > 4 and row[4] else ""
        return f"a {' '.join(words[:3])} {second}on a {words[3]} background"

    def batch(self, index, held_out=False):
        index = np.asarray(index, np.int64) + (HELD_OUT if held_out else 0)
        u = hash_uniform(0 if held_out else self.seed, index, 16)  # all seeds are scored alike
        pick = lambda slot, n: (u[:, slot] * n).astype(np.int64)  # noqa: E731
        size, colour, shape = pick(0, 2), pick(1, 8), pick(2, 4)
        background = (colour + 1 + pick(3, 7)) % 8
        columns = [size, colour, shape, background]
        cover = self.object_cover(size, shape, u[:, 4:7], None)
        canvas = self.palette[background][:, None, None]  # (B, 1, 1, 3)
        if "relation" in self.attributes:
            relation = np.where(u[:, 7] < 0.5, 1 + pick(8, 4), 0)
            two = relation > 0
            size2, shape2 = pick(9, 2), pick(11, 4)
            colour2 = (background + 1 + pick(10, 7)) % 8
            columns += [relation, *((c + 1) * two for c in (size2, colour2, shape2))]
            first = self.object_cover(size, shape, u[:, 4:7], relation - 1)
            cover = np.where(two[:, None, None, None], first, cover)
            opposite = np.array([1, 0, 3, 2])[relation - 1]  # where the second object stands
            second = self.object_cover(size2, shape2, u[:, 12:15], opposite)
            second = second * two[:, None, None, None]
            canvas = canvas * (1 - second) + self.palette[colour2][:, None, None] * second
        image = canvas * (1 - cover) + self.palette[colour][:, None, None] * cover  # (B, H, W, 3)
        image = torch.from_numpy((image + 0.5).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
        return image, torch.from_numpy(self.rows[tuple(columns)])

    def object_cover(self, size, shape, u, half):
        """Share of every pixel that the object covers, (B, H, W, 1).

        u (B, 3) places it: exact size, x, y. `half`, a row of RELATIONS, keeps it in that half of
        the image and makes it smaller; None leaves it the whole image."""
        side = min(self.height, self.width)
        low, high = np.where(size, 0.37, 0.26), np.where(size, 0.44, 0.30)  # half of its extent
        r = (low + (high - low) * u[:, 0]) * side * (1.0 if half is None else 0.55)
        left, right = np.zeros_like(r), np.full_like(r, self.width)
        top, bottom = np.zeros_like(r), np.full_like(r, self.height)
        if half is not None:
            left = np.where(half == 1, self.width / 2, left)
            right = np.where(half == 0, self.width / 2, right)
            top = np.where(half == 3, self.height / 2, top)
            bottom = np.where(half == 2, self.height / 2, bottom)
        cx = left + r + (right - left - 2 * r) * u[:, 1]
        cy = top + r + (bottom - top - 2 * r) * u[:, 2]
        r, cx, cy = (a.astype(np.float32)[:, None, None] for a in (r, cx, cy))
        dx = np.arange(self.width, dtype=np.float32)[None, None, :] + 0.5 - cx
        dy = np.arange(self.height, dtype=np.float32)[None, :, None] + 0.5 - cy
        distance = signed_distance(dx, dy, r, shape[:, None, None])
        return np.clip(0.5 - distance, 0, 1)[..., None]


def signed_distance(dx, dy, r, shape):
    """Pixels to the edge of the shape around (0, 0) that reaches to r; negative inside."""
    ax, ay = np.abs(dx), np.abs(dy)
    circle = np.sqrt(dx * dx + dy * dy) - r
    square = np.maximum(ax, ay) - 0.87 * r
    triangle = np.maximum((ax - 0.5 * (dy + 0.95 * r)) / 1.25**0.5, dy - 0.9 * r)  # apex up
    cross = np.minimum(np.maximum(ax - r, ay - 0.34 * r), np.maximum(ay - r, ax - 0.34 * r))
    return np.select([shape == 0, shape == 1, shape == 2], [circle, square, triangle], cross)


# ---------------------------------------------------------------------------------------------
# Images in memory
# ---------------------------------------------------------------------------------------------


class Joined:
    """Tensors of samples of one shape one after the other, as one tensor (n, …). Nothing is copied
    before rows are asked for: what is memory-mapped stays on disk."""

    def __init__(self, tensors):
        self.tensors, self.ends = tensors, np.cumsum([len(t) for t in tensors])
        self.shape = (int(self.ends[-1]), *tensors[0].shape[1:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        which = np.searchsorted(self.ends, rows, side="right").tolist()
        behind = (np.asarray(rows) - self.ends[which]).tolist()  # counted from its tensor's end
        return torch.stack([self.tensors[i][k] for i, k in zip(which, behind, strict=True)])


class ImageSet:
    """Decoded images in memory, each with a caption.

    images, held_out: (n, 3, H, W) uint8; caption, held_out_caption: (n,) rows of `captions`."""

    def __init__(
        self,
        name,
        train,
        held_out=(None, None),
        captions=(),
        attributes=None,
        labels=None,
        seed=0,
        flip=True,
    ):
        self.name, self.seed, self.flip = name, seed, flip
        self.images, self.caption = train
        self.held_out_images, self.held_out_caption = held_out
        self.captions, self.attributes, self.labels = captions, attributes, labels
        self.train_size, self.size = len(self.images), tuple(self.images.shape[2:])
        self.orders = {}  # epoch -> its order; the last few are kept

    def order(self, epoch):
        if epoch not in self.orders:
            if len(self.orders) == 3:
                del self.orders[next(iter(self.orders))]  # the oldest
            rng = np.random.default_rng([self.seed % (1 << 32), epoch])
            self.orders[epoch] = rng.permutation(self.train_size)
        return self.orders[epoch]

    def batch(self, index, held_out=False):
        index = np.asarray(index, np.int64)
        if held_out:
            rows = index % len(self.held_out_images)
            return self.held_out_images[rows], self.held_out_caption[rows]
        epoch, place = index // self.train_size, index % self.train_size
        rows = np.empty_like(place)
        for e in np.unique(epoch):
            rows[epoch == e] = self.order(int(e))[place[epoch == e]]
        images = self.images[rows]
        if self.flip:
            mirrored = torch.from_numpy(hash_uniform(self.seed, index, 1)[:, 0] < 0.5)
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images, self.caption[rows]


def class_attributes(names):
    """The captions, the single attribute and the labels of a set of classes."""
    captions = [f"a photo of a {name}" for name in names]
    return captions, {"class": tuple(names)}, torch.arange(len(names))[:, None]


def word_attributes(captions, counts, most=16):
    """Attributes of free captions: does it hold this word? For the words that divide the set best.

    counts: how many images have each caption. -> attributes, labels"""
    total, seen = sum(counts), Counter()
    bags = [set(split_words(c)) for c in captions]
    for bag, n in zip(bags, counts, strict=True):
        for word in bag:
            seen[word] += n
    useful = [w for w, n in seen.items() if 0.05 <= n / total <= 0.95 and len(w) > 2]
    useful = sorted(useful, key=lambda w: (abs(seen[w] / total - 0.5), w))[:most]
    attributes = {word: ("no", "yes") for word in useful}
    labels = [[int(word in bag) for word in useful] for bag in bags]
    return attributes, torch.tensor(labels, dtype=torch.int64).reshape(len(captions), len(useful))


# ---------------------------------------------------------------------------------------------
# Folders and zips
# ---------------------------------------------------------------------------------------------


MOST_PROFILE = 1 << 22  # bytes of a colour profile; those of printing presses have 2 MB
PROFILED = {"L": "RGB", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB"}  # mode -> what it becomes


@functools.lru_cache(8)  # the pictures of a set have few profiles, and this takes up to 0.1 s
def srgb_transform(profile, mode):
    from PIL import ImageCms  # only now: most pictures have no profile

    own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    flags = ImageCms.Flags.NOCACHE  # several threads use it
    return ImageCms.buildTransform(own, srgb, mode, PROFILED[mode], flags=flags)


def to_srgb(image):
    """A picture that brings a colour profile, in sRGB; as it is where that can't be applied."""
    profile = image.info.get("icc_profile") or b""
    if not 0 < len(profile) <= MOST_PROFILE:
        return image
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    try:
        return srgb_transform(profile, image.mode).apply(image)
    except Exception:  # damaged, for another mode than the picture's, or Pillow is without
        return image


def to_rgb(image):
    """Any picture as 8-bit sRGB: rotated as its EXIF says, its colour profile applied,
    transparency on white."""
    image = to_srgb(ImageOps.exif_transpose(image))
    if image.mode.startswith(("I", "F")):  # 16-bit grey; Pillow's own conversion would clip it
        grey = np.asarray(image, np.float64)
        scale = 1 if grey.max(initial=0) <= 255 and not image.mode.startswith("I;16") else 257
        return Image.fromarray((grey / scale).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


one_large = threading.Lock()  # pictures above 4 million pixels are decoded one after another


def decode(data, height, width):
    """The bytes of an image file -> (3, H, W) uint8, cropped at the centre and resized."""
    return decode_nearest(data, [(height, width)])


def decode_nearest(data, sizes):
    """The same to that (H, W) of `sizes` whose aspect ratio is nearest to the image's."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        pixels = image.width * image.height
        if pixels > MOST_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels, more than {MOST_PIXELS:,}")
        with one_large if pixels > 1 << 22 else contextlib.nullcontext():
            image = to_rgb(image)
            height, width = nearest(sizes, image.height, image.width)
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


class ZipBytes(io.FileIO):
    """A zip on disk, whose list of names is not read where it is too long to be honest."""

    def read(self, size=-1):
        if size > MOST_BYTES + 1:
            raise zipfile.BadZipFile("too many files; unpack it into a folder")
        return super().read(size)


def check_members(path, members):
    """Refuses a zip that would not unpack to what it shows, though nothing of it is unpacked."""
    seen = {}
    for member in members:
        name, kind = member.filename.replace("\\", "/"), stat.S_IFMT(member.external_attr >> 16)
        other, wrong = seen.setdefault(name.casefold(), member), None
        if not name:
            wrong = "one of its files has no name"
        elif re.match("/|[A-Za-z]:", name) or ".." in name.split("/"):
            wrong = "leads out of its folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            wrong = "is a link or a device"
        elif other is not member:
            wrong = "is there twice, perhaps in other case"
        if wrong:
            raise DataError(f"{path}: {member.filename} {wrong}. Make the zip anew without it.")


class Files:
    """The files of a folder or of a zip by their relative names; nothing is ever extracted."""

    def __init__(self, path):
        self.path, self.zip = Path(path), None
        if self.path.is_dir():
            found = (p for p in self.path.rglob("*") if p.is_file())
            self.names = sorted(p.relative_to(self.path).as_posix() for p in found)
        elif not self.path.is_file():
            raise DataError(f"{path}: neither a folder nor a file.")
        else:
            try:
                self.zip = zipfile.ZipFile(ZipBytes(self.path))
            except Exception as error:  # zipfile raises nearly anything on damaged files
                raise DataError(
                    f"{path}: not a readable zip ({error}). If it was cut short, copy it again."
                ) from None
            check_members(path, self.zip.infolist())
            self.names = sorted(i.filename for i in self.zip.infolist() if not i.is_dir())
        hidden = lambda n: any(s.startswith((".", "__MACOSX")) for s in n.split("/"))  # noqa: E731
        self.names = [n for n in self.names if not hidden(n)]

    def read(self, name):
        """The bytes of a file, unpacked no further than a picture or captions can need."""
        most = MOST_BYTES
        if self.zip is None:
            file = (self.path / name).open("rb")
        else:
            member = self.zip.getinfo(name)
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("packed by another method than deflate")
            most = min(most, (1 << 20) + 100 * member.compress_size)
            file = self.zip.open(member)
        with file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"more than {most:,} bytes unpacked")
        return content

    def text(self, name):
        try:
            return self.read(name).decode("utf-8-sig")
        except Exception as error:  # a damaged or encrypted member of a zip raises nearly anything
            raise DataError(f"{self.path}: {name} can't be read ({error}).") from None


def caption_file(files, name):
    """The captions of a captions.jsonl: {image name: caption}."""
    captions = {}
    for number, line in enumerate(io.StringIO(files.text(name)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file = posixpath.join(posixpath.dirname(name), row["file"])
            file, caption = posixpath.normpath(file), clean(row["caption"] + "")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DataError(
                f'{files.path}: {name} line {number} is not {{"file": "…", "caption": "…"}}.'
            ) from None
        if file in captions:
            raise DataError(f"{files.path}: {name} line {number} names {file} a second time.")
        captions[file] = caption
    missing = sorted(set(captions) - set(files.names))
    if missing:
        raise DataError(
            f"{files.path}: {name} names {len(missing)} missing files: {missing[0][:200]} …"
        )
    return captions


def find_captions(files):
    """-> {image name: caption}, and whether these are the names of class folders."""
    images = [n for n in files.names if n.lower().endswith(SUFFIXES)]
    if not images:
        raise DataError(
            f"{files.path}: no images in it. Expected files ending in {', '.join(SUFFIXES)}."
        )
    names, captions = set(files.names), {}
    lists = [n for n in files.names if posixpath.basename(n) == "captions.jsonl"]
    beside = {n: posixpath.splitext(n)[0] + ".txt" for n in images}
    if lists:
        for name in lists:
            more = caption_file(files, name)
            if twice := sorted(captions.keys() & more):
                raise DataError(f"{files.path}: {name} names {twice[0]}, as another list does.")
            captions |= more
    elif names.intersection(beside.values()):
        captions = {n: clean(files.text(t)) for n, t in beside.items() if t in names}
    elif all("/" in n for n in images):
        return {n: clean(n.split("/")[-2].replace("_", " ")) for n in images}, True
    else:
        raise DataError(
            f"{files.path}: images without captions. Put them into one folder per class, or add a "
            'captions.jsonl of {"file": "…", "caption": "…"} lines, or a .txt beside each image.'
        )
    if not captions:
        raise DataError(f"{files.path}: none of its images has a caption.")
    if without := len(set(images) - set(captions)):
        print(f"left out {without} of {len(images)} images: no caption", file=sys.stderr)
    return captions, False


def load_files(path, height, width, seed=0, sizes=None):
    """A folder or a zip of images with a captions.jsonl, or a .txt each, or in class folders.

    With several `sizes` every image goes to the bucket of the nearest aspect ratio."""
    files = Files(path)
    caption_of, classes = find_captions(files)
    pixels, kept = decode_all(files, sorted(caption_of), sizes or [(height, width)])
    texts = Counter(caption_of[n] for n in kept)
    captions = sorted(texts)
    row = {text: i for i, text in enumerate(captions)}
    caption = torch.tensor([row[caption_of[n]] for n in kept])
    if classes:
        captions, attributes, labels = class_attributes(captions)
    else:
        attributes, labels = word_attributes(captions, [texts[c] for c in captions])

    # A tenth of the images, at most 10,000, chosen by their names, is held out of training.
    names = [n.encode("utf-8", "surrogatepass") for n in kept]
    keys = [hashlib.blake2b(n, digest_size=8).digest() for n in names]
    order = sorted(range(len(kept)), key=keys.__getitem__)
    sets = []
    for shape in sorted({x.shape for x in pixels}):  # every bucket holds out its own tenth
        mine = [i for i in order if pixels[i].shape == shape]
        cut = min(10_000, max(1, len(mine) // 10))
        held, train = mine[:cut], mine[cut:] if len(mine) > 1 else mine
        part = lambda rows: (torch.from_numpy(np.stack([pixels[i] for i in rows])), caption[rows])  # noqa: E731
        sets.append(
            ImageSet(
                f"{Path(path).resolve()}",
                part(train),
                part(held),
                captions,
                attributes,
                labels,
                seed,
            )
        )
    return sets[0] if len(sets) == 1 else Buckets(sets)


def decode_all(files, names, sizes):
    """Every image as (3, H, W) uint8, and the names that could be read; bad ones are named."""

    def one(name):
        try:
            return decode_nearest(files.read(name), sizes)
        except Exception as error:  # Pillow and zipfile raise nearly anything on damaged files
            return clean(error) or type(error).__name__  # the error itself would keep the bytes

    quiet = len(names) < 2000 or None  # None: quiet where stderr is not a terminal
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = pool.map(one, names)
        done = list(tqdm(read, "reading images", len(names), disable=quiet, leave=False))
    bad = [(n, e) for n, e in zip(names, done, strict=True) if isinstance(e, str)]
    for name, error in bad[:10]:
        print(clean(f"skipped {files.path}: {name}: {error}", 1000), file=sys.stderr)
    if bad:
        print(f"skipped {len(bad)} of {len(names)} images that can't be read", file=sys.stderr)
    if len(bad) > 0.01 * len(names):
        raise DataError(
            f"{files.path}: {len(bad)} of {len(names)} images can't be read, more than 1 %. "
            f"First: {bad[0][0]}."
        )
    good = [(n, d) for n, d in zip(names, done, strict=True) if not isinstance(d, str)]
    return [d for _, d in good], [n for n, _ in good]


# ---------------------------------------------------------------------------------------------
# CIFAR-10, the official archive
# ---------------------------------------------------------------------------------------------

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_SIZE = 170_498_071
CIFAR_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR_CLASSES = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip


class ArrayUnpickler(pickle._Unpickler):
    """Reads pickles of plain containers and NumPy arrays, and nothing else.

    Made from pickle's reader in Python: the one in C reserves what a damaged file asks for."""

    ALLOWED = frozenset({("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")})

    def find_class(self, module, name):
        if (module.rpartition(".")[2], name) in self.ALLOWED and module.startswith("numpy"):
            if name == "_reconstruct":
                return np._core.multiarray._reconstruct
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in old protocols
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"a pickle that asks for {module}.{name}")


def download(url, path, size):
    """Fetches url to path with a progress bar; a part from an earlier try is continued."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    have = have if have < size else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        if answer.status != 206:  # the server starts from the beginning
            have = 0
        bar = tqdm(None, path.name, size, initial=have, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if have else "wb") as out:
            while out.tell() <= size and (chunk := answer.read(1 << 16)):
                out.write(chunk)
                bar.update(len(chunk))
    if (have := part.stat().st_size) != size:
        raise OSError(f"{url} gave {have:,} of {size:,} bytes; try again to continue")
    os.replace(part, path)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cifar_batches(data_dir):
    """The six batch files of CIFAR-10, {name: bytes}, from the archive, a folder or the network."""
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    folder, archive = data_dir / "cifar-10-batches-py", data_dir / "cifar-10-python.tar.gz"
    if folder.is_dir() and not archive.exists():
        return {name: (folder / name).read_bytes() for name in names}
    if fetch := not archive.exists():
        download(CIFAR_URL, archive, CIFAR_SIZE)
    if (found := sha256(archive)) != CIFAR_SHA256:
        if fetch:
            archive.unlink()
        raise DataError(
            f"{archive}: not the official CIFAR-10 archive (SHA-256 {found[:16]}…, expected "
            f"{CIFAR_SHA256[:16]}…). {'It was deleted: try' if fetch else 'Delete it to fetch it'} "
            "again."
        )
    batches = {}
    with tarfile.open(archive) as tar:
        for name in names:
            member = tar.getmember(f"cifar-10-batches-py/{name}")
            if not member.isreg() or member.size > MOST_BYTES:
                raise DataError(f"{archive}: {name} is a link, a device, or too large.")
            batches[name] = tar.extractfile(member).read()
    return batches


def load_cifar10(data_dir, height, width, seed=0):
    """CIFAR-10's 50,000 training and 10,000 held-out photographs, "a photo of a {class}"."""
    data_dir = Path(data_dir)
    try:
        batches = cifar_batches(data_dir)
    except DataError:
        raise
    except Exception as error:  # a broken connection, a full disk, a damaged archive
        raise DataError(
            f"CIFAR-10 can't be had ({error}). Ways out: place cifar-10-python.tar.gz from "
            f"{CIFAR_URL} in {data_dir}/, point --data-dir at a folder that has it, use a folder "
            "or zip of images with --data PATH, or the built-in set with --data shapes."
        ) from None
    parts = {}
    for name, data in batches.items():
        try:
            batch = ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
            pixels = batch[b"data"].astype(np.uint8, casting="no").reshape(-1, 3, 32, 32)
            labels = np.fromiter(batch[b"labels"], np.int64)
            if len(labels) != len(pixels) or not set(labels) <= set(range(10)):
                raise ValueError("labels and images don't match")
            parts[name] = (torch.from_numpy(pixels), torch.from_numpy(labels))
        except Exception as error:
            raise DataError(f"{data_dir}: {name} is not a batch of CIFAR-10 ({error}).") from None
    test = parts.pop("test_batch")
    train = tuple(torch.cat(column) for column in zip(*parts.values(), strict=True))
    if (height, width) != (32, 32):
        train, test = ((resize(x, height, width), y) for x, y in (train, test))
    return ImageSet("cifar10", train, test, *class_attributes(CIFAR_CLASSES), seed)


def resize(images, height, width):
    """(n, 3, H, W) uint8 -> the same cropped at the centre and resized."""
    pictures = (Image.fromarray(x) for x in images.permute(0, 2, 3, 1).numpy())
    fitted = [ImageOps.fit(p, (width, height), Image.Resampling.BICUBIC) for p in pictures]
    return torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).contiguous()


# ---------------------------------------------------------------------------------------------
# Shards: the features and latents of SD3's frozen encoders, computed once
# ---------------------------------------------------------------------------------------------

TOKENS = 77  # of CLIP, and as many of T5 after them
SD3_PARTS = dict(
    tokenizer="CLIPTokenizer",
    tokenizer_2="CLIPTokenizer",
    tokenizer_3="T5TokenizerFast",
    text_encoder="CLIPTextModelWithProjection",
    text_encoder_2="CLIPTextModelWithProjection",
    text_encoder_3="T5EncoderModel",
    vae="AutoencoderKL",
)
NEEDS = "SD3's encoders and shards need: pip install diffusers transformers safetensors"


class Encoders:
    """The text encoders and the VAE of a local SD3 folder in diffusers' layout; no network.

    Each is loaded when first asked for and on the device only while it works. In float32; T5, with
    4.7 G parameters, in bf16 on a GPU. Without T5 its tokens are zeros, as SD3 allows."""

    def __init__(self, folder, device="cpu", t5=True, vae=False):
        self.folder, self.device, self.t5 = Path(folder), torch.device(device), t5
        self.loaded, self.known = {}, {}
        wanted = dict(tokenizer_3=t5, text_encoder_3=t5, vae=vae)
        self.parts = [part for part in SD3_PARTS if wanted.get(part, True)]
        if missing := [part for part in self.parts if not (self.folder / part).is_dir()]:
            raise DataError(
                f"{folder}: not a whole SD3 folder of diffusers' layout, it lacks "
                f"{', '.join(part + '/' for part in missing)}."
            )

    def identity(self):
        """A hash of the names and sizes of the encoders' files."""
        files = [f for part in self.parts for f in (self.folder / part).iterdir() if f.is_file()]
        sizes = sorted((f.relative_to(self.folder).as_posix(), f.stat().st_size) for f in files)
        return hashlib.sha256(repr(sizes).encode()).hexdigest()

    def part(self, name):
        """A tokenizer, an encoder or the VAE, on the CPU."""
        if name in self.loaded:
            return self.loaded[name]
        folder, options = self.folder / name, dict(local_files_only=True)
        try:
            library = importlib.import_module("diffusers" if name == "vae" else "transformers")
            library.utils.logging.disable_progress_bar()
            kind = getattr(library, SD3_PARTS[name])
            if name.startswith("tokenizer"):
                part = kind.from_pretrained(folder, **options)
            else:
                options |= dict(low_cpu_mem_usage=False) if name == "vae" else {}
                part, info = kind.from_pretrained(folder, **options, output_loading_info=True)
                if absent := sorted(info["missing_keys"]):
                    raise ValueError(f"{len(absent)} tensors are missing: {absent[0]} …")
                part.eval()
                if name != "vae":  # which is float32 from the start
                    half = name == "text_encoder_3" and self.device.type == "cuda"
                    part.to(torch.bfloat16 if half else torch.float32)
        except ImportError:
            raise DataError(NEEDS) from None
        except Exception as error:  # these libraries raise nearly anything on damaged folders
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{folder} can't be loaded: {reason}") from None
        self.loaded[name] = part
        return part

    @contextlib.contextmanager
    def at_work(self, name):
        model = self.part(name)
        yield model.to(self.device)
        model.to("cpu")

    @torch.no_grad()
    def read(self, n, captions, outputs):
        """outputs(answer) of text encoder n on the captions, 32 at a time; float32 on the CPU."""
        tokens = self.part("tokenizer" + n)(
            captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        with self.at_work("text_encoder" + n) as model:
            answers = (
                outputs(model(part.to(self.device), output_hidden_states=True))
                for part in tokens.split(32)
            )
            rows = [[x.float().cpu() for x in answer] for answer in answers]
        return [torch.cat(column) for column in zip(*rows, strict=True)]

    def text(self, captions):
        """captions -> context (n, 77 + 77, 4096), pooled (n, 768 + 1280), float32 on the CPU.

        As SD3 has it (arXiv 2403.03206, appendix B): the last hidden states but one of both CLIPs
        side by side, padded with zeros to T5's width, then T5's tokens; both CLIPs' pooled ones."""
        both = lambda answer: (answer.hidden_states[-2], answer.text_embeds)  # noqa: E731
        (l_states, l_pooled), (g_states, g_pooled) = (
            self.read(n, captions, both) for n in ("", "_2")
        )
        clip = torch.cat([l_states, g_states], dim=2)  # (n, 77, 768 + 1280)
        if self.t5:
            (t5,) = self.read("_3", captions, lambda answer: (answer.last_hidden_state,))
        else:
            t5 = torch.zeros(len(captions), TOKENS, self.t5_width())
        clip = torch.nn.functional.pad(clip, (0, t5.shape[2] - clip.shape[2]))
        return torch.cat([clip, t5], dim=1), torch.cat([l_pooled, g_pooled], dim=1)

    def t5_width(self):
        path = self.folder / "text_encoder_3" / "config.json"
        return json.loads(path.read_text(encoding="utf-8"))["d_model"] if path.exists() else 4096

    def learn(self, captions):
        """Encodes those captions that are new, and keeps their features on the CPU."""
        if new := [caption for caption in dict.fromkeys(captions) if caption not in self.known]:
            self.known |= zip(new, zip(*self.text(new), strict=True), strict=True)

    def __call__(self, captions):
        """captions -> context (B, M, D_c), pooled (B, D_p), float32 on the device."""
        self.learn(captions)
        columns = zip(*(self.known[caption] for caption in captions), strict=True)
        return tuple(torch.stack(column).to(self.device) for column in columns)

    def scale(self):
        """SD3's scale and shift of latents, or what the VAE says of itself."""
        config = self.part("vae").config
        if config.shift_factor is None:
            return 1.5305, 0.0609
        return config.scaling_factor, config.shift_factor

    def unit(self):
        """The side of a position of latents, pixels."""
        return 2 ** (len(self.part("vae").config.block_out_channels) - 1)

    @torch.no_grad()
    def latents(self, images):
        """images (n, 3, H, W) uint8 -> x_0 = (mean - shift)·scale (n, 16, H/8, W/8), on the CPU."""
        scale, shift = self.scale()
        with self.at_work("vae") as vae:
            parts = (to_float(part.to(self.device)) for part in images.split(4))
            means = [vae.encode(part).latent_dist.mean.cpu() for part in parts]
        return (torch.cat(means) - shift) * scale

    @torch.no_grad()
    def pixels(self, x0):
        """x_0 (n, 16, h, w) -> images (n, 3, 8·h, 8·w) uint8 on the CPU."""
        scale, shift = self.scale()
        with self.at_work("vae") as vae:
            parts = ((part.to(self.device) / scale + shift) for part in x0.split(4))
            return torch.cat([to_uint8(vae.decode(part).sample).cpu() for part in parts])


def read_prompts(path):
    """The distinct lines of a file that are not empty."""
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_PROMPTS + 1)
        if len(text) > MOST_PROMPTS:
            raise ValueError(f"more than {MOST_PROMPTS:,} bytes")
        lines = text.decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"--prompts {path}: can't be read ({error}).") from None
    prompts = list(dict.fromkeys(filter(None, map(clean, lines))))
    if not prompts:
        raise DataError(f"--prompts {path}: no prompt in it; one a line is expected.")
    return prompts


def by_bucket(files, sizes):
    """Images by the size of nearest aspect, from their headers: {(H, W): [(name, caption)]}."""
    caption_of, classes = find_captions(files)
    names = sorted(caption_of)

    def size(name):
        try:
            with (
                files.zip.open(name) if files.zip else open(files.path / name, "rb") as file,
                Image.open(file, formats=FORMATS) as image,
            ):
                turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation
                return nearest(sizes, *(image.size if turned else image.size[::-1]))
        except Exception:  # said when the image itself is read
            return sizes[0]

    groups = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, bucket in zip(names, pool.map(size, names), strict=True):
            caption = f"a photo of a {caption_of[name]}" if classes else caption_of[name]
            groups.setdefault(bucket, []).append((name, caption))
    return groups


def encode(encoders, out, *, prompts="", images="", sizes=(), shard=256, part=(0, 1)):
    """Writes the shards i of a prompts file or of images for which i mod world is this rank.

    sizes: the (H, W) in pixels of images; each is cropped to that of the nearest aspect ratio.
    NNNNNN.safetensors holds bf16 tensors of samples of one size: context, pooled, and of images
    latents. Beside it NNNNNN.json has its captions, its length in bytes and its SHA-256, and is
    written last: a shard with it is finished, and not made again. Shard 0 is the empty caption
    alone. shards.json says of what the folder is made. part: (rank, world)."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise DataError(NEEDS) from None
    files = Files(images) if images else None
    if files:
        groups = by_bucket(files, sizes)
    else:
        groups = {(0, 0): [("", prompt) for prompt in read_prompts(prompts)]}
    plan = [((0, 0), [("", "")])]
    for bucket, rows in sorted(groups.items()):
        plan += [(bucket, rows[i : i + shard]) for i in range(0, len(rows), shard)]
    source = hashlib.sha256(repr(plan).encode("utf-8", "surrogatepass")).hexdigest()
    made_of = dict(format=SHARDS, shards=len(plan), samples=sum(len(rows) for _, rows in plan))
    made_of |= dict(source=source, model=encoders.identity(), t5=encoders.t5)
    out, (rank, world) = Path(out), part
    claim(out, made_of, rank)

    bad = []
    for i, (bucket, rows) in tqdm(list(enumerate(plan))[rank::world], "shards", disable=None):
        path, pixels = out / f"{i:06d}.safetensors", None
        if path.exists() and path.stat().st_size == shard_note(path).get("bytes"):
            continue
        if bucket != (0, 0):
            rows, pixels = decode_rows(files, rows, bucket, bad)
            if len(bad) > 0.01 * made_of["samples"]:
                raise DataError(
                    f"{images}: {len(bad)} of {made_of['samples']} images can't be read, more "
                    f"than 1 %. First: {bad[0]}."
                )
        captions = [caption for _, caption in rows]
        tensors = features_of(encoders, captions, pixels) if rows else {}
        content = save(tensors)
        note = dict(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        note |= dict(latents=list(tensors["latents"].shape[1:]) if "latents" in tensors else None)
        with replacing(path) as file:
            file.write(content)
        with replacing(path.with_suffix(".json")) as file:
            file.write(json.dumps(note | dict(captions=captions)).encode())
    mine = len(range(rank, len(plan), world))
    print(f"{mine} of {len(plan)} shards: {out}" + f", by process {rank} of {world}" * (world > 1))


SHARDS = "ladd-shards-1"


def features_of(encoders, captions, pixels):
    """The bf16 tensors of a shard: context, pooled, and of pixels (n, 3, H, W) uint8 latents."""
    distinct = list(dict.fromkeys(captions))
    row = {caption: k for k, caption in enumerate(distinct)}
    where = [row[caption] for caption in captions]
    tensors = {
        k: x[where] for k, x in zip(("context", "pooled"), encoders.text(distinct), strict=True)
    }
    if pixels is not None:
        tensors["latents"] = encoders.latents(pixels)
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise DataError(f"{encoders.folder}: its {name} of {captions[0]!r} … are not finite.")
    return {name: x.bfloat16().contiguous() for name, x in tensors.items()}


def decode_rows(files, rows, size, bad):
    """-> those (name, caption) that can be read, pixels (n, 3, H, W); others go to `bad`."""

    def one(row):
        try:
            return decode(files.read(row[0]), *size)
        except Exception as error:  # Pillow and zipfile raise nearly anything on damaged files
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done = list(zip(rows, pool.map(one, rows), strict=True))
    for (name, _), error in done:
        if isinstance(error, Exception):
            print(clean(f"skipped {files.path}: {name}: {error}", 1000), file=sys.stderr)
            bad.append(name)
    good = [(row, x) for row, x in done if not isinstance(x, Exception)]
    return [row for row, _ in good], torch.from_numpy(np.array([x for _, x in good]))


def shard_note(path):
    """What stands in the JSON file beside a shard; nothing, if the shard was not finished."""
    path = path.with_suffix(".json")
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        with open(path, "rb") as file:
            return dict(json.loads(file.read(MOST_BYTES)))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise DataError(f"{path} can't be read ({error}).") from None


def is_whole(note):
    """Whether a shard's note says all that `encode` writes: bytes, hash, captions, (C, h, w)."""
    captions, latents = note.get("captions"), note.get("latents", 0)
    texts = isinstance(captions, list) and all(isinstance(c, str) for c in captions)
    whole = lambda v: type(v) is int and 0 < v < 1 << 20  # noqa: E731
    sizes = isinstance(latents, list) and len(latents) == 3 and all(map(whole, latents))
    return type(note.get("bytes")) is int and "sha256" in note and texts and (
        sizes or latents is None
    )  # fmt: skip


def claim(out, made_of, rank):
    """Signs the folder, if it is empty, or finds it made of the same."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out}: is a file; choose another name.")
    out.mkdir(parents=True, exist_ok=True)
    signing = re.compile(r"\..*\.tmp|shards\.\d+\.json")  # by processes that started with this one
    strangers = [path.name for path in out.iterdir() if not signing.fullmatch(path.name)]
    signed = shard_note(out / "shards")
    if strangers and not signed:
        raise DataError(f"--out {out}: has {strangers[0]} and is no shard folder; choose another.")
    if signed and (differing := [k for k in made_of if signed.get(k) != made_of[k]]):
        raise DataError(
            f"--out {out}: was made with another {', '.join(differing)}; choose "
            "another, or give the same prompts or images, model and options to go on."
        )
    own = out / f"shards.{rank}.json"
    with replacing(own) as file:
        file.write((json.dumps(made_of, indent=1) + "\n").encode())
    os.replace(own, out / "shards.json")


class ShardBucket(ImageSet):
    """Samples of one size from a shard folder. Nothing is held out."""

    def __init__(self, shards, size, samples, caption):
        rows = (torch.tensor(samples), caption[samples])
        captions, labels = shards.captions, shards.labels
        super().__init__(shards.name, rows, rows, captions, {}, labels, shards.seed, flip=False)
        self.shards, self.size = shards, size

    def batch(self, index, held_out=False):
        """index (B,) -> x_0 (B, C, h, w) float32, or None of prompts alone; caption (B,)"""
        index = np.asarray(index, np.int64) % SYNTHETIC_INDEX  # synthesis begins with a whole pass
        samples, caption = super().batch(index, held_out)
        latents = self.shards.channels and self.shards.read("latents", samples).cpu()
        return latents, caption


class Shards(Buckets):
    """A folder that `encode` wrote: data sets of one size each, and their text features.

    In place of HashedText: the id of a caption is its row of `captions`, and row 0 is the empty
    caption. Tensors stay on disk, memory-mapped, and are read sample by sample. Every file's size
    is checked at once; its SHA-256 too, or in large folders (4 GB) when it is first opened.

    sizes: those of the samples to be made where there are prompts alone, (H, W) of x_0; each prompt
    belongs to one of them."""

    attributes, device = {}, torch.device("cpu")

    def __init__(self, path, sizes, seed=0):
        self.name, self.path, self.seed = f"{Path(path).resolve()}", Path(path), seed
        index = shard_note(self.path / "shards")
        if index.get("format") != SHARDS or type(index.get("shards")) is not int:
            raise DataError(f"{path}: its shards.json is not that of a shard folder.")
        self.files, self.notes = [], []
        for i in range(index["shards"]):
            file = self.path / f"{i:06d}.safetensors"
            if not is_whole(note := shard_note(file)) or not file.is_file():
                raise DataError(f"{path}: {file.name} is missing; run the same encode again.")
            if (found := file.stat().st_size) != note["bytes"]:
                raise DataError(f"{file}: {found:,} of {note['bytes']:,} bytes; encode it again.")
            self.files.append(file)
            self.notes.append(note)
        kinds = {(note["latents"] or [None])[0] for note in self.notes[1:] if note["captions"]}
        if len(kinds) != 1 or not self.notes[0]["captions"]:
            raise DataError(f"{path}: its shards have no samples, or of several kinds.")

        captions = [caption for note in self.notes for caption in note["captions"]]
        first = {}  # caption -> its first sample
        for sample, caption in enumerate(captions):
            first.setdefault(caption, sample)
        self.captions, self.first = list(first), torch.tensor(list(first.values()))
        self.rows = {caption: row for row, caption in enumerate(self.captions)}
        self.labels = torch.zeros(len(self.captions), 0, dtype=torch.int64)
        self.counts = counts = [len(note.pop("captions")) for note in self.notes]
        file = np.repeat(np.arange(len(counts)), counts)
        starts = np.cumsum([0, *counts])
        self.place = np.stack([file, np.arange(len(file)) - starts[file]], axis=1)
        caption = torch.tensor([self.rows[c] for c in captions])

        self.channels, members = None, {}  # (h, w) of latents -> their samples
        for i, note in enumerate(self.notes[1:], 1):
            if counts[i]:  # 0: none of its images could be read
                self.channels, *size = note["latents"] or (None, 0, 0)
                members.setdefault(tuple(size), []).extend(range(starts[i], starts[i + 1]))
        if prompts := members.pop((0, 0), []):
            members = {size: prompts[i :: len(sizes)] for i, size in enumerate(sizes)}
        self.sets = [
            ShardBucket(self, size, samples, caption)
            for size, samples in sorted(members.items())
            if samples
        ]
        self.opened = {}
        few = sum(note["bytes"] for note in self.notes) <= 4e9
        for i in range(len(self.files) if few else 1):
            self.open(i)
        context, pooled = self.features(torch.zeros(1, dtype=torch.int64))
        self.context_dim, self.pooled_dim = context.shape[2], pooled.shape[1]

    def expect(self, context_dim, pooled_dim, channels, patch=1):
        """Raises DataError where a network of these widths can't use the features."""
        for height, width in (bucket.size for bucket in self.sets):
            if height % patch or width % patch:
                raise DataError(f"{self.path}: {height}×{width} can't be cut into {patch}×{patch}.")
        for what, mine, wanted in (
            ("text features", self.context_dim, context_dim),
            ("pooled text features", self.pooled_dim, pooled_dim),
            ("latents", self.channels or channels, channels),
        ):
            if mine != wanted:
                raise DataError(f"{self.path}: {what} {mine} wide, but the network takes {wanted}.")

    def open(self, i):
        """File i, checked and memory-mapped."""
        if i not in self.opened:
            try:
                from safetensors import safe_open
            except ImportError:
                raise DataError(NEEDS) from None
            if (found := sha256(self.files[i])) != self.notes[i]["sha256"]:
                raise DataError(
                    f"{self.files[i]}: altered since it was made (SHA-256 {found[:16]}…, expected "
                    f"{self.notes[i]['sha256'][:16]}…); delete it and run the same encode again."
                )
            try:
                opened = safe_open(self.files[i], "pt")
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
                if i == 0:
                    self.widths = dict(context=shapes["context"][1:], pooled=shapes["pooled"][1:])
                latents = dict(latents=tuple(self.notes[i]["latents"] or ()))
                wanted = self.widths | (latents if latents["latents"] else {})
                wanted = {name: (self.counts[i], *shape) for name, shape in wanted.items()}
                if self.counts[i] and shapes != wanted:
                    raise ValueError(f"{shapes} in it, but {wanted} expected")
                if any(s.get_dtype() != "BF16" for s in slices.values()):
                    raise ValueError("not bfloat16")
            except Exception as error:  # safetensors' own, of a damaged header
                raise DataError(f"{self.files[i]}: not a shard ({error}).") from None
            self.opened[i] = opened
        return self.opened[i]

    def read(self, name, samples):
        """One tensor of samples (B,) -> (B, …) float32 on the device."""
        rows = [self.open(i).get_slice(name)[k] for i, k in self.place[samples.numpy()].tolist()]
        return torch.stack(rows).to(self.device).float()

    def ids(self, captions):
        """captions -> (B, 1) int64 rows of `captions`."""
        unknown = next((c for c in captions if c not in self.rows), None)
        if unknown is not None:
            raise DataError(f"{self.path}: holds no features of the caption {unknown!r}.")
        return torch.tensor([[self.rows[c]] for c in captions])

    def features(self, ids):
        """rows of `captions` -> context (B, M, D_c), pooled (B, D_p), float32 on the device."""
        samples = self.first[ids.flatten().cpu()]
        return self.read("context", samples), self.read("pooled", samples)

    def to(self, device):
        self.device = torch.device(device)
        return self

    def __call__(self, captions):
        return self.features(self.ids(captions))


def load(name, height, width, *, data_dir="data", seed=0, sizes=None):
    """The data set `shapes`, `cifar10`, or of a folder or zip of images, or a folder of shards.

    sizes: the (H, W) of several buckets, where height × width is their common area."""
    sizes = sizes or [(height, width)]
    if name == "shapes":
        pairs = min(height, width) >= PAIR_SIDE  # in all buckets or in none
        sets = [Shapes(h, w, seed, pairs) for h, w in sizes]
        return sets[0] if len(sets) == 1 else Buckets(sets)
    if name == "cifar10":  # its photographs are square
        return load_cifar10(data_dir, *nearest(sizes, 1, 1), seed)
    if not os.path.exists(name):
        raise DataError(f"--data {name}: no such folder or file, and not one of shapes, cifar10.")
    if os.path.exists(os.path.join(name, "shards.json")):
        return Shards(name, sizes, seed)
    return load_files(name, height, width, seed, sizes)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


ASPECTS = "1:1,5:4,4:5,3:2,2:3,16:9,9:16"


class Parser(argparse.ArgumentParser):
    """Errors in one line, status 2; --help shows the rest."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all options)\n")


def main(argv=None):
    parser = Parser(
        "data.py", allow_abbrev=False, description="Computes text features, and latents of images."
    )
    add, env = parser.add_argument, os.environ
    add("command", choices=["encode"])
    add("--model", required=True, metavar="SD3_DIR", help="a local SD3 folder, diffusers' layout")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", default="", metavar="FILE", help="one prompt a line")
    source.add_argument(
        "--images", default="", metavar="PATH", help="a folder or zip with captions"
    )
    add("--out", required=True, metavar="FOLDER", help="where shards are written, or gone on with")
    add("--size", type=int, default=1024, help="images get this area, ² pixels …")
    add("--multiple", type=int, default=64, help="… sides that are multiples of this, and …")
    add("--aspects", default=ASPECTS, metavar="W:H,…", help="… the nearest of these aspect ratios")
    add("--no-t5", action="store_true", help="zeros for T5's tokens")
    add("--shard", type=int, default=256, help="samples of a file; 1.8 MB each at 1024²")
    add("--rank", type=int, default=int(env.get("RANK", 0)), help="this process of …")
    add("--world", type=int, default=int(env.get("WORLD_SIZE", 1)), help="… so many that share")
    cuda = f"cuda:{env.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    add("--device", default=cuda)
    args = parser.parse_args(argv)
    if not 0 <= args.rank < args.world:
        parser.error(f"--rank {args.rank}: must be from 0 to below --world {args.world}")
    if args.shard < 1 or args.multiple < 8 or args.multiple % 8 or args.size < args.multiple:
        parser.error("--shard: at least 1; --multiple: a multiple of 8; --size: at least that")
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*(,[1-9]\d*:[1-9]\d*)*", args.aspects):
        parser.error(f"--aspects {args.aspects}: must look like 1:1,3:2,2:3")
    sizes = bucket_sizes(args.size, args.multiple, args.aspects.split(","))
    try:
        encoders = Encoders(args.model, args.device, not args.no_t5, vae=bool(args.images))
        encode(
            encoders, args.out, prompts=args.prompts, images=args.images, sizes=sizes,
            shard=args.shard, part=(args.rank, args.world),
        )  # fmt: skip
    except DataError as error:
        print(f"data.py: {clean(error, 4000)}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        kept = f"what is finished in {args.out} is kept, the same command goes on"
        print(f"data.py: {clean(reason, 1000)}; {kept}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
