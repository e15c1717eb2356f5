"""The data: captioned images as data sets, and text features.

`load` makes a data set from a name or a path; a new kind is one class, see `DataSet`. Images of
several aspect ratios are one such set per size, a bucket, with the same captions; all of them
together are `Buckets`, and every batch comes from one of them.

The same index always gives the same image, whatever was drawn before: a run that is cut and
resumed, or split over several processes, sees the same data. Indices run on for ever; finite sets
are passed over again in a new order (and mirrored at random). Held-out images are never trained on.

Text features need no download: every word is a frozen random vector, hashed from the word itself.
The interface is that of real text encoders: captions -> context (B, M, D_c), pooled (B, D_p), and
the empty caption is the unconditional one. Real encoders' features, computed once into shards by
sd3/encode.py, are a data set, too.
"""

import copy
import functools
import hashlib
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lib.captions import split_words
from lib.errors import DataError
from lib.machine import moved
from lib.shapes import object_cover, pattern_cover
from lib.streams import rng, uniform

# Training reads images from index 0 on. Others start far from there: in endless sets they never
# meet an image that is trained on.
SYNTHETIC_INDEX = 1 << 35  # captions of the synthetic set
JUDGE_INDEX = 1 << 36  # images that the judge, who scores (lib/scores.py), learns from
RESIDENT = 1 << 30  # bytes of images that are kept on the device: CIFAR-10 has 150 MB


def to_float(images):
    """uint8 pixels 0…255 -> float32 in [-1, 1], the x_0 of a network that works on pixels.
    Latents, which are no integers, are x_0 as they are."""
    return images.float() if images.is_floating_point() else images.float() / 127.5 - 1


