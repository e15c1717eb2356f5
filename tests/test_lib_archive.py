"""lib/archive.py: zips that are broken or meant to harm are refused by name, in one line.

Every file is made here, by code.
"""

import io
import os
import stat
import struct
import zipfile

import pytest
from conftest import PICTURE, folder, plain, run_on, zipped

import ladd
from lib import archive
from lib.errors import DataError

PETS = {f"cat/{k}.png": plain(k) for k in range(12)}


def test_a_list_may_spell_a_files_accent_otherwise_but_an_exact_name_comes_first(tmp_path):
    """A Mac writes é as two signs, people as one."""
    apart, one = "cafe\u0301.png", "caf\u00e9.png"
    assert archive.Files(folder(tmp_path / "a", {apart: PICTURE})).called(one) == apart
    both = archive.Files(folder(tmp_path / "both", {apart: PICTURE, one: PICTURE}))
    assert [both.called(name) for name in (apart, one, "x")] == [apart, one, "x"]


MEMBERS = {
    "absolute": ({"/etc/x.png": PICTURE}, 0, "/etc/x.png leads out of its folder"),
    "a drive": ({"C:\\x.png": PICTURE}, 0, "leads out"),
    "upwards": ({"cat/../../x.png": PICTURE}, 0, "cat/../../x.png leads out"),
    "upwards by backslashes": ({"cat\\..\\..\\x.png": PICTURE}, 0, "leads out"),
    "upwards, no picture": ({"../.bashrc": b"echo"}, 0, "../.bashrc leads out"),
    "a link": ({"cat/x.png": b"/etc/passwd"}, stat.S_IFLNK, "cat/x.png is a link or a device"),
    "a device": ({"cat/x.png": b""}, stat.S_IFCHR, "cat/x.png is a link or a device"),
    "a pipe": ({"cat/x.png": b""}, stat.S_IFIFO, "cat/x.png is a link or a device"),
    "other case": ({"Cat/1.PNG": PICTURE}, 0, "Cat/1.PNG is there twice"),
    "other case, beyond ASCII": ({"é.png": PICTURE, "É.png": PICTURE}, 0, "is there twice"),
    "escapes in its name": ({"\x1b[2J/../x.png": PICTURE}, 0, "leads out"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_a_zip_that_would_not_unpack_to_what_it_shows_is_refused_by_name(tmp_path, refused, case):
    files, mode, reason = MEMBERS[case]
    path = zipped(tmp_path / "set.zip", PETS | files, mode=mode)
    refused(ladd, run_on(path), 2, path, reason)


def test_a_zip_with_the_names_of_windows_is_read_as_any(tmp_path):
    """zipfile itself has "\\" in a name become "/" on Windows alone."""
    pets = {name.replace("/", "\\"): content for name, content in PETS.items()}
    path = zipped(tmp_path / "set.zip", {"cat\\": b""} | pets)
    files = archive.Files(path)
    assert files.names == sorted(PETS) and files.read("cat/3.png") == PETS["cat/3.png"]


@pytest.mark.parametrize("name", ["Kätzchen", "猫"])
def test_names_in_utf_8_are_read_where_the_zip_does_not_say_that_they_are(tmp_path, name):
    """As Linux's own zip writes them; of others, which are no UTF-8, DOS' letters are read."""
    stand_in = "?" * len(name.encode())
    path = zipped(tmp_path / "set.zip", {f"{stand_in}/0.png": PICTURE, "B!r/0.png": PICTURE})
    content = path.read_bytes().replace(stand_in.encode(), name.encode())
    path.write_bytes(content.replace(b"B!r", b"B\x84r"))
    files = archive.Files(path)
    assert set(files.names) == {f"{name}/0.png", "Bär/0.png"}
    assert files.read(f"{name}/0.png") == PICTURE


def test_a_zip_whose_names_begin_with_a_dot_and_a_slash_is_read_as_any(tmp_path):
    """Some archivers pack "." itself; what leads out of it is refused as elsewhere."""
    dotted = {f"./{name}": content for name, content in PETS.items()}
    files = archive.Files(zipped(tmp_path / "set.zip", {"./": b""} | dotted))
    assert files.names == sorted(PETS) and not files.left_out
    assert files.read("cat/3.png") == PETS["cat/3.png"]
    with pytest.raises(DataError, match="leads out"):
        archive.Files(zipped(tmp_path / "out.zip", dotted | {"./../x.png": PICTURE}))


def test_a_file_without_a_name_is_refused(tmp_path, refused):
    """zipfile ends a name at its first zero byte."""
    path = zipped(tmp_path / "set.zip", PETS | {"?.png": PICTURE})
    path.write_bytes(path.read_bytes().replace(b"?.png", b"\0.png"))
    refused(ladd, run_on(path), 2, path, "one of its files has no name")


def test_a_name_that_is_there_twice_is_refused(tmp_path, refused):
    path = zipped(tmp_path / "set.zip", PETS)
    with zipfile.ZipFile(path, "a") as out, pytest.warns(UserWarning, match="Duplicate"):
        out.writestr("cat/1.png", PICTURE)
    refused(ladd, run_on(path), 2, path, "cat/1.png is there twice")


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (zipfile.ZIP_DEFLATED, "bytes unpacked"),
        (zipfile.ZIP_BZIP2, "another method than deflate"),
        (zipfile.ZIP_LZMA, "another method than deflate"),
    ],
)
@pytest.mark.parametrize("name", ["cat/bomb.png", "captions.jsonl", "cat/1.txt"])
def test_a_compression_bomb_is_named_and_not_unpacked(tmp_path, refused, name, method, reason):
    path = zipped(tmp_path / "set.zip", PETS | {name: b"\0" * (20 << 20)}, method)
    said = refused(ladd, run_on(path), 2, path)
    assert name in said and reason in said


