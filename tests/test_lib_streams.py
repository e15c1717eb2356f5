"""lib/streams.py: randomness as functions of a seed, a named stream and a number."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import streams
from lib.streams import key_of, normal, rng, uniform

ROOT = Path(__file__).resolve().parent.parent


def test_uniform_is_the_splitmix64_finaliser_of_a_linear_form():
    def reference(seed, stream, index, column):
        x = index * 0x9E3779B97F4A7C15 + key_of(seed, stream) + column * 0x8CB92BA72F3D8DD7
        x %= 1 << 64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % (1 << 64)
        return ((x ^ (x >> 31)) >> 11) / (1 << 53)

    index = [0, 1, 77, 10**6, (1 << 40) + 3]
    for seed in (0, 1, 12345):
        expected = [[reference(seed, "a", i, c) for c in (1, 2, 3)] for i in index]
        assert uniform(seed, "a", index, 3).tolist() == expected


def test_uniform_is_uniform():
    u = uniform(7, "a", np.arange(40_000), 3)
    n = len(u)
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        assert abs(column.mean() - 1 / 2) < 4 / (12 * n) ** 0.5
        assert abs(column.var() - 1 / 12) < 4 / (180 * n) ** 0.5
        counts = np.histogram(column, 50, (0, 1))[0]
        chi2 = ((counts - n / 50) ** 2 / (n / 50)).sum()  # mean 49, standard deviation 9.9
        assert 15 < chi2 < 95


def test_uniform_numbers_of_other_seeds_streams_columns_and_indices_are_uncorrelated():
    index = np.arange(20_000)
    columns = [uniform(seed, "a", index, 4) for seed in (0, 1, 2, 1000)]
    columns += [uniform(0, "b", index, 4), uniform(0, "a", index + (1 << 40), 4)]
    columns.append(uniform(0, "a", index + 20_000, 4))
    correlation = np.corrcoef(np.concatenate(columns, axis=1).T)
    off_diagonal = correlation[~np.eye(len(correlation), dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / len(index) ** 0.5


def test_no_two_streams_meet_whatever_the_seeds():
    """Also not a step's noise with another seed's, as seed + 2 and seed + 1,000,000 once did."""
    seeds = [0, 1, 2, 3, 4, 5, 1_000_000, 1_000_001, 1 << 32, -1]
    streams = ["teacher", "distillation", "synthesis, step 0", "synthesis, step 1"]
    streams += ["evaluation, step 0", "pictures, step 0", "shapes", "mirrored", "order of an epoch"]
    drawn = [
        rng(seed, stream, number).random()
        for seed, stream, number in itertools.product(seeds, streams, range(5))
    ]
    assert len(set(drawn)) == len(drawn)
    keys = [key_of(seed, stream) for seed, stream in itertools.product(seeds, streams)]
    assert len(set(keys)) == len(keys)


def test_a_stream_is_the_same_in_every_process():
    """Python's own hash() of a text is not."""
    code = "from lib.streams import rng, key_of; print(key_of(3, 'a'), rng(3, 'a', 7).random())"
    words = dict(cwd=ROOT, capture_output=True, text=True, check=True)
    done = subprocess.run([sys.executable, "-c", code], **words)
    assert done.stdout.split() == [str(key_of(3, "a")), str(rng(3, "a", 7).random())]


