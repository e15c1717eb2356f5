"""The data: images, captions, text features.

A data set is anything with these four things; `load` makes one from a name or a path:

    captions    list of str                 every distinct caption, in a fixed order
    attributes  {name: [value, ...]}        what a caption says, as questions with few answers
    labels      (len(captions), A) int64    the answers, one column per attribute
    batch(index, held_out=False)            index (B,) of int -> images (B, 3, H, W) uint8,
                                            caption (B,) int64: a row of `captions`

The same index always gives the same image, whatever was drawn before: a run that is cut and
resumed, or split over several processes, sees the same data. Indices run on for ever; finite sets
are passed over again in a new order (and mirrored at random). Held-out images are never trained on.

Text features need no download: every word is a frozen random vector, hashed from the word itself.
The interface is that of real text encoders: captions -> context (B, M, D_c), pooled (B, D_p), and
the empty caption is the unconditional one.
"""

import contextlib
import hashlib
import io
import json
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
        value = json.loads(Path(path).read_bytes())
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
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
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
    """uint8 pixels 0…255 -> float32 in [-1, 1], the x_0 of a network that works on pixels."""
    return images.float() / 127.5 - 1


def to_uint8(x0):
    """[-1, 1] -> uint8, rounded; values outside are clipped."""
    return ((x0.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


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

    def __init__(self, height, width, seed=0):
        self.height, self.width, self.seed = height, width, seed
        self.palette = np.array(list(COLOURS.values()), np.float32)
        colours = list(COLOURS)
        one = {"size": SIZES, "colour": colours, "shape": SHAPES}
        self.attributes = {**one, "background": colours}
        one_object = np.indices((2, 8, 4, 8)).reshape(4, -1).T  # every combination of values
        labels = one_object[one_object[:, 1] != one_object[:, 3]]
        if min(height, width) >= PAIR_SIDE:
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
        low, high = np.where(size, 0.36, 0.23), np.where(size, 0.44, 0.28)  # half of its extent
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
    cross = np.minimum(np.maximum(ax - r, ay - 0.42 * r), np.maximum(ay - r, ax - 0.42 * r))
    return np.select([shape == 0, shape == 1, shape == 2], [circle, square, triangle], cross)


# ---------------------------------------------------------------------------------------------
# Images in memory
# ---------------------------------------------------------------------------------------------


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
        self.train_size = len(self.images)
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


def to_rgb(image):
    """Any picture as 8-bit RGB: rotated as its EXIF says, transparency on white."""
    image = ImageOps.exif_transpose(image)
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
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        pixels = image.width * image.height
        if pixels > MOST_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels, more than {MOST_PIXELS:,}")
        with one_large if pixels > 1 << 22 else contextlib.nullcontext():
            image = ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.BICUBIC)
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
        if re.match("/|[A-Za-z]:", name) or ".." in name.split("/"):
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


def load_files(path, height, width, seed=0):
    """A folder or a zip of images with a captions.jsonl, or a .txt each, or in class folders."""
    files = Files(path)
    caption_of, classes = find_captions(files)
    pixels, kept = decode_all(files, sorted(caption_of), height, width)
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
    order = torch.tensor(sorted(range(len(kept)), key=keys.__getitem__))
    cut = min(10_000, max(1, len(kept) // 10))
    held, train = order[:cut], order[cut:] if len(kept) > 1 else order
    return ImageSet(
        f"{Path(path).resolve()}",
        (pixels[train], caption[train]),
        (pixels[held], caption[held]),
        captions,
        attributes,
        labels,
        seed,
    )


def decode_all(files, names, height, width):
    """Every image as (n, 3, H, W) uint8, and the names that could be read; bad ones are named."""

    def one(name):
        try:
            return decode(files.read(name), height, width)
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
    return torch.from_numpy(np.stack([d for _, d in good])), [n for n, _ in good]


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


def load(name, height, width, *, data_dir="data", seed=0):
    """The data set `shapes`, `cifar10`, or that of a folder or zip of images at a path."""
    if name == "shapes":
        return Shapes(height, width, seed)
    if name == "cifar10":
        return load_cifar10(data_dir, height, width, seed)
    if not os.path.exists(name):
        raise DataError(f"--data {name}: no such folder or file, and not one of shapes, cifar10.")
    return load_files(name, height, width, seed)
