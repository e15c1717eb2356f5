"""A folder of encoded shards as a data set: latents, and the text features of their captions."""

import json
from pathlib import Path

import numpy as np
import torch

from data import SYNTHETIC_INDEX, Buckets, ImageSet, Text
from lib.archive import MOST_BYTES
from lib.errors import DataError
from lib.files import sha256
from sd3.encoders import NEEDS

SHARDS = "ladd-shards-1"


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
        return Text(self.read("context", samples), self.read("pooled", samples))

    def to(self, device):
        self.device = torch.device(device)
        return self

    def __call__(self, captions):
        return self.features(self.ids(captions))