def reference(seed, stream, row, size):
    """Noise as Python's own whole numbers and float64 make it."""

    def mixed(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % (1 << 64)
        return x ^ (x >> 31)

    start = mixed((key_of(seed, stream) + row * 0x9E3779B97F4A7C15) % (1 << 64))
    half = (size + 1) // 2
    x = [mixed((start + i * 0x9E3779B97F4A7C15) % (1 << 64)) for i in range(1, half + 1)]
    radius = [math.sqrt(-2 * math.log((i % (1 << 32) + 1) / 2**32)) for i in x]
    turn = [2 * math.pi * (i >> 32) / 2**32 for i in x]
    pairs = list(zip(radius, turn, strict=True))
    return [r * wave(a) for wave in (math.cos, math.sin) for r, a in pairs][:size]


def test_noise_is_splitmix64_of_every_row_and_box_and_muller():
    """Of whole numbers that wrap around in int64 as they do in 64 bits without a sign."""
    rows = [0, 1, 2, 255, 10**6, (1 << 40) + 3]
    for seed, stream, shape in ((0, "a", (7,)), (12345, "b, step 3", (3, 4, 2)), (-1, "c", (1,))):
        want = [reference(seed, stream, row, math.prod(shape)) for row in rows]
        made = normal(seed, stream, rows, shape)
        assert made.dtype == torch.float32 and made.shape == (len(rows), *shape)
        torch.testing.assert_close(made.flatten(1), torch.tensor(want), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_noise_belongs_to_the_row_not_to_its_batch(processes):
    """Row i has the same noise, bit for bit, in any batch, at any place, in any division of a batch
    over processes, and in parts."""
    rows = np.arange(12) + 5 * 12
    together = normal(5, "a", rows, (3, 5, 3))
    for rank in range(processes):
        assert torch.equal(
            normal(5, "a", rows[rank::processes], (3, 5, 3)), together[rank::processes]
        )
    for part, own in zip(torch.from_numpy(rows).split(5), together.split(5), strict=True):
        assert torch.equal(normal(5, "a", part, (3, 5, 3)), own)
    assert torch.equal(normal(5, "a", [63, 60, 63], (3, 5, 3)), together[[3, 0, 3]])
    assert normal(5, "a", [], (3, 5, 3)).shape == (0, 3, 5, 3)


def test_noise_of_seeds_streams_rows_and_neighbours_has_nothing_in_common():
    """No two fields of 4096 numbers are correlated, nor their squares, nor two places of a field,
    nor a number and those after it in its row: all within six standard deviations."""
    fields = [
        normal(seed, f"step {i}", rows, (4096,))
        for seed in (0, 1, 2, 1 << 32)
        for i in range(3)
        for rows in ([0, 1, 2, 3], [1 << 20, 1 << 40, (1 << 40) + 1])
    ]
    fields = torch.cat(fields).double()
    for values in (fields, fields.square(), normal(9, "a", range(4096), (64,)).double().T):
        correlation = torch.corrcoef(values) - torch.eye(len(values), dtype=torch.float64)
        assert correlation.abs().max() * 4096**0.5 < 6
    for lag in (1, 2, 3, 8, 32, 64, 1024, 2047, 2048, 2049):
        product = fields[:, :-lag] * fields[:, lag:]
        assert product.mean().abs() * product.numel() ** 0.5 < 6


def test_noise_is_standard_normal():
    """Its first four moments within five standard deviations, and its distribution by Kolmogorov
    and Smirnov: √n times the largest distance is above 1.95 once in a thousand times."""
    noise = normal(0, "a", range(400), (3, 32, 32)).double()
    z, n = noise.flatten(), noise.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (z.pow(power).mean() - moment).abs() < 5 * (variance / n) ** 0.5
    assert (noise.mean(dim=(1, 2, 3)).var() * 3072 - 1).abs() < 5 * (2 / 400) ** 0.5
    law = (1 + torch.erf(z.sort().values / 2**0.5)) / 2
    distance = (law - (torch.arange(n) + 0.5) / n).abs().max() + 0.5 / n
    assert distance * n**0.5 < 1.95
    assert 4.5 < z.abs().max() < 6.7  # and the tails are there


def test_noise_is_finite_at_the_ends_of_its_uniform_numbers(monkeypatch):
    """The largest radius is of 2⁻³², the smallest is zero; the angle goes once round."""
    ends = torch.tensor([[0, 0xFFFFFFFF, -1, -(1 << 63), (1 << 63) - 1]])
    monkeypatch.setattr(streams, "mix", lambda x: ends if x.dim() == 2 else x)
    made = normal(0, "a", [0], (10,))
    assert made.isfinite().all() and made.abs().max() == pytest.approx((64 * math.log(2)) ** 0.5)
