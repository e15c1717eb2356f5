"""Random numbers as functions of a seed, a named stream and a number.

Nothing drawn before changes what is drawn next: a run that is cut and resumed, or split over
several processes, sees the same data and noise. No two streams meet, whatever the seeds.
"""

import hashlib
import math

import numpy as np
import torch

from lib.machine import moved


def key_of(seed, stream):
    """64 bits that stand for a stream, such as "distillation" or "synthesis, step 0". -> int"""
    digest = hashlib.blake2b(f"{stream}: {seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def rng(seed, stream, number=0):
    """NumPy's generator number `number` of a stream: for the few numbers that an update draws."""
    return np.random.Generator(np.random.Philox(key=[key_of(seed, stream), number]))


# Arithmetic of 64 bits without a sign, in int64, which wraps around alike on every device.

RULE = "splitmix64"  # names what `normal` draws: files that depend on it have it
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # of splitmix64


def mix(x):
    """splitmix64's finaliser, one to one on 64 bits, in place. x int64"""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)
        x *= as_int64(factor)
    return x


def as_int64(n):
    """The number whose 64 bits are those of n, 0 ≤ n < 2⁶⁴."""
    return n - (n >> 63 << 64)


def uniform(seed, stream, index, n):
    """index (B,) -> (B, n) in [0, 1), float64, from (seed, stream, index, column) alone."""
    rows = torch.as_tensor(index, dtype=torch.int64)[:, None]
    columns = torch.arange(1, n + 1) * as_int64(0x8CB92BA72F3D8DD7)
    x = mix(rows * GAMMA + as_int64(key_of(seed, stream)) + columns)
    return (x >> 11 & (1 << 53) - 1).numpy() / float(1 << 53)


def normal(seed, stream, rows, shape, device="cpu"):
    """Standard normal noise: row i has the same in any batch and process, and no two rows or
    streams have anything in common. rows (B,) of int -> (B, *shape) float32 on the device.

    Each row is splitmix64 from a start of its own. Its integers are the same on every device; of
    each, two halves of 32 bits become two numbers (Box and Muller), by logarithm and cosine, whose
    last bit may differ between kinds of devices."""
    size = math.prod(shape)
    rows = moved(torch.as_tensor(rows, dtype=torch.int64), device)
    start = mix(rows * GAMMA + as_int64(key_of(seed, stream)))
    counter = torch.arange(1, (size + 1) // 2 + 1, device=device)
    x = mix(start[:, None] + counter * GAMMA)
    u = ((x & 0xFFFFFFFF).float() + 1) * 2.0**-32  # (0, 1]
    angle = (x >> 32).float() * (math.pi / 2**31)  # [-π, π)
    radius = (-2 * u.log()).sqrt()
    noise = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return noise[:, :size].reshape(-1, *shape)
