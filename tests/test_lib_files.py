"""Files are whole or not there, damage is found, and no reader runs code."""

import contextlib
import errno
import json
import os
import pickle
import random
import resource
import stat
import struct
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PICTURE, Bomb, saved

from lib import files, samples, scores
from lib.errors import CheckpointError, DataError, RunError
from sd3 import weights

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def test_a_file_is_never_half_written(tmp_path, monkeypatch):
    """Cut in the middle of writing, the old content is still there under the name."""
    path = tmp_path / "teacher.pt"
    files.save(dict(a=1), path)

    def half(value, file):
        file.write(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(torch, "save", half)
        files.save(dict(a=2), path)
    assert torch.load(path, weights_only=True) == dict(a=1)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_so_is_the_name(tmp_path, monkeypatch):
    """What a loss of power leaves is the old file or the new one: synced, renamed, synced."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(*names):
        done.append("name")
        replace(*names)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    files.save(dict(a=1), tmp_path / "state.pt")
    assert done == ["file", "name", "folder"]


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_none(tmp_path, size):
    """Also where torch.save hides it; a limit of 500 bytes per file stands for the disk."""
    path, old = tmp_path / "state.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, old[1]))
    try:
        with pytest.raises(OSError, match="File too large") as full:
            files.save(dict(a=torch.zeros(size)), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert full.value.filename == str(path)
    assert not list(tmp_path.iterdir())


def test_a_published_file_has_the_mode_of_any_new_file_whatever_a_library_made_of_it(tmp_path):
    """safetensors puts one of its own, closed to others, in the place of the file that is open."""
    (tmp_path / "any").touch()
    with files.replacing(tmp_path / "a.safetensors") as file:
        own, name = tempfile.mkstemp(dir=tmp_path)
        os.close(own)
        os.replace(name, file.name)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("linked", [True, False], ids=["a second name", "a copy"])
def test_a_linked_file_has_the_same_content_and_nothing_is_overwritten(
    tmp_path, monkeypatch, linked
):
    """Where the file system has no links it is a copy."""

    def refuse(old, new):
        raise OSError("no links here")

    if not linked:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"first")
    files.link(tmp_path / "a", tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").read_bytes() == b"first"
    assert (tmp_path / "a").samefile(tmp_path / "new" / "b") == linked
    (tmp_path / "c").write_bytes(b"second")
    files.link(tmp_path / "c", tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").read_bytes() == b"first"


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", ["a.pt", "caf\udce9.pt"], ids=["plain", "not UTF-8"])
def test_what_was_saved_is_read_again_whole_and_mapped(tmp_path, name, mmap):
    """With a file name that is no text, too."""
    value, path = dict(a=torch.arange(500), b=[1, "x"]), tmp_path / name
    try:
        files.save(value, path)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    read = files.read(path, mmap=mmap)
    assert torch.equal(read["a"], value["a"]) and read["b"] == value["b"]


@pytest.mark.parametrize("mmap", [False, True])
def test_any_flipped_byte_is_found(tmp_path, mmap):
    """Refused by name, or read as it was written: so are some in the zip's own notes. A byte of a
    tensor is always refused."""
    path, rng = tmp_path / "state.pt", random.Random(0)
    value = torch.arange(500)
    files.save(dict(a=value), path)
    content = path.read_bytes()
    first = content.index(value.numpy().tobytes())
    for at in [*rng.sample(range(len(content)), 200), *range(len(content) - 100, len(content))]:
        path.write_bytes(
            content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        )
        try:
            assert torch.equal(files.read(path, mmap=mmap)["a"], value)
            assert not first <= at < first + value.nbytes
        except CheckpointError as error:
            assert "state.pt" in str(error)


def test_a_checksum_tells_files_apart_and_not_their_copies(tmp_path):
    for name, value in dict(a=1.0, b=1.0, c=2.0).items():
        files.save(dict(a=torch.full((9,), value)), tmp_path / name)
    a, b, c = (files.checksum(tmp_path / name) for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_code_in_a_file_is_never_run(tmp_path, protocol, mmap):
    """A file that would run code on loading is refused, and its code has not run."""
    mark, path = tmp_path / "mark", tmp_path / "bomb.pt"
    if protocol == "torch":
        torch.save(Bomb(mark), path)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark), 2))
    with pytest.raises(CheckpointError, match="can't be read"):
        files.read(path, mmap=mmap)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))  # the bomb is live
    assert mark.exists()


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    """torch.load would make 20 MB of 20 kB, and 10 GB of 10 MB."""
    torch.save(dict(more=torch.zeros(5_000_000)), tmp_path / "plain.pt")
    path = tmp_path / "packed.pt"
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert torch.load(path, weights_only=True)["more"].shape == (5_000_000,)
    with pytest.raises(CheckpointError, match="it is compressed"):
        files.read(path)


def test_pickles_and_arrays_are_only_read_by_readers_that_run_no_code():
    """In the source of every program."""
    folders = (".", "lib", "sd3", "methods", "tools")
    sources = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    assert len(sources) > 30
    for path in sources:
        source = path.read_text(encoding="utf-8")
        for call in source.split("torch.load(")[1:]:
            assert "weights_only=True" in call.split("\n")[0]
        for call in source.split("np.load(")[1:]:
            assert "allow_pickle=False" in call.split("\n")[0]
        assert "pickle.load" not in source and "eval(" not in source.replace(".eval(", "")


MACHINE = {  # what reading a sound file may raise, and what is said
    "permission": (PermissionError(errno.EACCES, "Permission denied", "a.pt"), OSError),
    "a failing disk": (OSError(errno.EIO, "Input/output error", "a.pt"), OSError),
    "too many open files": (OSError(errno.EMFILE, "Too many open files", "a.pt"), OSError),
    "no memory": (MemoryError(), RunError),
    "no memory for a tensor": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RunError,
    ),
    "no memory to map": (RuntimeError("unable to mmap: Cannot allocate memory (12)"), RunError),
    "no memory on a GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), RunError),
}


READERS = ("checkpoint", "samples", "judge", "SD3")
CASES = {(reader, case) for reader in READERS for case in MACHINE}


@pytest.mark.parametrize(
    ("reader", "case"),
    sorted(CASES - {("judge", "permission")}),  # which is made anew
)
def test_only_wrong_content_is_called_damage(tmp_path, monkeypatch, case, reader):
    """What is wrong with the machine is told as it is, without advice to delete a sound file."""
    if reader == "SD3":
        pytest.importorskip("safetensors")
    raised, told = MACHINE[case]
    dataset = SimpleNamespace(name="", attributes={}, channels=3)
    s = SimpleNamespace(size=(8, 8), judge_steps=2, judge_width=8)
    readers = dict(
        checkpoint=lambda: files.read(tmp_path / "a.pt"),
        samples=lambda: samples.read_file(tmp_path / "a.pt", 3, 2, check=True, first=0),
        judge=lambda: scores.get_judge(
            lambda *_: (torch.zeros(1), torch.zeros(1)), dataset, s, "cpu", tmp_path, "fp32"
        ),
        SD3=lambda: weights.open_sd3(tmp_path / "a.pt"),
    )
    files.save(dict(a=1), tmp_path / "a.pt")
    readers["judge"]()

    def fail(*_, **options):
        raise raised

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(told) as error:
        readers[reader]()
    said = str(error.value)
    assert "damaged" not in said and "elete" not in said and ".pt" in said and "\n" not in said


def test_tensors_of_another_device_are_read_onto_the_cpu(tmp_path, monkeypatch):
    """A checkpoint of a GPU is a sound file on a machine that has none."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    files.save(dict(a=torch.ones(2)), tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "a.pt", weights_only=True)
    for mmap in (False, True):
        assert files.read(tmp_path / "a.pt", mmap=mmap)["a"].device.type == "cpu"


def test_an_object_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError, match=r"config\.json"):
        files.read_object(tmp_path / "config.json")


