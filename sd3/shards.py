"""A folder of encoded shards as a data set: latents, and the text features of their captions."""

import hashlib
import math
import operator
import sys
from pathlib import Path

import numpy as np
import torch

from data import SYNTHETIC_INDEX, Buckets, ImageSet, Text
from lib.errors import DataError, pass_on, plural
from lib.files import read_object, sha256
from lib.machine import moved
from sd3.encoders import NEEDS

SHARDS = "ladd-shards-1"


def shard_note(path):
    """What stands in the JSON file beside a shard; nothing, if the shard was not finished."""
    path = path.with_suffix(".json")
    return read_object(path) if path.exists() else {}


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
        if self.shards.channels is None:
            return None, caption
        return self.shards.read("latents", samples), caption


class Shards(Buckets):
    """A folder that `encode` wrote: data sets of one size each, and their text features.

    In place of HashedText: the id of a caption is its row of `captions`, and row 0 is the empty
    caption. Tensors stay on disk, memory-mapped, and are read sample by sample. Every file's size
    is checked at once; its SHA-256 too, or in large folders (4 GB) when it is first opened.

    sizes: those of the samples to be made where there are prompts alone, (H, W) of x_0; each prompt
    belongs to one of them."""

    attributes, device = {}, torch.device("cpu")

    def __init__(self, path, sizes, seed=0):
        self.path, self.seed = Path(path), seed
        index = shard_note(self.path / "shards")
        if index.get("format") != SHARDS or type(index.get("shards")) is not int:
            raise DataError(f"{path}: its shards.json is not that of a shard folder.")
        self.files, self.notes, self.opened = [], [], {}
        for i in range(index["shards"]):
            self.files.append(self.path / f"{i:06d}.safetensors")
            self.notes.append(self.checked_note(self.files[i]))
        kinds = {(note["latents"] or [None])[0] for note in self.notes[1:] if note["captions"]}
        if len(kinds) != 1 or not self.notes[0]["captions"]:
            raise DataError(f"{path}: its shards have no samples, or of several kinds.")

        captions = [caption for note in self.notes for caption in note["captions"]]
        self.captions = list(dict.fromkeys(captions))
        content = repr((captions, [note["sha256"] for note in self.notes]))
        digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self.name = f"{len(captions)} samples, {len(self.captions)} captions, digest {digest}"
        self.rows = {caption: row for row, caption in enumerate(self.captions)}
        caption = torch.tensor([self.rows[c] for c in captions])
        # the first sample of every caption
        self.first = torch.from_numpy(np.unique(caption.numpy(), return_index=True)[1])
        self.labels = torch.zeros(len(self.captions), 0, dtype=torch.int64)
        self.counts = [len(note.pop("captions")) for note in self.notes]
        self.place = [(i, k) for i, n in enumerate(self.counts) for k in range(n)]

        self.channels = kinds.pop()
        members = {}  # (h, w) of latents -> their samples; None -> prompts alone
        for sample in range(self.counts[0], len(self.place)):
            latents = self.notes[self.place[sample][0]]["latents"]
            members.setdefault(latents and tuple(latents[1:]), []).append(sample)
        prompts = members.pop(None, [])
        if self.channels is None:
            members = {size: prompts[i :: len(sizes)] for i, size in enumerate(sizes)}
        self.sets = [
            ShardBucket(self, size, samples, caption)
            for size, samples in sorted(members.items())
            if samples
        ]
        samples = plural(sum(self.counts[1:]), "sample")  # without the empty caption
        what = f"{samples}, {plural(len(set(captions[self.counts[0] :])), 'caption')}, of "
        what += f"{self.channels} channels" if self.channels else "prompts alone"
        print(f"{path}: {what}", file=sys.stderr)
        few = sum(note["bytes"] for note in self.notes) <= 4e9
        for i in range(len(self.files) if few else 1):
            self.open(i)

    def checked_note(self, file):
        """What stands beside a shard: bytes, sha256, captions, (C, h, w) of latents or None."""
        note = shard_note(file)
        try:
            note["captions"] = [caption + "" for caption in note["captions"] + []]
            note["sha256"] += ""
            latents = (0, 0, 0) if note["latents"] is None else note["latents"]
            size, _, _, _ = map(operator.index, (note["bytes"], *latents))
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{self.path}: {file.name} is missing; run the same encode again."
            ) from None
        found = file.stat().st_size if file.is_file() else 0
        if not found or found != size:
            raise DataError(f"{file}: {found:,} of {size:,} bytes; encode it again.")
        return note

    def check(self, s, processes, needs_images):
        """Raises DataError where a run with these settings can't use the folder."""
        sides = []  # of squares of the buckets' areas, to that of --size
        for height, width in (bucket.size for bucket in self.sets):
            what = f"{self.path}: latents of {height}×{width}"
            if height % s.patch or width % s.patch:
                raise DataError(f"{what} can't be cut into {s.patch}×{s.patch}.")
            if max(height, width) > s.patch * s.pos_size:
                most = f"more than --pos-size {s.pos_size} patches of {s.patch} a side"
                raise DataError(
                    f"{what} are {most}; encode with a smaller --size or fewer --aspects."
                )
            sides.append(math.sqrt(height * width / s.positions))
        nearest = min(sides, key=lambda side: abs(math.log(side)))
        if not 0.9 < nearest < 1.1:  # areas differ a little, as sides are rounded
            side = round(nearest * math.sqrt(s.positions) * s.downscale)
            raise DataError(f"{self.path}: was encoded at about --size {side}: give that --size.")
        for what, mine, wanted in (
            ("text features", self.context_dim, s.text_dim),
            ("pooled text features", self.pooled_dim, s.pooled_dim or s.text_dim),
            ("latents", self.channels or s.channels, s.channels),
        ):
            if mine != wanted:
                raise DataError(f"{self.path}: {what} {mine} wide, but the network takes {wanted}.")
        prompts = sum(bucket.train_size for bucket in self.sets)
        if prompts < processes:
            few = f"{prompts} prompts are fewer than the {processes} processes"
            raise DataError(f"--data {s.data}: {few}.")
        if not self.channels and needs_images:
            raise DataError(
                f"--data {s.data}: has prompts alone: that takes --teacher and --targets synthetic."
            )

    def open(self, i):
        """File i, memory-mapped; DataError where it is not what its note and the first file say."""
        if i in self.opened:
            return self.opened[i]
        try:
            from safetensors import safe_open
        except ImportError:
            raise DataError(NEEDS) from None
        file, wanted = self.files[i], self.notes[i]["sha256"]
        found = sha256(file)
        if found != wanted:
            raise DataError(
                f"{file}: altered since it was made (SHA-256 {found[:16]}…, expected "
                f"{wanted[:16]}…); delete it and run the same encode again."
            )
        try:
            opened = safe_open(file, "pt")
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
            if i == 0:
                self.tokens, self.context_dim = shapes["context"][1:]
                (self.pooled_dim,) = shapes["pooled"][1:]
            n, latents = self.counts[i], self.notes[i]["latents"]
            wanted = dict(context=(n, self.tokens, self.context_dim), pooled=(n, self.pooled_dim))
            if latents:
                wanted["latents"] = (n, *latents)
            if n and shapes != wanted:
                raise ValueError(f"{shapes} in it, but {wanted} expected")
            if any(s.get_dtype() != "BF16" for s in slices.values()):
                raise ValueError("not bfloat16")
        except Exception as error:  # safetensors' own, of a damaged header
            pass_on(error, file)
            raise DataError(f"{file}: not a shard ({error}).") from None
        self.opened[i] = opened
        return opened

    def read(self, name, samples):
        """One tensor of samples (B,) -> (B, …) float32 on the device."""
        places = [self.place[sample] for sample in samples.tolist()]
        rows = [self.open(i).get_slice(name)[k] for i, k in places]
        return moved(torch.stack(rows), self.device).float()

    def ids(self, captions):
        """captions -> (B, 1) int64 rows of `captions`."""
        for caption in captions:
            if caption not in self.rows:
                raise DataError(f"{self.path}: holds no features of the caption {caption!r}.")
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