def to_uint8(x0):
    """[-1, 1] -> uint8, rounded; values outside are clipped."""
    return ((x0.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_picture(x0):
    """What a person is shown of x_0. (n, C, H, W) -> (n, 3, H, W) uint8"""
    return to_uint8(x0)


class DataSet:
    """What a data set says of itself, and gives.

    name: the same for the same images and captions, wherever they lie; a run is bound to it.
    captions: every distinct caption, in a fixed order. attributes {name: [value, …]}: what a
    caption says, as questions with few answers. labels (len(captions), A) int64: the answers,
    by which alignment is scored. seed: of what is drawn for training, which `judge_batches` sets
    to 0; held-out images ignore it."""

    name = ""
    channels = 3  # of x_0
    size = (0, 0)  # (H, W) of x_0
    train_size = None  # images that are trained on; None: endless
    held_out_size = None  # images that never are; None: endless
    captions, attributes = (), {}

    @functools.cached_property  # a set with attributes assigns it
    def labels(self):
        return torch.empty(len(self.captions), 0, dtype=torch.int64)

    @property
    def sets(self):
        """The sets of one size that it consists of."""
        return [self]

    def batch(self, index, held_out=False):
        """index (B,) of int -> images (B, C, H, W), pixels as uint8 or x_0 as floats (latents, and
        the teacher's samples); caption (B,) int64, rows of `captions`."""
        raise NotImplementedError

    def told(self, text, index):
        """What the network is told of images: their text features. Inpainting and editing add a
        picture, the condition."""
        return text

    def to(self, device):
        """Where the images are in memory, keeps them on the device; batches then come from it."""
        return self


# ---------------------------------------------------------------------------------------------
# Buckets: one size each, all of the same area
# ---------------------------------------------------------------------------------------------


def bucket_sizes(size, multiple, aspects):
    """Aspect ratios "width:height" -> their (H, W) of the area of `size`, multiples of `multiple`.

    The ratio of `size` is `size` itself; ratios that come out the same are given once."""
    height, width = size
    sizes = []
    for aspect in aspects:
        across, down = (int(part) for part in aspect.split(":"))
        ratio = max(across, down) / min(across, down)
        long = max(1, round(math.sqrt(height * width) * math.sqrt(ratio) / multiple)) * multiple
        short = max(1, round(height * width / long / multiple)) * multiple
        if across * height == down * width:
            sizes.append(size)
        else:
            sizes.append((short, long) if across > down else (long, short))
    return list(dict.fromkeys(sizes))


class Buckets:
    """Data sets of one size each that are alike in all else."""

    def __init__(self, sets):
        self.sets = sets
        self.name, self.channels, self.captions = sets[0].name, sets[0].channels, sets[0].captions
        self.attributes, self.labels = sets[0].attributes, sets[0].labels

    def to(self, device):
        for bucket in self.sets:
            bucket.to(device)
        return self


def one_or_buckets(sets):
    return sets[0] if len(sets) == 1 else Buckets(sets)


def share_ends(sets, total):
    """Where each set's share of `total` ends, in proportion to its images (endless: equally)."""
    ends = np.cumsum([each.train_size or 1 for each in sets])
    return ends * (total / ends[-1])


def shares(dataset, count):
    """[(bucket, how many of `count` things are its)], in proportion; without buckets of none."""
    each = np.diff(share_ends(dataset.sets, count).round().astype(int), prepend=0).tolist()
    return [(bucket, n) for bucket, n in zip(dataset.sets, each, strict=True) if n]


def held_out_captions(dataset, count):
    """`count` captions of held-out images with their sizes -> [(captions, (H, W)), …]"""
    parts = []
    for bucket, n in shares(dataset, count):
        _, caption = bucket.batch(np.arange(n), held_out=True)
        parts.append(([bucket.captions[i] for i in caption], bucket.size))
    return parts


def draw_bucket(dataset, seed, stage, step):
    """The bucket of one batch, drawn in proportion from (seed, stage, step) alone: the same
    on every rank and after every resume. On average each image is then shown equally often."""
    u = uniform(seed, f"bucket, {stage}", [step], 1)[0, 0]
    return dataset.sets[int(np.searchsorted(share_ends(dataset.sets, 1), u, side="right"))]


# ---------------------------------------------------------------------------------------------
# Text features
# ---------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """The features of B captions."""

    context: torch.Tensor  # (B, M, D_c) c, one row a token
    pooled: torch.Tensor  # (B, D_p) y


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
        random = np.random.Generator(np.random.Philox(int.from_bytes(digest, "little")))
        return torch.from_numpy(random.standard_normal(self.dim, dtype=np.float32))

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
        ids = moved(ids, self.table.device)
        words = self.table[ids]  # (B, M, D_c)
        present = (ids > 0)[..., None]  # (B, M, 1)
        context = (words + self.positions) * present
        pooled = words.sum(dim=1) / present.sum(dim=1).clamp(min=1) ** 0.5
        return Text(context, pooled)

    def __call__(self, captions):
        return self.features(self.ids(captions))


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
SIZES = ("small", "large")  # lib/shapes.py draws them
PATTERNS = ("plain", "striped", "checked", "dotted")
RELATIONS = ("left of", "right of", "above", "below")
PAIR_SIDE = 32  # from this many pixels on, half of the images hold two objects


class Shapes(DataSet):
    """Coloured shapes whose captions are exact, so that alignment can be measured without CLIP.

    "a SIZE COLOUR SHAPE on a PATTERN COLOUR background"; from 32 pixels on also
    "a SIZE COLOUR SHAPE RELATION a SIZE COLOUR SHAPE on a PATTERN COLOUR background".

    A pattern lies anywhere and in any direction, and no caption says how: the mean of all its
    places is one flat colour, so a network that learns by mean errors alone blurs it."""

    name = "shapes 2"  # runs are bound to it: give another number where the drawing changes

    def __init__(self, height, width, seed=0, pairs=None):
        self.size, self.seed, self.stream = (height, width), seed, "shapes"
        self.palette = np.array(list(COLOURS.values()), np.float32)
        self.tones = self.palette / 2  # a pattern's second colour, for every first one
        self.tones[list(COLOURS).index("black")] = 120
        colours = list(COLOURS)
        one = {"size": SIZES, "colour": colours, "shape": SHAPES}
        self.attributes = {**one, "background": colours, "pattern": PATTERNS}
        one_object = np.indices((2, 8, 4, 8, 4)).reshape(5, -1).T  # every combination of values
        labels = one_object[one_object[:, 1] != one_object[:, 3]]
        if min(height, width) >= PAIR_SIDE if pairs is None else pairs:
            # A relation and the second object's attributes; answer "none" where there is no second.
            self.attributes["relation"] = ("none", *RELATIONS)
            self.attributes |= {f"second {k}": ("none", *v) for k, v in one.items()}
            two = np.indices((2, 8, 4, 8, 4, 4, 2, 8, 4), dtype=np.int64).reshape(9, -1).T
            two = two[(two[:, 1] != two[:, 3]) & (two[:, 7] != two[:, 3])]
            two[:, 5:] += 1  # what only two objects have; 0 is "none"
            labels = np.concatenate([np.pad(labels, ((0, 0), (0, 4))), two])
        self.labels = torch.from_numpy(labels)
        self.captions = [self.caption(row) for row in labels.tolist()]
        self.rows = np.full([len(v) for v in self.attributes.values()], -1, np.int64)
        self.rows[tuple(labels.T)] = np.arange(len(labels))  # attribute values -> caption

    def of_size(self, size):
        """The same captions in another size, with draws of their own."""
        other = copy.copy(self)
        other.size, other.stream = size, f"{self.stream}, {size[0]}×{size[1]}"
        return other

    def caption(self, row):
        words = [v[i] for v, i in zip(self.attributes.values(), row, strict=True)]
        second = f"{words[5]} a {' '.join(words[6:])} " if len(words) > 5 and row[5] else ""
        return f"a {' '.join(words[:3])} {second}on a {words[4]} {words[3]} background"

    def batch(self, index, held_out=False):
        u, values = self.choose(index, held_out)
        return self.draw(u, values), torch.from_numpy(self.rows[tuple(values)])

    def choose(self, index, held_out=False):
        """What is random of B images. -> u (B, 19) in [0, 1), the values of every attribute (B,)

        u: 0 to 3 size, colour, shape, background; 4 to 6 its place; 7 whether there are two; 8 the
        relation; 9 to 14 the second one's size, colour, shape, place; 15 to 18 the pattern."""
        index = np.asarray(index, np.int64)
        if held_out:  # all seeds are scored alike
            u = uniform(0, f"{self.stream}, held out", index, 19)
        else:
            u = uniform(self.seed, self.stream, index, 19)
        pick = lambda slot, n: (u[:, slot] * n).astype(np.int64)  # noqa: E731
        size, colour, shape = pick(0, 2), pick(1, 8), pick(2, 4)
        background, pattern = (colour + 1 + pick(3, 7)) % 8, pick(15, 4)
        values = [size, colour, shape, background, pattern]
        if "relation" in self.attributes:
            relation = np.where(u[:, 7] < 0.5, 1 + pick(8, 4), 0)
            colour2 = (background + 1 + pick(10, 7)) % 8
            second = (pick(9, 2), colour2, pick(11, 4))
            values += [relation, *((value + 1) * (relation > 0) for value in second)]
        return u, values

    def draw(self, u, values):
        """B images of what `choose` gives. -> (B, 3, H, W) uint8"""
        size, colour, shape, background, pattern, *more = values
        relation = more[0] if more else np.zeros_like(size)  # 0: one object alone
        cover = object_cover(*self.size, size, shape, u[:, 4:7], relation - 1)
        tone = pattern_cover(*self.size, pattern, u[:, 16:19])
        ground, second_tone = self.palette[background], self.tones[background]
        canvas = ground[:, None, None] * (1 - tone) + second_tone[:, None, None] * tone
        if more:
            size2, colour2, shape2 = (value - 1 for value in more[1:])  # -1 where there is none
            opposite = np.array([-1, 1, 0, 3, 2])[relation]  # where the second object stands
            second = object_cover(*self.size, size2, shape2, u[:, 12:15], opposite)
            second = second * (relation > 0)[:, None, None, None]
            canvas = canvas * (1 - second) + self.palette[colour2][:, None, None] * second
        image = canvas * (1 - cover) + self.palette[colour][:, None, None] * cover  # (B, H, W, 3)
        return torch.from_numpy((image + 0.5).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


# ---------------------------------------------------------------------------------------------
# Images in memory
# ---------------------------------------------------------------------------------------------


@functools.lru_cache(32)  # of the epochs of all buckets; else it is drawn anew in every batch
def order(seed, epoch, n):
    """In which order a set of n images is passed over."""
    return rng(seed, "order of an epoch", epoch).permutation(n)


class ImageSet(DataSet):
    """Decoded images in memory, each with a caption.

    train, held_out: images (n, C, H, W), uint8 or x_0, and (n,) rows of `captions`."""

    def __init__(
        self, name, train, held_out=(None, None), captions=(), attributes=None, labels=None,
        seed=0, flip=True,
    ):  # fmt: skip
        self.name, self.seed, self.flip = name, seed, flip
        self.images, self.caption = train
        self.held_out_images, self.held_out_caption = held_out
        self.captions, self.attributes, self.labels = captions, attributes, labels
        self.train_size, self.size = len(self.images), tuple(self.images.shape[2:])
        self.held_out_size = 0 if held_out[0] is None else len(held_out[0])
        self.device = torch.device("cpu")  # of the images that are trained on

    def to(self, device):
        if self.images.nbytes <= RESIDENT:
            self.images, self.device = self.images.to(device), torch.device(device)
        return self

    def batch(self, index, held_out=False):
        index = np.asarray(index, np.int64)
        if held_out:
            rows = index % len(self.held_out_images)
            return self.held_out_images[rows], self.held_out_caption[rows]
        epoch, place = index // self.train_size, index % self.train_size
        rows = np.empty_like(place)
        for e in np.unique(epoch):
            rows[epoch == e] = order(self.seed, int(e), self.train_size)[place[epoch == e]]
        images = self.images[moved(torch.from_numpy(rows), self.device)]
        if self.flip:
            mirrored = torch.from_numpy(uniform(self.seed, "mirrored", index, 1) < 0.5)
            mirrored = moved(mirrored, self.device)[..., None, None]
            images = torch.where(mirrored, images.flip(3), images)
        return images, self.caption[rows]


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


def text_features(dataset, dim, length):
    """What makes a data set's captions features: the set itself, if it brings them."""
    return dataset if hasattr(dataset, "features") else HashedText(dim, length)


def judge_batches(dataset):
    """A function step, n -> images, labels: what a judge learns from, the same for every seed."""
    seedless = Buckets([copy.copy(bucket) for bucket in dataset.sets])
    for bucket in seedless.sets:
        bucket.seed = 0

    def draw(step, n):
        index = np.arange(step * n, (step + 1) * n) + JUDGE_INDEX
        images, caption = draw_bucket(seedless, 0, 0, step).batch(index)
        return images, dataset.labels[caption]

    return draw


def check(dataset, s, processes, needs_images):
    """Raises DataError where a data set does not fit a run's settings."""
    if hasattr(dataset, "check"):  # encoded shards know more
        dataset.check(s, processes, needs_images)
        return
    if s.is_latent or s.channels != dataset.channels:
        raise DataError(
            f"--preset {s.preset} learns from latents of {s.channels} channels, and --data "
            f"{s.data} has images of {dataset.channels}: it needs a folder of encoded shards."
        )
    finite = [bucket for bucket in dataset.sets if bucket.train_size]
    held_out = sum(bucket.held_out_size for bucket in finite)
    if finite and held_out < 8:
        images = held_out + sum(bucket.train_size for bucket in finite)
        raise DataError(
            f"--data {s.data}: {images} images are too few: a tenth is held out to score by, and "
            "that takes at least 80."
        )


def load(name, sizes, *, data_dir="data", seed=0, flip=True):
    """The data set `shapes`, `cifar10`, or of a folder or zip of images, or a folder of shards.

    sizes: the (H, W) of x_0, one or several. flip: whether photographs are mirrored at random."""
    if name == "shapes":
        pairs = min(map(min, sizes)) >= PAIR_SIDE  # in all buckets or in none
        first = Shapes(*sizes[0], seed, pairs)
        return one_or_buckets([first, *map(first.of_size, sizes[1:])])
    if name == "cifar10":
        from lib.cifar10 import read_cifar10
        from lib.images import nearest

        found = read_cifar10(Path(data_dir), *nearest(sizes, 1, 1))  # its images are square
        return ImageSet(*found, seed, flip)
    if not os.path.exists(name):
        raise DataError(f"--data {name}: no such folder or file, and not one of shapes, cifar10.")
    if os.path.exists(os.path.join(name, "shards.json")):
        from sd3.shards import Shards

        return Shards(name, sizes, seed)
    from lib.folders import read_folder

    sets, content, *known = read_folder(name, sizes)
    known += seed, flip
    return one_or_buckets([ImageSet(content, train, held, *known) for train, held in sets])


def parse_size(text):
    """A size in pixels: 16, or HxW."""
    sides = tuple(int(side) for side in re.split("[x,]", text.lower()))
    if len(sides) > 2:
        raise ValueError(text)
    return sides * 2 if len(sides) == 1 else sides