# ---------------------------------------------------------------------------------------------
# Text and JSON
# ---------------------------------------------------------------------------------------------

PROMPTS = {
    "not UTF-8": (b"caf\xe9\n", "can't be read"),
    "UTF-16": ("a cat\n".encode("utf-16"), "can't be read"),
    "empty": (b"", "no prompt"),
    "nothing but control characters": (b"\0\x1b\x07\n\r\n\x7f", "no prompt"),
    "a folder": (None, "can't be read"),
    "a device": ("/dev/zero", "can't be read"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_bad_file_of_prompts_is_refused_by_name(tmp_path, case):
    content, reason = PROMPTS[case]
    path = tmp_path / "prompts.txt"
    if content is None:
        path.mkdir()
    elif isinstance(content, str):
        path.symlink_to(content)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as refused:
        files.read_lines(path, "--prompts")
    assert f"--prompts {path}" in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_of_prompts_has_an_end(tmp_path):
    """After so many bytes it is refused; up to there it is read."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"x" * 100)
    assert files.read_lines(path, "--prompts", most=100) == ["x" * 100]
    with pytest.raises(DataError, match="more than 99 bytes"):
        files.read_lines(path, "--prompts", most=99)


def test_odd_prompts_are_read_as_clean_lines(tmp_path):
    """Each once, or as often as it is there; a device that never ends is refused."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa \x1b[31mcat\0\r\n\x07\n\na  [31mcat\nb\n")
    assert files.read_lines(path, "--prompts") == ["a  [31mcat", "b"]
    again = files.read_lines(path, "--prompts", repeated=True)
    assert again == ["a  [31mcat", "a  [31mcat", "b"]
    with pytest.raises(DataError, match="/dev/zero: can't be read"):
        files.read_lines("/dev/zero", "--prompts")


def test_a_line_ends_where_an_editor_ends_it_and_nowhere_else(tmp_path):
    (tmp_path / "a.txt").write_bytes("a\u2028b\x0cc\x85d\r\ne\rf".encode())
    assert files.read_lines(tmp_path / "a.txt", "--prompts") == ["a\u2028b c d", "e", "f"]


JSON = {
    "empty": b"",
    "cut": b'{"seed": ',
    "a list": b"[1, 2]",
    "a number": b"7",
    "not UTF-8": b'{"preset": "\xff"}',
    "nested": b'{"preset":' + b"[" * 100_000,
}


@pytest.mark.parametrize("case", JSON)
def test_a_damaged_object_is_refused_by_name(tmp_path, case):
    path = tmp_path / "config.json"
    path.write_bytes(JSON[case])
    with pytest.raises(DataError, match=f"{path} is damaged"):
        files.read_object(path)


def test_an_object_that_is_not_there_is_called_missing(tmp_path):
    with pytest.raises(DataError, match=r"config\.json is missing"):
        files.read_object(tmp_path / "config.json")


def test_an_object_that_was_written_is_read_again(tmp_path):
    """Text that is half a character becomes a question mark, and stops nothing."""
    files.write_json(dict(a=[1, 2.5], b="ü猫"), tmp_path / "a.json")
    assert files.read_object(tmp_path / "a.json") == dict(a=[1, 2.5], b="ü猫")
    files.write_text("caf\udce9", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"caf?"
    assert json.loads((tmp_path / "a.json").read_text())


# ---------------------------------------------------------------------------------------------
# What a file of weights is, by its content
# ---------------------------------------------------------------------------------------------

HEADER = json.dumps({}).encode()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.sft", "a.CKPT", "a.bin", "a"])
def test_what_a_file_is_does_not_depend_on_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(saved({}))
    assert files.kind_of(tmp_path / name) == "torch"
    (tmp_path / name).write_bytes(struct.pack("<Q", len(HEADER)) + HEADER)
    assert files.kind_of(tmp_path / name) == "safetensors"


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
        files.kind_of(tmp_path / "a.safetensors")
    assert "\n" not in str(refused.value)
