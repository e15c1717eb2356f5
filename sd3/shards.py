"""A folder of encoded shards as a data set: latents, and the text features of their captions."""

import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import torch

from data import SYNTHETIC_INDEX, Buckets, ImageSet, Text
from lib.checkpoints import check_weights
from lib.errors import DataError, pass_on, plural, reason
from lib.files import checksum, read, read_object
from lib.machine import moved

SHARDS = "ladd-shards-2"
DIMENSIONS = dict(context=3, pooled=2, latents=4)  # of a shard's tensors


def read_shard(file, check):
    """What `encode` wrote, memory-mapped: n captions, and if n > 0 in bf16 their context
    (n, M, D_c), pooled (n, D_p), and of images latents (n, C, h, w). check: the checksums."""
    try:
        shard = read(file, check=check, mmap=True)
        tensors = {name: shard[name] for name in shard if name != "captions"}
        n = len([caption + "" for caption in shard["captions"] + []])
        check_weights(tensors, file.stat().st_size)
        for name, x in tensors.items():
            wanted = (DIMENSIONS[name], n, torch.bfloat16)
            if (x.ndim, len(x), x.dtype) != wanted or x.numel() == 0:
                raise ValueError(f"{name} {tuple(x.shape)} in {x.dtype} of {n} captions")
        if n and not tensors.keys() >= {"context", "pooled"}:
            raise ValueError("without text features")
        return shard
    except Exception as error:  # a damaged file raises nearly anything
        pass_on(error, file)
        why = reason(error, 300).removeprefix(f"{file}: ")
        advice = "delete it, if it is there, and run the same encode again"
        raise DataError(f"{file}: not a shard ({why}); {advice}.") from None


class ShardBucket(ImageSet):
    """Samples of one size from a shard folder. Nothing is held out."""

    def __init__(self, shards, size, samples, caption):
        rows = (torch.tensor(samples), caption[samples])
        captions, labels = shards.captions, shards.labels
        super().__init__(shards.name, rows, rows, captions, {}, labels, shards.seed, flip=False)
        self.shards, self.size = shards, tuple(size)

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
    caption. Tensors stay on disk, memory-mapped, and are read sample by sample. Every file's
    checksum is compared at once, or in large folders (4 GB) when it is first read from.

    sizes: those of the samples to be made where there are prompts alone, (H, W) of x_0; each prompt
    belongs to one of them."""

    attributes, device = {}, torch.device("cpu")

    def __init__(self, path, sizes, seed=0):
        self.path, self.seed, self.opened = Path(path), seed, {}
        index = read_object(self.path / "shards.json")
        if index.get("format") != SHARDS or type(index.get("shards")) is not int:
            raise DataError(f"{path}: its shards.json is of no shard folder, or of an older one.")
        self.t5 = index.get("t5", True)  # whether its text features have T5's
        few = sum(file.stat().st_size for file in self.path.glob("*.pt")) <= 4e9
        captions, self.place, sums, kinds = [], [], [], set()
        members = {}  # (C, h, w) of latents, or None of prompts alone -> their samples
        for i in range(index["shards"]):
            shard = read_shard(self.file(i), check=few)
            if few:
                self.opened[i] = shard
            first, n = len(captions), len(shard["captions"])
            captions += shard["captions"]
            sums.append(checksum(self.file(i)))
            self.place += [(i, k) for k in range(n)]
            if n:
                kinds.add((*shard["context"].shape[1:], *shard["pooled"].shape[1:]))
            if n and i > 0:  # the first has the empty caption alone
                latents = tuple(shard["latents"].shape[1:]) if "latents" in shard else None
                members.setdefault(latents, []).extend(range(first, first + n))
        channels = {latents and latents[0] for latents in members}
        if len(kinds) != 1 or len(channels) != 1 or captions[0] != "":
            raise DataError(f"{path}: its shards have no samples, or of several kinds.")
        ((_, self.context_dim, self.pooled_dim),) = kinds
        (self.channels,) = channels

        self.captions = list(dict.fromkeys(captions))
        content = repr((captions, sums)).encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(content).hexdigest()[:16]
        self.name = f"{len(captions)} samples, {len(self.captions)} captions, digest {digest}"
        self.rows = {caption: row for row, caption in enumerate(self.captions)}
        caption = torch.tensor([self.rows[c] for c in captions])
        # the first sample of every caption
        self.first = torch.from_numpy(np.unique(caption.numpy(), return_index=True)[1])
        self.labels = torch.zeros(len(self.captions), 0, dtype=torch.int64)
        if self.channels is None:
            prompts = members[None]
            members = {(None, *size): prompts[i :: len(sizes)] for i, size in enumerate(sizes)}
        parts = [(size, samples) for (_, *size), samples in sorted(members.items()) if samples]
        self.sets = [ShardBucket(self, *part, caption) for part in parts]
        kind = f"of {self.channels} channels" if self.channels else "of prompts alone"
        print(f"{path}: {plural(len(captions) - 1, 'sample')} {kind}", file=sys.stderr)

    def file(self, i):
        return self.path / f"{i:06d}.pt"

    def check(self, s, processes, needs_images):
        """Raises DataError where a run with these settings can't use the folder."""
        sides = []  # of squares of the buckets' areas, to that of --size
        for height, width in (bucket.size for bucket in self.sets):
            what = f"{self.path}: latents of {height}×{width}"
            if height % s.patch or width % s.patch:
                raise DataError(f"{what} can't be cut into {s.patch}×{s.patch}.")
            if max(height, width) > s.patch * s.pos_size:
                most = f"--pos-size {s.pos_size} patches of {s.patch} a side"
                raise DataError(f"{what} are more than {most}; encode at a smaller --size.")
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
        n = sum(bucket.train_size for bucket in self.sets)
        if n < processes:
            raise DataError(f"{self.path}: {n} prompts are fewer than the {processes} processes.")
        if not self.channels and needs_images:
            takes = "that takes --teacher and --targets synthetic"
            raise DataError(f"{self.path} has prompts alone: {takes}.")

    def read(self, name, samples):
        """One tensor of samples (B,) -> (B, …) float32 on the device."""
        rows = []
        for i, k in (self.place[sample] for sample in samples.tolist()):
            if i not in self.opened:
                self.opened[i] = read_shard(self.file(i), check=True)
            rows.append(self.opened[i][name][k])
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
