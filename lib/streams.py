"""Randomness as a function of numbers: nothing drawn before changes what is drawn next.

So a run that is cut and resumed, or split over several processes, sees the same data and noise.
"""

import numpy as np
import torch


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


def noise_of(seed, indices, shape, step=0):
    """Noise from (seed, index, step) alone: image i is the same in any batch. -> (B, …)"""
    out = torch.empty(len(indices), *shape)
    for row, index in zip(out, indices, strict=True):
        key = int(hash_uniform(seed + 7919 * step, [index], 1)[0, 0] * (1 << 53))
        row.normal_(generator=torch.Generator().manual_seed(key))
    return out


STREAMS = ("teacher", "synthesis", "distillation", "report")


def rng(seed, stream, step):
    """The generator of one update, from seed, stream and step: a resumed run draws alike."""
    key = hash_uniform(seed, [step], 1 + STREAMS.index(stream))[0, -1]
    return torch.Generator().manual_seed(int(key * (1 << 53)))
