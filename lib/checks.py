"""Settings that don't fit together are refused, each with one line that names a flag.

`s` has the fields of a patch transformer on images, distilled on a few noise levels.
"""

import os
import re
from itertools import pairwise
from pathlib import Path

from lib.captions import split_words
from lib.parallel import world
from lib.settings import refuse

ASPECT = "[1-9][0-9]{0,3}:[1-9][0-9]{0,3}"  # width:height


def check_together(s):
    """Raises the UsageError of the first field that does not fit the others."""
    patch = s.patch * s.downscale
    if any(side < 1 or side % patch for side in s.size):
        refuse(s, "size", f"patches of {patch} pixels don't divide it")
    if max(s.size) > patch * s.pos_size:
        refuse(s, "size", f"more than {s.pos_size} patches a side")
    if not all(re.fullmatch(ASPECT, aspect) for aspect in s.aspects):
        refuse(s, "aspects", "must be WIDTH:HEIGHT,… such as 1:1,3:2,2:3")
    for height, width in s.sizes:
        if max(height, width) > s.patch * s.pos_size:
            refuse(s, "aspects", f"{height}×{width} has more than {s.pos_size} patches a side")
    if s.width % s.attention_heads or s.width % 4:
        refuse(s, "width", f"not a multiple of 4 and of --attention-heads {s.attention_heads}")
    if s.text_dim % 2:
        refuse(s, "text_dim", "must be even")
    if s.head_width % max(1, s.head_width // 16):
        refuse(s, "head_width", "must be a multiple of 16, or less than 32")
    if s.judge_width % 4:
        refuse(s, "judge_width", "must be a multiple of 4")
    if s.pooled_dim not in (0, s.text_dim) and not s.is_latent:
        refuse(s, "pooled_dim", f"hashed words have one width, --text-dim {s.text_dim}")
    above = [path for path in (Path(s.data_dir), *Path(s.data_dir).parents) if path.exists()]
    if not above[0].is_dir():
        refuse(s, "data_dir", f"{above[0]} is a file: give a folder")
    images, out = os.path.realpath(s.data), os.path.realpath(s.out)
    if s.out and os.path.isdir(images) and Path(out).is_relative_to(images):
        refuse(s, "out", f"is inside --data {s.data}, which would get the run's pictures, too")
    # noise levels
    levels = s.levels
    p, warm_p = s.level_p or levels, s.level_warmup_p if s.level_warmup else levels
    if not len(levels) == len(p) == len(warm_p):
        refuse(s, "level_p", "needs as many values as --levels and --level-warmup-p")
    if not all(a > b for a, b in pairwise((*levels, 0))) or not 0.99 <= max(levels, default=0) <= 1:
        refuse(s, "levels", "must fall, from 1 (or .99: samples start from noise) to above 0")
    for name, values in (("level_p", p), ("level_warmup_p", warm_p)):
        if sum(values) <= 0:
            refuse(s, name, "must be probabilities")
    # the discriminator
    if list(s.taps) != sorted(set(s.taps)) or not all(0 <= i < s.depth for i in s.taps):
        refuse(s, "taps", f"must be ascending block numbers from 0 to {s.depth - 1}")
    if s.compile == "yes" and s.r1:
        refuse(s, "compile", "not with --r1, a gradient of a gradient")
    # the adapter
    if s.lora > s.width:
        refuse(s, "lora", f"adapters have a low rank, at most --width {s.width}")
    if s.lora and s.offload:
        refuse(s, "offload", "with --lora little learns: there is nothing to keep elsewhere")
    # many processes
    parts = f" in {s.accumulate} parts" if s.accumulate > 1 else ""
    for name in ("batch",) if s.teacher else ("batch", "teacher_batch"):
        if getattr(s, name) % (world() * s.accumulate):
            refuse(s, name, f"its images can't be divided equally among {world()} processes{parts}")
    if world() > 1 and world() % s.replicas:
        refuse(s, "replicas", f"must divide the {world()} processes")
    if s.offload and not s.shard:
        refuse(s, "offload", "is a part of --shard")
    if s.synthetic < world():
        refuse(s, "synthetic", f"fewer than the {world()} processes")
    if s.shard and world() > 1 and s.muon_lr and not s.teacher:
        refuse(s, "muon_lr", "Muon needs whole matrices: --shard takes --muon-lr 0")


def check_for_method(s, method):
    """Refuses what does not fit the method of distillation, or is not there to be read."""
    if s.source and not Path(s.source).is_dir():
        refuse(s, "source", "is no folder of a run")
    if method in ("ladd", "add", "dpo", "inpaint", "edit") and s.heads_warmup >= s.iterations:
        refuse(s, "heads_warmup", f"leaves none of {s.iterations} updates")
    if method == "regression" and s.targets == "real":
        refuse(s, "targets", "real images have no noise that they were made of")
    if method in ("add", "dpo") and s.is_latent:
        refuse(s, "data", f"methods/{method}.py reads pixels, not latents")
    if method == "dpo" and s.pairs:
        from lib.pairs import LIST, read_list

        if not Path(s.out, "pairs", LIST).exists():  # else the run goes on with those
            read_list(s.pairs)  # what is wrong with it is said before anything is made


def check_captions(s, method, dataset):
    """Refuses captions that ask a classifier nothing where the method learns from its answers, or
    that ask it different things and are read alike."""
    if method == "hyper_sd" and s.shares[4]:
        if not dataset.attributes:
            refuse(s, "shares", "these captions ask a classifier nothing; the fifth must be 0")
        read = [tuple(split_words(caption)[: s.text_length]) for caption in dataset.captions]
        asked = map(tuple, dataset.labels.tolist())
        if len(set(read)) < len(set(zip(read, asked, strict=True))):
            why = "captions that differ in what they ask a classifier are read alike"
            refuse(s, "text_length", f"{why}; read more words, or let the fifth of --shares be 0")
    if method == "dpo" and not s.pairs and not dataset.attributes:
        refuse(s, "pairs", "is needed, as these captions ask nothing to rank samples by")
