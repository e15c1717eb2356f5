"""sd3/shards.py: encoded shards from strangers."""

import json

import pytest
import torch
from conftest import TINY, encoded, saved, shard_of

import data
import ladd
from lib.errors import DataError
from sd3.shards import SHARDS
from tools.train import given_settings


def shard_with(captions=("a", "b"), **more):
    """The second shard with something else in it."""
    more = {"latents": torch.ones(2, 16, 4, 4)} | more
    return {"000001_pt": shard_of(list(captions), **more)}


def second(value):
    return {"000001_pt": saved(value)}


def first_with(captions=("",), **more):
    """The first shard, that of the empty caption, with something else in it."""
    return {"000000_pt": shard_of(list(captions), **more)}


def index_with(**changes):
    return {"shards_json": json.dumps(dict(format=SHARDS, shards=2) | changes).encode()}


def claimed(*shape):
    """A tensor that claims to be large, and holds one number."""
    return torch.ones(1).bfloat16().expand(shape)


TWO = dict(context=torch.ones(2, 4, 6).bfloat16(), pooled=torch.ones(2, 6).bfloat16())
ENCODED = {
    "10^12 shards": lambda: index_with(shards=10**12),
    "a number that is a text": lambda: index_with(shards="2"),
    "another format": lambda: index_with(format="ladd-shards-1"),
    "no samples": lambda: index_with(shards=1),
    "deep JSON": lambda: {"shards_json": b"[" * 100_000},
    "captions that are numbers": lambda: second(TWO | dict(captions=[1, 2])),
    "captions that are a text": lambda: second(TWO | dict(captions="ab")),
    "no captions": lambda: second(TWO),
    "a caption too many": lambda: shard_with("abc", context=torch.ones(2, 4, 6)),
    "a list": lambda: second([1]),
    "a number in the place of a tensor": lambda: second(TWO | dict(captions=["a", "b"], pooled=1)),
    "latents of 10^8": lambda: second(
        TWO | dict(captions=["a", "b"], latents=claimed(2, 16, 10**8, 10**8))),
    "latents of nothing": lambda: shard_with(latents=torch.ones(2, 16, 0, 0)),
    "latents that no patches fit": lambda: shard_with(latents=torch.ones(2, 16, 3, 4)),
    "a sample without latents": lambda: shard_with(latents=torch.ones(1, 16, 4, 4)),
    "context of another width": lambda: shard_with(context=torch.ones(2, 4, 7)),
    "no context": lambda: second(dict(captions=["a", "b"], pooled=TWO["pooled"])),
    "pooled with a dimension more": lambda: shard_with(pooled=torch.ones(2, 6, 1)),
    "a tensor of another name": lambda: shard_with(more=torch.ones(2)),
    "a first context of two dimensions": lambda: first_with(context=torch.ones(1, 6)),
    "a first pooled of one dimension": lambda: first_with(pooled=torch.ones(1)),
    "a first context that is none": lambda: first_with(context=torch.ones(0)),
    "a first caption that is not empty": lambda: first_with("a"),
    "numbers of another type": lambda: shard_with(dtype=torch.float64),
    "latents wider than the position table": lambda: shard_with(latents=torch.ones(2, 16, 2, 66)),
    "latents of half the size": lambda: shard_with(latents=torch.ones(2, 16, 2, 2)),
    "latents of 5/4 of the size": lambda: shard_with(latents=torch.ones(2, 16, 4, 6)),
    "no file of torch.save": lambda: {"000001_pt": b"x"},
    "none": lambda: {"000001_pt": b""},
}  # fmt: skip


@pytest.mark.parametrize("case", ENCODED)
def test_strange_shards_are_refused_by_name(tmp_path, refused, case):
    words = [*TINY.split(), "--downscale", 8, "--channels", 16, "--size", 32, "--out", "run"]
    encoded(tmp_path / "sound")  # which is none of it
    encoded(tmp_path / "shards", **ENCODED[case]())
    refused(ladd, [*words, "--data", tmp_path / "shards"], 2, tmp_path / "shards")
    settings, _ = given_settings([*map(str, words), "--data", f"{tmp_path}/sound"])
    data.check(data.load(settings.data, settings.sizes), settings, 1, needs_images=True)


def test_latents_of_another_size_than_the_runs_say_which(tmp_path):
    encoded(tmp_path / "shards")  # 4×4 latents, of 32×32 pixels
    words = [*TINY.split(), "--downscale", "8", "--channels", "16", "--data", f"{tmp_path}/shards"]
    settings, _ = given_settings([*words, "--size", "64"])
    with pytest.raises(DataError, match="encoded at about --size 32: give that --size"):
        data.check(data.load(settings.data, settings.sizes), settings, 1, needs_images=True)
    small, _ = given_settings([*words, "--size", "16", "--pos-size", "1"])
    with pytest.raises(DataError, match="4×4 are more than --pos-size 1 patches of 2 a side"):
        data.check(data.load(small.data, small.sizes), small, 1, needs_images=True)
