"""sd3/shards.py: encoded shards whose notes vouch for whatever a stranger put there."""

import json

import pytest
import torch
from conftest import TINY, encoded, note_of, shard_of

import data
import ladd
from lib.errors import DataError
from sd3.shards import SHARDS
from tools.train import given_settings

pytest.importorskip("safetensors")


def shard_with(note=(), **more):
    """The second shard with another content, or with something changed in its note."""
    content = shard_of(2, **({"latents": torch.ones(2, 16, 4, 4)} | more))
    return {"000001_safetensors": content, "000001_json": note_of(content, **dict(note))}


def first_with(**more):
    """The first shard, that of the empty caption, with another content."""
    content = shard_of(1, **more)
    note = note_of(content, latents=None, captions=[""])
    return {"000000_safetensors": content, "000000_json": note}


def index_with(**changes):
    return {"shards_json": json.dumps(dict(format=SHARDS, shards=2) | changes).encode()}


ENCODED = {
    "10^12 shards": lambda: index_with(shards=10**12),
    "a number that is a text": lambda: index_with(shards="2"),
    "another format": lambda: index_with(format="x"),
    "no samples": lambda: index_with(shards=1),
    "deep JSON": lambda: {"shards_json": b"[" * 100_000},
    "no note": lambda: {"000001_json": b"{}"},
    "captions that are numbers": lambda: shard_with(dict(captions=[1, 2])),
    "captions that are a text": lambda: shard_with(dict(captions="ab")),
    "a caption too many": lambda: shard_with(dict(captions=["a", "b", "c"])),
    "latents of 10^9": lambda: shard_with(dict(latents=[16, 10**9, 10**9])),
    "latents that are a text": lambda: shard_with(dict(latents="abc")),
    "latents of another size": lambda: shard_with(latents=torch.ones(2, 16, 2, 8)),
    "latents that no patches fit": lambda: shard_with(
        dict(latents=[16, 3, 4]), latents=torch.ones(2, 16, 3, 4)),
    "no latents": lambda: shard_with(latents=torch.ones(0)),
    "context of another width": lambda: shard_with(context=torch.ones(2, 4, 7)),
    "pooled with a dimension more": lambda: shard_with(pooled=torch.ones(2, 6, 1)),
    "a first context of two dimensions": lambda: first_with(context=torch.ones(1, 6)),
    "a first pooled of one dimension": lambda: first_with(pooled=torch.ones(1)),
    "a first context that is none": lambda: first_with(context=torch.ones(0)),
    "numbers of another type": lambda: shard_with(dtype=torch.float64),
    "latents wider than the position table": lambda: shard_with(
        dict(latents=[16, 2, 66]), latents=torch.ones(2, 16, 2, 66)),
    "latents of half the size": lambda: shard_with(
        dict(latents=[16, 2, 2]), latents=torch.ones(2, 16, 2, 2)),
    "latents of 5/4 of the size": lambda: shard_with(
        dict(latents=[16, 4, 6]), latents=torch.ones(2, 16, 4, 6)),
    "no safetensors": lambda: {"000001_safetensors": b"x", "000001_json": note_of(b"x")},
}  # fmt: skip


@pytest.mark.parametrize("case", ENCODED)
def test_strange_shards_are_refused_by_name_though_their_hash_is_right(tmp_path, refused, case):
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
