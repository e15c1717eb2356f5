"""lib/streams.py: randomness as functions of a seed, a named stream and a number."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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


def test_noise_belongs_to_the_image_not_to_its_batch():
    """Image i has the same noise in any batch, of any size, at any place."""
    together = normal(5, "a", range(7), (3, 2, 4))
    for indices in ([3], [6, 0, 3], range(2, 5)):
        assert torch.equal(normal(5, "a", indices, (3, 2, 4)), together[list(indices)])
    assert normal(5, "a", [], (3, 2, 4)).shape == (0, 3, 2, 4)


def test_noise_differs_between_seeds_streams_and_images():
    """No two of these fields have anything to do with each other."""
    fields = torch.cat(
        [normal(seed, f"step {i}", range(4), (300,)) for seed in (0, 1, 2) for i in range(4)]
    )
    correlation = torch.corrcoef(fields) - torch.eye(len(fields))
    assert correlation.abs().max() < 0.3  # five standard deviations


def test_noise_is_standard_normal():
    """Mean 0, variance 1, fourth moment 3, and the images are independent."""
    noise = normal(0, "a", range(400), (3, 10, 10)).double()
    assert noise.mean().abs() < 0.012
    assert noise.square().mean() == pytest.approx(1, abs=0.017)
    assert noise.pow(4).mean() == pytest.approx(3, abs=0.12)
    assert noise.mean(dim=(1, 2, 3)).var() * 300 == pytest.approx(1, abs=0.3)
