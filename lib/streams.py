"""Random numbers as functions of a seed, a named stream and a number.

Nothing drawn before changes what is drawn next: a run that is cut and resumed, or split over
several processes, sees the same data and noise. No two streams meet, whatever the seeds.
"""

import hashlib

import numpy as np
import torch


def key_of(seed, stream):
    """64 bits that stand for a stream, such as "distillation" or "synthesis, step 0". -> int"""
    digest = hashlib.blake2b(f"{stream}: {seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def rng(seed, stream, number=0):
    """NumPy's generator number `number` of a stream: for all that an update draws."""
    return np.random.Generator(np.random.Philox(key=[key_of(seed, stream), number]))


def uniform(seed, stream, index, n):
    """index (B,) -> (B, n) in [0, 1), float64, from (seed, stream, index, column) alone."""
    with np.errstate(over="ignore"):
        x = np.asarray(index, np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
        x = x + np.uint64(key_of(seed, stream))
        x = x + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x8CB92BA72F3D8DD7)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's finaliser
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) / float(1 << 53)


def normal(seed, stream, index, shape):
    """Standard normal noise of samples: image i has the same in any batch. index (B,) -> (B, …)"""
    rows = [rng(seed, stream, int(i)).standard_normal(shape, np.float32) for i in index]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)
