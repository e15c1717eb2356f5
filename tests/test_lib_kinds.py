"""A file of weights is known by its content, and what else was given is named."""

import json
import struct

import pytest
from conftest import PICTURE, saved

from lib.errors import CheckpointError
from lib.files import kind_of

HEADER = json.dumps({}).encode()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.sft", "a.CKPT", "a.bin", "a"])
def test_what_a_file_is_does_not_depend_on_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(saved({}))
    assert kind_of(tmp_path / name) == "torch"
    (tmp_path / name).write_bytes(struct.pack("<Q", len(HEADER)) + HEADER)
    assert kind_of(tmp_path / name) == "safetensors"


STRANGERS = {
    "GGUF": (b"GGUF\3\0\0\0" + bytes(100), "a GGUF file.* give the .safetensors"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:aa",
        "the pointer.*git lfs pull",
    ),
    "a web page": (b"<!DOCTYPE html>\n<html>Please log in", "text .'<!DOCTYPE.* get it again"),
    "a message": ("Zugriff überall verweigert".encode(), "text .'Zugriff"),
    "old PyTorch": (saved({}, _use_new_zipfile_serialization=False), "an old pickle"),
    "empty": (b"", "an empty file; get it again"),
    "a picture": (PICTURE, "neither a .safetensors nor"),
    "three bytes": (b"\1\2\3", "neither a .safetensors nor"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_what_is_given_in_the_place_of_weights_is_named_with_what_to_do(tmp_path, case):
    content, named = STRANGERS[case]
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"a.safetensors: can't be read: {named}") as refused:
        kind_of(tmp_path / "a.safetensors")
    assert "\n" not in str(refused.value)