def test_a_bomb_that_lies_about_its_size_is_unpacked_no_further(tmp_path, monkeypatch):
    """What counts is what comes out, not what the header says."""
    path = zipped(tmp_path / "set.zip", {"cat/bomb.png": b"\0" * (20 << 20)})
    content = bytearray(path.read_bytes())
    for at, place in ((content.rindex(b"PK\1\2"), 24), (0, 22)):
        content[at + place : at + place + 4] = struct.pack("<I", 1 << 30)  # claims 1 GB
    path.write_bytes(content)
    files = archive.Files(path)
    monkeypatch.setattr(archive, "MOST_BYTES", 1 << 16)
    with pytest.raises(ValueError, match="more than 65,536 bytes"):
        files.read("cat/bomb.png")


@pytest.mark.parametrize("claim", ["many entries", "a long list", "both, in zip64"])
def test_a_zip_that_claims_millions_of_files_is_refused_before_they_are_read(
    tmp_path, refused, claim
):
    path = zipped(tmp_path / "set.zip", PETS)
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\5\6")
    if claim == "many entries":
        content[end + 8 : end + 12] = b"\xfe\xff\xfe\xff"
        content[end + 12 : end + 16] = struct.pack("<I", 46 * 65534)
    elif claim == "a long list":
        content[end + 12 : end + 20] = struct.pack("<II", 3 << 30, 0)
    else:
        record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *[10**9] * 2, 46 * 10**9, 0)
        record += struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
        content[end:end] = record
    path.write_bytes(content)
    refused(ladd, run_on(path), 2, path, "not a readable zip")


def test_a_zip_whose_list_of_names_is_too_long_is_refused_before_it_is_read(
    tmp_path, refused, monkeypatch
):
    path = zipped(tmp_path / "set.zip", {f"cat/{k}.png": b"" for k in range(500)})
    monkeypatch.setattr(archive, "MOST_BYTES", 20_000)
    refused(ladd, run_on(path), 2, path, "too many files")


def encrypt(content):
    content = bytearray(content)
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + place] |= 1
            at = content.find(mark, at + 1)
    return bytes(content)


def harmed_zips():
    whole = zipped(io.BytesIO(), PETS).getvalue()
    inner = zipped(io.BytesIO(), {"set/inner.zip": whole}).getvalue()
    flipped = bytearray(whole)
    for at in range(40, len(whole) - 700, 97):
        flipped[at] ^= 0xFF
    return {
        "encrypted": (encrypt(whole), "can't be read, more than 1 %"),
        "in a zip": (inner, "no images in it"),
        "cut short": (whole[:-200], "not a readable zip"),
        "cut in front": (whole[200:], ""),
        "empty": (b"PK\5\6" + b"\0" * 18, "no images in it"),
        "flipped": (bytes(flipped), ""),
    }


@pytest.mark.parametrize("case", harmed_zips())
def test_a_zip_that_cannot_be_read_is_refused_by_name(tmp_path, refused, case):
    content, reason = harmed_zips()[case]
    (tmp_path / "set.zip").write_bytes(content)
    refused(ladd, run_on("set.zip"), 2, "set.zip", reason)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to itself"])
def test_data_that_is_neither_folder_nor_file_is_refused_at_once(tmp_path, refused, kind):
    path = tmp_path / "set.zip"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path)
    refused(ladd, run_on(path), 2, path)


# ---------------------------------------------------------------------------------------------
# Folders and their links
# ---------------------------------------------------------------------------------------------

# What a link in set/ leads to, and what is read by it.
LINKS = {
    "a folder elsewhere": ("../far/car", ["link/1.png", "link/deep/2.png"]),
    "a folder that is read as itself": ("cat", []),
    "its own folder": (".", []),
    "the folder above": ("..", []),
    "the root": ("/", []),
    "itself": ("link", []),
    "nowhere": ("../gone", []),
    "a file": ("../far/car/1.png", ["link"]),
    "a folder with a link back": ("../loop", ["link/3.png"]),
}


@pytest.mark.parametrize("case", LINKS)
def test_a_link_is_followed_once_and_never_in_a_circle(tmp_path, case):
    target, behind = LINKS[case]
    files = {"set/cat/0.png": b"", "far/car/1.png": b"", "far/car/deep/2.png": b""}
    folder(tmp_path, files | {"loop/3.png": b""})
    (tmp_path / "loop/back").symlink_to(tmp_path / "set")
    (tmp_path / "loop/again").symlink_to(tmp_path / "loop")
    (tmp_path / "set/link").symlink_to(target)
    files = archive.Files(tmp_path / "set")
    assert files.names == ["cat/0.png", *behind]
    told = [name for names in files.left_out.values() for name in names]
    if not behind:
        assert told == ["link"]
    for name in behind:
        files.read(name)


def test_of_two_links_to_a_folder_the_first_is_followed(tmp_path):
    folder(tmp_path, {"far/1.png": b"", "set/0.png": b""})
    for name in ("b", "a"):
        (tmp_path / "set" / name).symlink_to("../far")
    files = archive.Files(tmp_path / "set")
    assert files.names == ["0.png", "a/1.png"]
    assert files.left_out == {"linked a second time": ["b"]}


def test_folders_and_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    path, listdir = folder(tmp_path, {"cat/0.png": b"", "dog/1.png": b""}), os.listdir
    os.mkfifo(path / "cat/pipe.png")

    def refuse(place):  # root may read anything
        if os.fspath(place).endswith("dog"):
            raise PermissionError(13, "Permission denied", place)
        return listdir(place)

    monkeypatch.setattr(os, "listdir", refuse)
    files = archive.Files(path)
    assert files.names == ["cat/0.png"]
    assert sorted(files.left_out["unreadable"]) == ["cat/pipe.png", "dog (Permission denied)"]


def test_a_sound_zip_that_the_system_does_not_give_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    path = zipped(tmp_path / "set.zip", PETS)
    monkeypatch.setattr(archive, "ZipBytes", refuse)
    with pytest.raises(PermissionError):
        archive.Files(path)


@pytest.mark.parametrize("content", [b"hello", b"", None], ids=["text", "empty", "cut"])
def test_a_file_that_is_no_whole_zip_is_refused_by_name(tmp_path, content):
    whole = zipped(tmp_path / "set.zip", PETS).read_bytes()
    path = tmp_path / "bad.zip"
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(DataError, match=r"not a readable zip.*cut short") as error:
        archive.Files(path)
    assert str(path) in str(error.value)
