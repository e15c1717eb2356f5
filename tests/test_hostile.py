"""Files that are broken or meant to harm: one line that names the file, and nothing else happens.

Every file is made here, by code. The last test flips and cuts bytes of all kinds of files at
random, in a process of its own, and holds it to its time and memory.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import data
import ladd
import sample
from mmdit import MMDiT, open_sd3

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------
# Making files
# ---------------------------------------------------------------------------------------------


def encode(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def plain(k, size=(3, 2), kind="PNG", **options):
    """A picture of one colour that belongs to the number k."""
    return encode(Image.new("RGB", size, (k, 255 - k, 7 * k % 256)), kind, **options)


PETS = {f"cat/{k}.png": plain(k) for k in range(12)}


def folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def zipped(path, files, method=zipfile.ZIP_DEFLATED, mode=0):
    """A zip of files {name: content}; the last of them packed by `method`, and of Unix' `mode`."""
    with zipfile.ZipFile(path, "w") as out:
        for name, content in files.items():
            info, last = zipfile.ZipInfo(name), name == list(files)[-1]
            info.external_attr = mode << 16 if last else 0
            out.writestr(info, content, method if last else zipfile.ZIP_DEFLATED)
    return path


def chunk(kind, content):
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(width, height, rows=b"\0" * 100):
    """A PNG of grey pixels that claims a size, right in every checksum."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + end


class Bomb:
    """Unpickled without care, this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


NETWORK = dict(depth=1, width=16, heads=1, patch=2, channels=3, context_dim=6, pooled_dim=6)
NETWORK |= dict(pos_size=4, qk_norm=False, attn2_blocks=0)
SETTINGS = dict(
    text_dim=6, text_length=4, levels=(1.0, 0.75, 0.5, 0.25), teacher_steps=2, cfg=2.0, shift=1.0,
    size=8, patch=2, pos_size=4, data="shapes", seed=0, evaluation=8, judge_steps=2, judge_width=8,
)  # fmt: skip


def checkpoint(kind="student", **changes):
    """A checkpoint that is sound but for the changes."""
    torch.manual_seed(0)
    weights = MMDiT(**NETWORK).state_dict()
    whole = dict(format="ladd-1", kind=kind, model=NETWORK, weights=weights, settings=SETTINGS)
    return whole | dict(step=1) | changes


def run_folder(path):
    """What `sample.py` needs of a run."""
    path.mkdir()
    for kind in ("teacher", "student"):
        torch.save(checkpoint(kind), path / f"{kind}.pt")
    return path


def snapshot(path):
    """Every file under a folder with its content; where links lead."""
    return {
        p: os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """refused(program, words, status, *named): a command ends with this status and one line on
    stderr that has these words; no file under the test's folder has changed."""
    monkeypatch.chdir(tmp_path)

    def refused(program, words, status, *named):
        before = snapshot(tmp_path)
        capsys.readouterr()
        try:
            got = program.main([str(word) for word in words])
        except SystemExit as stop:
            got = stop.code
        said = capsys.readouterr().err
        assert got == status, said
        line = said.splitlines()[-1]
        assert line.startswith(f"{Path(program.__file__).name}: "), said
        assert "Traceback" not in said and line.isprintable()
        for word in named:
            assert str(word) in line
        assert snapshot(tmp_path) == before
        return said

    return refused


CPU = ["--device", "cpu", "--precision", "fp32"]


def train(path, *words):
    """The command line of a run on other data, which is refused before anything is trained."""
    return ["--smoke", "--data", path, "--out", "run", *CPU, *words]


# ---------------------------------------------------------------------------------------------
# Zips
# ---------------------------------------------------------------------------------------------

PICTURE = plain(1)
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
    refused(ladd, train(path), 2, path, reason)


def test_a_file_without_a_name_is_refused(tmp_path, refused):
    """zipfile ends a name at its first zero byte."""
    path = zipped(tmp_path / "set.zip", PETS | {"?.png": PICTURE})
    path.write_bytes(path.read_bytes().replace(b"?.png", b"\0.png"))
    refused(ladd, train(path), 2, path, "one of its files has no name")


def test_a_name_that_is_there_twice_is_refused(tmp_path, refused):
    path = zipped(tmp_path / "set.zip", PETS)
    with zipfile.ZipFile(path, "a") as out, pytest.warns(UserWarning, match="Duplicate"):
        out.writestr("cat/1.png", PICTURE)
    refused(ladd, train(path), 2, path, "cat/1.png is there twice")


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
    said = refused(ladd, train(path), 2, path)
    assert name in said and reason in said


def test_a_bomb_that_lies_about_its_size_is_unpacked_no_further(tmp_path, monkeypatch):
    """What counts is what comes out, not what the header says."""
    path = zipped(tmp_path / "set.zip", {"cat/bomb.png": b"\0" * (20 << 20)})
    content = bytearray(path.read_bytes())
    for at, place in ((content.rindex(b"PK\1\2"), 24), (0, 22)):
        content[at + place : at + place + 4] = struct.pack("<I", 1 << 30)  # claims 1 GB
    path.write_bytes(content)
    files = data.Files(path)
    monkeypatch.setattr(data, "MOST_BYTES", 1 << 16)
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
    refused(ladd, train(path), 2, path, "not a readable zip")


def test_a_zip_whose_list_of_names_is_too_long_is_refused_before_it_is_read(
    tmp_path, refused, monkeypatch
):
    path = zipped(tmp_path / "set.zip", {f"cat/{k}.png": b"" for k in range(500)})
    monkeypatch.setattr(data, "MOST_BYTES", 20_000)
    refused(ladd, train(path), 2, path, "too many files")


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
    refused(ladd, train("set.zip"), 2, "set.zip", reason)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to itself"])
def test_data_that_is_neither_folder_nor_file_is_refused_at_once(tmp_path, refused, kind):
    path = tmp_path / "set.zip"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path)
    refused(ladd, train(path), 2, path)


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def broken_pictures():
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    jpeg = encode(Image.fromarray(noise), "JPEG")
    webp = encode(Image.fromarray(noise), "WEBP")
    frame = jpeg.index(b"\xff\xc0")  # then length, precision, height, width
    return {
        "400 million pixels": png(20_000, 20_000),
        "4 · 10^18 pixels": png(2**31 - 1, 2**31 - 1),
        "70 million pixels": png(7000, 10_000),
        "no width": png(0, 5),
        "no height": png(5, 0),
        "JPEG, 65,535 squared": jpeg[: frame + 5] + b"\xff" * 4 + jpeg[frame + 9 :],
        "JPEG without size": jpeg[: frame + 5] + b"\0" * 4 + jpeg[frame + 9 :],
        "JPEG cut": jpeg[: len(jpeg) // 2],
        "WebP cut": webp[: len(webp) // 2],
        "a program for Ghostscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "TIFF": encode(Image.new("L", (4, 4)), "TIFF"),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "HTML": b"<!DOCTYPE html><title>404</title>",
    }


@pytest.mark.parametrize("case", broken_pictures())
def test_a_broken_picture_stops_a_small_set_and_an_init_image_by_name(tmp_path, refused, case):
    """1 of 13 is more than 1 %. The picture is named with its reason."""
    content = broken_pictures()[case]
    path = folder(tmp_path / "set", PETS | {"cat/broken.png": content})
    said = refused(ladd, train(path), 2, path, "1 of 13 images", "cat/broken.png")
    assert f"skipped {path}: cat/broken.png: " in said
    words = [run_folder(tmp_path / "made"), "--prompt", "x", "--out", "a.png", *CPU]
    words += ["--init-image", path / "cat/broken.png"]
    refused(sample, words, 2, "broken.png", "can't be read")


def test_one_broken_picture_in_a_hundred_is_skipped_counted_and_named(tmp_path, capsys):
    files = {f"cat/{k}.png": plain(k) for k in range(100)} | {"cat/7.png": png(7000, 10_000)}
    dataset = data.load_files(zipped(tmp_path / "set.zip", files), 4, 4)
    assert dataset.train_size + len(dataset.held_out_images) == 99
    said = capsys.readouterr().err
    assert "cat/7.png: 7000 × 10000 pixels" in said and "skipped 1 of 100" in said


def frames(kind):
    """An animation that begins red."""
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = dict(lossless=True) if kind == "WEBP" else {}
    return encode(pictures[0], kind, save_all=True, append_images=pictures[1:], **options)


def turned():
    """Stored lying; its EXIF says that it was taken upright, red on top."""
    image, exif = Image.new("RGB", (32, 16), "red"), Image.Exif()
    image.paste("blue", (16, 0, 32, 16))
    exif[0x0112] = 6
    return encode(image, "PNG", exif=exif)


def swapped(whole=True):
    """sRGB's profile with red and blue changed about: blue pixels are red to who applies it."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"    "), (b"bXYZ", b"rXYZ"), (b"    ", b"bXYZ")):
        profile = profile.replace(old, new)
    return profile if whole else profile[: len(profile) // 2]


def press():
    """A printing press whose yellow is red, and whose other colours are no ink at all."""
    inks = np.indices((2, 2, 2, 2)).reshape(4, -1).T  # of C, M, Y, K: none or all
    lab = [(0, 128, 128) if k else (136, 208, 195) if y else (255, 128, 128) for *_, y, k in inks]
    ramp, same = bytes(range(256)), (np.eye(3, dtype=">i4") << 16).tobytes()
    lut = b"mft1\0\0\0\0\4\3\2\0" + same + 4 * ramp + np.uint8(lab).tobytes() + 3 * ramp
    head = (2 << 24, b"prtr", b"CMYK", b"Lab ", b"acsp", 63190, 65536, 54061, 1)
    body = struct.pack(">4xI4s4s4s12x4s28x3i48xI", *head)
    body += struct.pack(">4sII", b"A2B0", 144, len(lut)) + lut
    return struct.pack(">I", len(body) + 4) + body


def blue(mode, **options):
    return encode(Image.new(mode, (16, 16), "blue"), **options)


RED = Image.new("RGB", (16, 16), "red")
CMYK = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
YELLOW = Image.new("CMYK", (16, 16), (0, 0, 255, 0))
NOISE = np.random.default_rng(0).bytes(5 << 20)  # which no zip makes smaller
ODD = {
    "PNG by another name": encode(RED),
    "JPEG by another name": encode(RED, "JPEG", quality=95),
    "WebP by another name": encode(RED, "WEBP", lossless=True),
    "animated GIF": frames("GIF"),
    "animated PNG": frames("PNG"),
    "animated WebP": frames("WEBP"),
    "turned by its EXIF": turned(),
    "16 bits": encode(Image.fromarray(np.full((8, 8), 65535, np.uint16))),
    "CMYK": encode(CMYK, "JPEG", quality=95),
    "CMYK with a profile": encode(YELLOW, "JPEG", quality=95, icc_profile=press()),
    "CMYK with a broken profile": encode(CMYK, "JPEG", quality=95, icc_profile=b"no profile" * 40),
    "CMYK with a profile of RGB": encode(CMYK, "JPEG", quality=95, icc_profile=swapped()),
    "RGB with a profile": blue("RGB", icc_profile=swapped()),
    "RGBA with a profile": blue("RGBA", icc_profile=swapped()),
    "a palette with a profile": blue("P", icc_profile=swapped()),
    "RGB with a profile of CMYK": encode(RED, icc_profile=press()),
    "RGB with a broken profile": encode(RED, icc_profile=b"\xff" * 500),
    "RGB with a profile cut short": encode(RED, icc_profile=swapped(whole=False)),
    "RGB with a profile of 5 MB": encode(RED, "JPEG", quality=95, icc_profile=swapped() + NOISE),
    "one pixel": encode(RED.resize((1, 1))),
    "a strip": encode(RED.resize((5000, 1))),
    "bytes behind its end": encode(RED) + b"PK\3\4" * 100,
    "a broken EXIF block": encode(RED, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("name", ["1.jpg", "1.webp"])
def test_an_odd_picture_is_read_all_the_same(tmp_path, capsys, case, name):
    """Content decides, not the name; of animations the first frame; turned as EXIF says."""
    dataset = data.load_files(zipped(tmp_path / "set.zip", {f"cat/{name}": ODD[case]}), 8, 4)
    pixels = dataset.images[0, :, 1, 1].int()
    want = torch.tensor([255] * 3 if case == "16 bits" else [255, 0, 0])
    assert (pixels - want).abs().max() < 12
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------
# Captions and prompts
# ---------------------------------------------------------------------------------------------


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def row(file="0.png", caption="a cat", **more):
    return dict(file=file, caption=caption, **more)


CAPTIONS = {
    "bad JSON": (b'{"file": "0.png", "caption": "x"', "line 1"),
    "no object": (b"7", "line 1"),
    "a text": (b'"0.png"', "line 1"),
    "deep nesting": (b'{"file":' + b"[" * 100_000, "line 1"),
    "a huge number": (b'{"file": "0.png", "caption": ' + b"9" * 5000 + b"}", "line 1"),
    "a huge number beside": (b'{"file":"0.png","caption":"x","n":' + b"9" * 5000 + b"}", "line 1"),
    "a caption of numbers": (lines(row(caption=[1, 2])), "line 1"),
    "a control character": (b'{"file": "0.png", "caption": "a\x1b[2Jb"}', "line 1"),
    "not UTF-8": (b'{"file": "0.png", "caption": "caf\xe9"}', "captions.jsonl can't be read"),
    "UTF-16": (lines(row()).decode().encode("utf-16"), "captions.jsonl can't be read"),
    "twice the same": (lines(row(), row(caption="b")), "line 2 names 0.png a second time"),
    "twice by another way": (lines(row(), row("x/../0.png")), "line 2 names 0.png a second"),
    "missing files": (lines(row(), row("gone.png")), "1 missing files: gone.png"),
    "upwards": (lines(row("../outside.png")), "missing files: ../outside.png"),
    "absolute": (lines(row("/etc/passwd")), "missing files: /etc/passwd"),
    "a NUL in the name": (lines(row("0.png\0.txt")), "missing files"),
    "an escape in the name": (lines(row("\x1b]0;owned\x07")), "missing files"),
    "a name of a megabyte": (lines(row("x" * 10**6)), "missing files"),
    "a folder": (lines(row("sub")), "missing files: sub"),
    "NaN": (b"NaN", "line 1"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_a_bad_caption_list_is_refused_by_name_and_line(tmp_path, refused, case):
    content, reason = CAPTIONS[case]
    files = {"0.png": PICTURE, "sub/1.png": PICTURE, "captions.jsonl": content}
    (tmp_path / "outside.png").write_bytes(PICTURE)
    path = folder(tmp_path / "set", files)
    assert len(refused(ladd, train(path), 2, path, "captions.jsonl", reason)) < 2000


def test_two_lists_that_name_the_same_picture_are_refused(tmp_path, refused):
    files = {"a/0.png": PICTURE, "a/captions.jsonl": lines(row())}
    files["captions.jsonl"] = lines(row("a/0.png"))
    path = folder(tmp_path / "set", files)
    refused(ladd, train(path), 2, path, "captions.jsonl names a/0.png")


def test_a_caption_beside_its_picture_that_is_not_utf8_is_refused_by_name(tmp_path, refused):
    path = folder(tmp_path / "set", {"0.png": PICTURE, "0.txt": b"caf\xe9"})
    refused(ladd, train(path), 2, path, "0.txt can't be read")


@pytest.mark.parametrize("beside", [False, True], ids=["in a list", "beside"])
def test_odd_captions_become_one_clean_line(tmp_path, beside):
    """Empty ones stay (the unconditional caption), 100 kB stay whole, control characters go."""
    texts = ["", "x" * 100_000, "a\x1b[31m\x00red\r\n\tcat", " \x07 ", "y" * 10**6]
    texts += [] if beside else ["half \ud800 a character"]
    want = ["", "x" * 100_000, "a [31m red cat", "", "y" * data.MOST_CAPTION]
    want += [] if beside else ["half ? a character"]
    files = {f"{k}.png": plain(k) for k in range(len(texts))}
    if beside:
        files |= {f"{k}.txt": text.encode() for k, text in enumerate(texts)}
    else:
        files["captions.jsonl"] = lines(*(row(f"{k}.png", t) for k, t in enumerate(texts)))
    dataset = data.load_files(folder(tmp_path, files), 2, 2)
    assert dataset.captions == sorted(set(want))
    context, _ = data.HashedText(8, 4)(dataset.captions)
    assert context.isfinite().all()


PROMPTS = {
    "not UTF-8": (b"caf\xe9\n", "can't be read"),
    "UTF-16": ("a cat\n".encode("utf-16"), "can't be read"),
    "empty": (b"", "no prompt"),
    "nothing but control characters": (b"\0\x1b\x07\n\r\n\x7f", "no prompt"),
    "a folder": (None, "can't be read"),
    "a device": ("/dev/zero", "can't be read"),
    "17 MB": (b"x" * (17 << 20), "can't be read"),
}


def test_a_pipe_or_a_device_is_no_checkpoint(tmp_path, capsys):
    """Reading them might never end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        assert sample.main([str(path), "--prompt", "x", "--out", str(tmp_path / "a.png")]) == 2
        assert str(path) in capsys.readouterr().err


READ_ONLY = """
import os, sys
sys.path.insert(0, {root!r})
import ladd, sample
{first}  # imports all that there is to import
if os.getuid() == 0:  # who may write anywhere
    os.setuid(65534)
sys.exit({program}.main({words!r}))
"""


@pytest.mark.parametrize("program", ["ladd", "sample"])
def test_a_folder_that_may_only_be_read_is_named_and_stays_as_it_is(program):
    with tempfile.TemporaryDirectory() as base:  # pytest's own folders are closed to others
        os.chmod(base, 0o755)
        closed = Path(base) / "closed"
        closed.mkdir(mode=0o555)
        words = ["--smoke", "--out", f"{closed}/run", "--data-dir", f"{closed}/data"]
        first = ""
        if program == "sample":
            own = [f"{run_folder(Path(base) / 'run')}", "--prompt", "x", *CPU, "--out"]
            first, words = f"sample.main({[*own, base + '/a.png']})", [*own, f"{closed}/a.png"]
        code = READ_ONLY.format(root=str(ROOT), program=program, words=words, first=first)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
        assert done.returncode == 1 and str(closed) in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not list(closed.iterdir())


@pytest.mark.parametrize("case", PROMPTS)
def test_a_bad_file_of_prompts_is_refused_by_name(tmp_path, refused, case):
    content, reason = PROMPTS[case]
    path, made = tmp_path / "prompts.txt", run_folder(tmp_path / "made")
    if content is None:
        path.mkdir()
    elif isinstance(content, str):
        path.symlink_to(content)
    else:
        path.write_bytes(content)
    named = [path] if reason == "can't be read" else []
    refused(sample, [made, "--prompts", path, "--out", "a.png", *CPU], 2, reason, *named)


def test_odd_prompts_are_encoded_as_clean_lines(tmp_path):
    """Each once; a device that never ends is refused."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa \x1b[31mcat\0\r\n\x07\n\na  [31mcat\nb\n")
    assert data.read_prompts(path) == ["a  [31mcat", "b"]
    with pytest.raises(data.DataError, match="/dev/zero: can't be read"):
        data.read_prompts("/dev/zero")


def test_odd_prompts_are_drawn_as_clean_lines(tmp_path, capsys):
    path, made = tmp_path / "prompts.txt", run_folder(tmp_path / "made")
    path.write_bytes(b"\xef\xbb\xbfa \x1b[31mcat\0\r\n" + b"very " * 100_000 + b"long\n")
    assert sample.main([f"{made}", "--prompts", f"{path}", "--out", f"{tmp_path}/out", *CPU]) == 0
    with Image.open(tmp_path / "out" / "00000.png") as picture:
        assert picture.info["prompt"] == "a  [31mcat"
    said = capsys.readouterr().err
    assert "only the first 4 words" in said and len(said) < 1000


# ---------------------------------------------------------------------------------------------
# Checkpoints, judges, samples of the teacher, CIFAR-10
# ---------------------------------------------------------------------------------------------


def saved(value, **options):
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def weights_with(**changes):
    return checkpoint()["weights"] | changes


POSITIONS = torch.zeros(1).expand(1, 10**10, 16)  # 640 GB of zeros, kept as one
HARMED = {
    "a list": saved([1, 2]),
    "of another program": saved(dict(format="other")),
    "no weights": saved(dict(format="ladd-1", model=NETWORK, settings=SETTINGS)),
    "weights of another kind": saved(checkpoint(weights=[1, 2])),
    "weights that are texts": saved(checkpoint(weights=weights_with(pos_embed="x"))),
    "a weight too few": saved(checkpoint(weights=dict(list(weights_with().items())[1:]))),
    "a weight too many": saved(checkpoint(weights=weights_with(more=torch.zeros(1)))),
    "a claim of 640 GB": saved(checkpoint(weights=weights_with(pos_embed=POSITIONS))),
    "weights without content": saved(
        checkpoint(weights=weights_with(pos_embed=torch.empty(1, 16, 16, device="meta")))
    ),
    "whole numbers": saved(
        checkpoint(weights={k: v.long() for k, v in checkpoint()["weights"].items()})
    ),
    "a network of another width": saved(checkpoint(model=NETWORK | dict(width=32))),
    "an enormous network": saved(checkpoint(model=NETWORK | dict(width=4 * 10**9))),
    "a million blocks": saved(checkpoint(model=NETWORK | dict(depth=10**6))),
    "no network": saved(checkpoint(model=None)),
    "an argument too many": saved(checkpoint(model=NETWORK | dict(more=1))),
    "no settings": saved(checkpoint(settings=None)),
    "few settings": saved(checkpoint(settings={})),
    "a size that is a text": saved(checkpoint(settings=SETTINGS | dict(size="8"))),
    "an enormous size": saved(checkpoint(settings=SETTINGS | dict(size=10**9))),
    "enormous captions": saved(checkpoint(settings=SETTINGS | dict(text_length=10**12))),
    "other captions": saved(checkpoint(settings=SETTINGS | dict(text_dim=8))),
    "endless sampling": saved(checkpoint(settings=SETTINGS | dict(teacher_steps=10**15))),
    "no levels": saved(checkpoint(settings=SETTINGS | dict(levels="high"))),
    "guidance that is no number": saved(checkpoint(settings=SETTINGS | dict(cfg=float("nan")))),
    "in the old format": saved(checkpoint(), _use_new_zipfile_serialization=False),
    "text": b"hello",
}


@pytest.mark.parametrize("case", HARMED)
def test_a_harmed_checkpoint_is_refused_by_name(tmp_path, refused, case):
    made = run_folder(tmp_path / "made")
    (made / "student.pt").write_bytes(HARMED[case])
    refused(sample, [made, "--prompt", "x", "--out", "a.png", *CPU], 2, made / "student.pt")
    refused(ladd, train("shapes", "--teacher", made / "student.pt"), 2, made / "student.pt")


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path, refused):
    """torch.load would make 20 MB of 20 kB, and 10 GB of 10 MB."""
    made = run_folder(tmp_path / "made")
    with zipfile.ZipFile(io.BytesIO(saved(checkpoint(more=torch.zeros(5_000_000))))) as old:
        files = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(made / "student.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in files.items():
            new.writestr(name, content)
    assert torch.load(made / "student.pt", weights_only=True)["more"].shape == (5_000_000,)
    words = [made, "--prompt", "x", "--out", "a.png", *CPU]
    refused(sample, words, 2, made / "student.pt", "it is compressed")


@pytest.mark.parametrize(
    "settings", [dict(data=3), dict(evaluation=10**15), dict(judge_steps="x"), dict(seed=None)]
)
def test_settings_that_cannot_be_scored_by_are_refused(tmp_path, refused, settings):
    made = run_folder(tmp_path / "made")
    (made / "student.pt").write_bytes(saved(checkpoint(settings=SETTINGS | settings)))
    refused(sample, [made, "--evaluate", *CPU], 2, made, *settings)


def test_the_checkpoint_that_these_are_made_from_is_sound(tmp_path):
    made = run_folder(tmp_path / "made")
    assert sample.main([f"{made}", "--prompt", "x", "--out", f"{tmp_path}/a.png", *CPU]) == 0


SMALL = "--smoke --size 8 --width 16 --depth 1 --heads 1 --text-dim 6 --taps 0 --head-width 8 "
SMALL += "--judge-width 8 --device cpu --precision fp32"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The files of a finished run and its judge, {path: content}."""
    path, here = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(path)
    try:
        assert ladd.main(run_again()) == 0
    finally:
        os.chdir(here)
    return {
        p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*.*") if p.is_file()
    }


def damage(tmp_path, trained, name, content, without=()):
    """The run's files with one of them replaced, some left out."""
    files = {k: v for k, v in trained.items() if k not in without}
    folder(tmp_path, files | {name: content})
    return tmp_path / name


def run_again(*words):
    return [*SMALL.split(), "--out", "run", *words]


SHARD = "run/synthetic/00000.pt"
BOMBED = {
    "teacher": ("run/teacher.pt", ["run/student.pt"]),
    "samples": (SHARD, ["run/student.pt"]),
    "judge": (None, ["run/report.md"]),
}


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
@pytest.mark.parametrize("case", BOMBED)
def test_code_in_a_file_is_never_run(tmp_path, trained, monkeypatch, capsys, case, protocol):
    """Whatever becomes of the run: no code of the file has run, and no traceback is shown."""
    mark, (name, without) = tmp_path / "mark", BOMBED[case]
    name = name or next(k for k in trained if k.startswith("data/judge"))
    bomb = dict(weights=Bomb(mark))
    content = saved(bomb) if protocol == "torch" else pickle.dumps(bomb, 2)
    damage(tmp_path, trained, name, content, without)
    monkeypatch.chdir(tmp_path)
    assert ladd.main(run_again()) in (1, 2)
    said = capsys.readouterr().err
    assert Path(name).name in said and "Traceback" not in said
    assert not mark.exists()
    pickle.loads(pickle.dumps(bomb))  # it is live
    assert mark.exists()


SHARDS = {
    "cut": lambda whole: saved(whole)[:2000],
    "a list": lambda whole: saved([1]),
    "no captions": lambda whole: saved(dict(x0=whole["x0"])),
    "captions that are numbers": lambda whole: saved(whole | dict(captions=[1] * 32)),
    "a caption too few": lambda whole: saved(whole | dict(captions=whole["captions"][1:])),
    "no pictures": lambda whole: saved(whole | dict(x0="x")),
    "pictures of another size": lambda whole: saved(whole | dict(x0=whole["x0"][..., 1:])),
}


@pytest.mark.parametrize("case", SHARDS)
def test_damaged_samples_of_the_teacher_are_refused_by_name(
    tmp_path, trained, monkeypatch, capsys, case
):
    whole = torch.load(io.BytesIO(trained[SHARD]), weights_only=True)
    damage(tmp_path, trained, SHARD, SHARDS[case](whole), ["run/student.pt"])
    monkeypatch.chdir(tmp_path)
    assert ladd.main(run_again()) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"ladd.py: {SHARD} is damaged") and said.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"cut", saved([]), saved(dict(weights={}))])
def test_a_damaged_judge_is_refused_by_name(tmp_path, trained, monkeypatch, capsys, content):
    name = next(k for k in trained if k.startswith("data/judge"))
    damage(tmp_path, trained, name, content, ["run/report.md"])
    monkeypatch.chdir(tmp_path)
    assert ladd.main(run_again()) == 2
    said = capsys.readouterr().err
    assert f"ladd.py: {name}: damaged. Delete it" in said and "Traceback" not in said


JSON = {
    "empty": b"",
    "cut": b'{"seed": ',
    "a list": b"[1, 2]",
    "a number": b"7",
    "not UTF-8": b'{"preset": "\xff"}',
    "nested": b'{"preset":' + b"[" * 100_000,
    "a picture": plain(1),
}


@pytest.mark.parametrize("case", JSON)
def test_a_damaged_config_is_refused_by_name(tmp_path, trained, refused, case):
    damage(tmp_path, trained, "run/config.json", JSON[case])
    refused(ladd, run_again(), 2, "run/config.json", "damaged")


@pytest.mark.parametrize("case", JSON)
def test_damaged_metrics_are_refused_by_name_before_anything_is_scored(
    tmp_path, trained, refused, case
):
    damage(tmp_path, trained, "run/metrics.json", JSON[case])
    refused(sample, ["run", "--evaluate", *CPU], 2, "run/metrics.json", "damaged")


def test_damaged_lines_of_a_log_are_passed_over(tmp_path, trained, monkeypatch):
    """The report still knows how long the stages took, and the log may be added to."""
    log = b"\n".join(JSON.values()) + b"\n" + trained["run/log.jsonl"] + JSON["cut"] + b"\n"
    damage(tmp_path, trained, "run/log.jsonl", log, ["run/report.md", "run/student.pt"])
    monkeypatch.chdir(tmp_path)
    assert ladd.main(run_again()) == 0
    seconds = json.loads(Path("run/metrics.json").read_text())["seconds"]
    assert set(seconds) == set(ladd.STAGES)


def cifar_tar(change=lambda member: None, content=None):
    """A small archive in the form of the official one; `change` alters the third member."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for k, name in enumerate(names):
            batch = {b"data": np.full((2, 3072), k, np.uint8), b"labels": [k, 9]}
            raw = content if content is not None and k == 2 else pickle.dumps(batch, 2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(raw)
            if k == 2:
                change(member)
            tar.addfile(member, io.BytesIO(raw))
    return out.getvalue()


def batch(**changes):
    good = {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]} | changes
    return pickle.dumps({k.encode(): v for k, v in good.items()}, 2)


def nested(depth):
    value = [0] * 10
    for _ in range(depth):
        value = [value] * 10
    return value


def memo():
    """A pickle that puts a value under the number 2^31: pickle's reader in C reserves 32 GB."""
    return b"\x80\x02}r\xff\xff\xff\x7f."


CIFAR = {
    "a link": cifar_tar(lambda m: setattr(m, "type", tarfile.SYMTYPE)),
    "a hard link": cifar_tar(lambda m: setattr(m, "type", tarfile.LNKTYPE)),
    "a device": cifar_tar(lambda m: setattr(m, "type", tarfile.CHRTYPE)),
    "a member elsewhere": cifar_tar(lambda m: setattr(m, "name", "../data_batch_3")),
    "labels beyond the classes": cifar_tar(content=batch(labels=[1, 10])),
    "a label too few": cifar_tar(content=batch(labels=[1])),
    "labels that are texts": cifar_tar(content=batch(labels=["a", "b"])),
    "pixels in nested lists": cifar_tar(content=batch(data=nested(12))),
    "labels in nested lists": cifar_tar(content=batch(labels=nested(12))),
    "pixels of another type": cifar_tar(content=batch(data=np.zeros((2, 3072)))),
    "a number too high": cifar_tar(content=memo()),
    "cut": cifar_tar()[:-100],
    "no gzip": b"hello",
}


@pytest.mark.parametrize("case", CIFAR)
def test_a_cifar_archive_that_only_its_hash_would_vouch_for_is_refused(
    tmp_path, refused, monkeypatch, case
):
    """As if somebody had found another archive of the same SHA-256."""
    archive = tmp_path / "data" / "cifar-10-python.tar.gz"
    folder(tmp_path, {"data/cifar-10-python.tar.gz": CIFAR[case]})
    refused(ladd, train("cifar10"), 2, "not the official CIFAR-10 archive", archive.name)
    monkeypatch.setattr(data, "sha256", lambda path: data.CIFAR_SHA256)
    refused(ladd, train("cifar10", "--size", 32), 2, "data", "CIFAR-10" if case in (
        "a member elsewhere", "cut", "no gzip") else "data_batch_3")  # fmt: skip


def test_pickles_and_arrays_are_only_read_by_readers_that_run_no_code():
    for program in (data, ladd, sample, sys.modules["mmdit"], sys.modules["discriminator"]):
        source = Path(program.__file__).read_text(encoding="utf-8")
        for call in source.split("torch.load(")[1:]:
            assert "weights_only=True" in call.split("\n")[0]
        for call in source.split("np.load(")[1:]:
            assert "allow_pickle=False" in call.split("\n")[0]
        assert "pickle.load" not in source and "eval(" not in source.replace(".eval(", "")


# ---------------------------------------------------------------------------------------------
# Encoded shards, whose notes vouch for whatever a stranger put there
# ---------------------------------------------------------------------------------------------


def shard_of(n, dtype=torch.bfloat16, **more):
    """The content of a shard of n samples for text features 6 wide."""
    tensors = dict(context=torch.ones(n, 4, 6), pooled=torch.ones(n, 6)) | more
    save = pytest.importorskip("safetensors.torch").save
    return save({k: v.to(dtype) for k, v in tensors.items()})


def note_of(content, **changes):
    """What stands beside a shard, by whoever made it: right in size and SHA-256."""
    note = dict(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    note |= dict(latents=[16, 4, 4], captions=["a", "b"])
    return json.dumps(note | changes).encode()


def encoded(path, **changes):
    """A folder of encoded shards that is sound but for the changes; -> its files."""
    first, second = shard_of(1), shard_of(2, latents=torch.ones(2, 16, 4, 4))
    files = {"shards.json": json.dumps(dict(format=data.SHARDS, shards=2)).encode()}
    files |= {"000000.json": note_of(first, latents=None, captions=[""])}
    files |= {"000001.json": note_of(second), "000000.safetensors": first}
    files |= {"000001.safetensors": second}
    folder(path, files | {k.replace("_", "."): v for k, v in changes.items()})
    return files


def shard_with(note=(), **more):
    """The second shard with another content, or with something changed in its note."""
    content = shard_of(2, **({"latents": torch.ones(2, 16, 4, 4)} | more))
    return {"000001_safetensors": content, "000001_json": note_of(content, **dict(note))}


def index_with(**changes):
    return {"shards_json": json.dumps(dict(format=data.SHARDS, shards=2) | changes).encode()}


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
        dict(latents=[16, 3, 4]), latents=torch.ones(2, 16, 3, 4)
    ),
    "no latents": lambda: shard_with(latents=torch.ones(0)),
    "context of another width": lambda: shard_with(context=torch.ones(2, 4, 7)),
    "pooled with a dimension more": lambda: shard_with(pooled=torch.ones(2, 6, 1)),
    "numbers of another type": lambda: shard_with(dtype=torch.float64),
    "no safetensors": lambda: {"000001_safetensors": b"x", "000001_json": note_of(b"x")},
}  # fmt: skip


@pytest.mark.parametrize("case", ENCODED)
def test_strange_shards_are_refused_by_name_though_their_hash_is_right(tmp_path, refused, case):
    words = [*SMALL.split(), "--downscale", 8, "--channels", 16, "--size", 32, "--out", "run"]
    encoded(tmp_path / "sound")
    encoded(tmp_path / "shards", **ENCODED[case]())
    refused(ladd, [*words, "--data", tmp_path / "shards"], 2, tmp_path / "shards")
    settings = ladd.parse([str(word) for word in words])[0]
    ladd.Run(ladd.dataclasses.replace(settings, data=f"{tmp_path}/sound"))  # which is none of it


# ---------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------

NAME = '-two  words, übung 猫 it\'s "quoted" %s{x}\nnext line'


@pytest.mark.parametrize("name", [NAME, "caf\udce9"], ids=["odd", "not UTF-8"])
def test_any_path_serves_as_data_and_folder(tmp_path, monkeypatch, name):
    """Of the images, the downloads and the runs; a checkpoint made there can be sampled."""
    try:
        folder(tmp_path / name / "set", {f"a b/{k}.png": plain(k) for k in range(80)})
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    monkeypatch.chdir(tmp_path / name)
    pictures, out, cache = (f"{tmp_path / name}/{own}" for own in ("set", "run", "data"))
    words = ["--data", pictures, "--out", out, "--data-dir", cache]
    assert ladd.main([*SMALL.split(), *words]) == 0
    assert Path("run/report.md").exists() and list(Path("data").glob("judge*"))
    words = [out, "--prompt", "x", "--out", f"{out}/a.png", *CPU]
    assert sample.main(words) == 0 and Path("run/a.png").exists()


def test_symbolic_links_are_followed_where_the_user_gives_them(tmp_path, monkeypatch):
    """To a folder of data or of runs, and to single pictures; a loop of folders ends nothing."""
    store = folder(tmp_path / "store", {f"{k}.png": plain(k) for k in range(80)})
    (tmp_path / "set" / "cat").mkdir(parents=True)
    for picture in store.iterdir():
        (tmp_path / "set" / "cat" / picture.name).symlink_to(picture)
    (tmp_path / "set" / "cat" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "gone.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    words = [*SMALL.split(), "--data", f"{tmp_path}/link", "--out", f"{tmp_path}/runs/a"]
    assert ladd.main([*words, "--stage", "teacher"]) == 0
    assert (tmp_path / "disk" / "a" / "teacher.pt").exists()
    words = ["runs/a", "--teacher", "--prompt", "x", "--out", "runs/a.png", *CPU]
    monkeypatch.chdir(tmp_path)
    assert sample.main(words) == 0
    assert (tmp_path / "disk" / "a.png").exists()


def blocked(path):
    """A file where a folder should be: for root, who may write anywhere, a read-only folder."""
    path.write_text("in the way")
    return path / "below"


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path, refused):
    path = blocked(tmp_path / "file")
    refused(ladd, [*SMALL.split(), "--out", path], 1, tmp_path / "file")


def test_a_cache_that_cannot_be_made_is_one_line_and_the_run_can_go_on(
    tmp_path, trained, monkeypatch, capsys
):
    damage(tmp_path, trained, "file", b"", ["run/report.md"])
    monkeypatch.chdir(tmp_path)
    assert ladd.main(run_again("--data-dir", "file/below")) == 1
    assert "file" in capsys.readouterr().err.splitlines()[-1]
    assert ladd.main(run_again()) == 0 and Path("run/report.md").exists()


@pytest.mark.parametrize("words", [["--out", "a.png"], ["--out", "folder"]])
def test_a_full_disk_is_one_line_and_leaves_no_picture(tmp_path, refused, words):
    """A limit of 200 bytes per file stands for the disk."""
    made, old = run_folder(tmp_path / "made"), resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "folder").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, old[1]))
    try:
        refused(sample, [made, "--prompt", "x", *words, *CPU], 1, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_an_output_in_the_way_is_never_overwritten(tmp_path, refused):
    made = run_folder(tmp_path / "made")
    files = {"note.png": encode(RED), "text.png": b"hello", "huge.png": png(10**5, 10**5)}
    folder(tmp_path, files)
    (tmp_path / "dir.png").mkdir()
    for name in [*files, "dir.png"]:
        refused(sample, [made, "--prompt", "x", "--out", name, *CPU], 2, name, "choose another")


# ---------------------------------------------------------------------------------------------
# Any file, harmed at random
# ---------------------------------------------------------------------------------------------

ROUNDS = 700


class Hang(BaseException):
    """Raised by the alarm; not an Exception, so that no reader can take it for damage."""


def harm(content, rng):
    """Flips, cuts, repeats or blanks some bytes."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 2, 4, 60)))
        kind = rng.choice(("flip", "flip", "flip", "blank", "fill", "drop", "repeat", "cut"))
        if kind == "flip":
            content[at:end] = bytes(b ^ rng.randrange(256) for b in content[at:end])
        elif kind in ("blank", "fill"):
            content[at:end] = (b"\0" if kind == "blank" else b"\xff") * (end - at)
        elif kind == "cut" and rng.random() < 0.2:
            del content[at:]
        else:
            content[at:end] = b"" if kind == "drop" else content[at:end] * 3
    return bytes(content)


def readers(path):
    """{kind of file: (its name, sound content, what reads it)}"""
    made = run_folder(path / "made")
    words = [*SMALL.split(), "--out", f"{path}/run", "--discriminator", f"{path}/heads.pt"]
    settings = ladd.parse(words)[0]
    for name in ("pictures", "list", "beside"):
        folder(path / name, {"a/0.png": PICTURE})
    load = lambda name: lambda: data.load(f"{path / name}", 8, 8)  # noqa: E731
    few = [plain(k) for k in range(3)]
    whole = zipped(io.BytesIO(), {f"{k}.png": p for k, p in enumerate(few)} | {
        "captions.jsonl": lines(*(row(f"{k}.png") for k in range(3)))}).getvalue()  # fmt: skip
    shard = dict(x0=torch.zeros(2, 3, 8, 8).half(), captions=["a", "b"], index=[0, 1])
    own = [f"{made}", "--out", f"{path}/a.png", *CPU]
    draw = lambda *words: lambda: sample.main([*own, *words])  # noqa: E731
    (path / "run").mkdir()
    ladd.open_folder(settings)
    config = (path / "run/config.json").read_bytes()
    log = lines(dict(stage="teacher", step=1, loss=0.5), dict(stage="teacher", seconds=1.0))
    folder(made, {"student.pt": saved(checkpoint())})
    metrics = json.dumps(dict(rows=[], checkpoints=sample.fingerprints(made))).encode()
    heads = ladd.Discriminator(**settings.head_sizes())
    heads = dict(format="ladd-1", kind="heads", model=heads.config, weights=heads.state_dict())
    shapes = data.load("shapes", 8, 8)
    judge = lambda: sample.get_judge(  # noqa: E731
        shapes, (8, 8), "cpu", data_dir=path / "judges", steps=2, width=8
    )
    judge()
    (judged,) = (path / "judges").iterdir()
    reading = types.SimpleNamespace(out=path)
    kinds = {
        "zip": ("set.zip", whole, load("set.zip")),
        "captions.jsonl": ("list/captions.jsonl", lines(row("a/0.png")), load("list")),
        "text": ("beside/a/0.txt", "a café".encode(), load("beside")),
        "CIFAR-10": (
            "cifar/cifar-10-python.tar.gz", gzip.decompress(cifar_tar()),
            lambda: data.load("cifar10", 8, 8, data_dir=path / "cifar"),
        ),
        "checkpoint": ("made/student.pt", saved(checkpoint()), draw("--prompt", "x")),
        "prompts": ("p.txt", "a cat\na café\n".encode(), draw("--prompts", f"{path}/p.txt")),
        "prompts to encode": ("q.txt", b"a cat\n", lambda: data.read_prompts(path / "q.txt")),
        "an image to start from": ("i.png", PICTURE, draw("--prompt", "x", "--init-image",
            f"{path}/i.png")),
        "samples": ("s.pt", saved(shard), lambda: ladd.read_shard(path / "s.pt", settings)),
        "heads": ("heads.pt", saved(heads), lambda: ladd.given_heads(settings)),
        "judge": (f"judges/{judged.name}", judged.read_bytes(), judge),
        "config.json": ("run/config.json", config, lambda: ladd.open_folder(settings)),
        "log.jsonl": ("log.jsonl", log, lambda: list(ladd.Run.rows(reading))),
        "metrics.json": ("made/metrics.json", metrics, lambda: sample.read_metrics(made)),
    }  # fmt: skip
    random = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    profiles = dict(JPEG=swapped(), PNG=swapped(), WEBP=swapped(), CMYK=press())
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "CMYK"):
        picture = Image.fromarray(random).convert("CMYK" if kind == "CMYK" else "RGB")
        options = dict(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", icc_profile=profiles.get(kind))
        form = "JPEG" if kind == "CMYK" else kind
        content = encode(picture, form, **(options if kind in profiles else {}))
        kinds[kind] = ("pictures/a/0.png", content, load("pictures"))
    with contextlib.suppress(ImportError):
        kinds |= of_safetensors(path)
    return kinds


def of_safetensors(path):
    """More of the same: weights from elsewhere, and a folder of encoded shards."""
    from safetensors.torch import save

    official = {k: torch.zeros(v.shape) for k, v in MMDiT(**NETWORK).state_dict().items()}
    weights = save(official, metadata=dict(heads="1"))
    name = "diffusion_pytorch_model.safetensors"
    index = json.dumps(dict(weight_map=dict.fromkeys(official, name))).encode()
    own = {"config.json": b'{"num_attention_heads": 1}', name: weights, name + ".index.json": index}
    folder(path / "transformer", own)

    whole = encoded(path / "shards")
    made_of, note, second = (whole[k] for k in ("shards.json", "000001.json", "000001.safetensors"))

    def read_weights(name):
        return lambda: [w.sum() for w in open_sd3(path / name)[1].values()]

    def read_shards():
        dataset = data.load(f"{path}/shards", 4, 4)
        dataset.expect(6, 6, 16)
        for bucket in dataset.sets:
            latents, caption = bucket.batch([0, 1])
            dataset([dataset.captions[i] for i in caption])

    def vouched():
        """The same by a note that fits, as a stranger would write it."""
        content = (path / "shards/000001.safetensors").read_bytes()
        folder(path, {"shards/000001.json": note_of(content)})
        try:
            read_shards()
        finally:
            folder(path, {"shards/000001.json": note})

    return {
        "weights": ("w.safetensors", weights, read_weights("w.safetensors")),
        "diffusers' config": (
            "transformer/config.json",
            own["config.json"],
            read_weights("transformer"),
        ),
        "diffusers' index": (f"transformer/{name}.index.json", index, read_weights("transformer")),
        "diffusers' weights": (f"transformer/{name}", weights, read_weights("transformer")),
        "shards.json": ("shards/shards.json", made_of, read_shards),
        "a shard's note": ("shards/000001.json", note, read_shards),
        "a shard": ("shards/000001.safetensors", second, read_shards),
        "a shard with a note that fits": ("shards/000001.safetensors", second, vouched),
    }


def storm(path, seed):
    """Reads files harmed at random. Only the errors that are made for people may come out."""
    path, rng = Path(path), random.Random(seed)
    sha256 = data.sha256
    data.sha256 = lambda p: data.CIFAR_SHA256 if f"{p}".endswith(".tar.gz") else sha256(p)
    kinds = readers(path)
    for name, content, read in kinds.values():
        folder(path, {name: content})
        assert read() != 2  # before harm each can be read
    meant = (data.DataError, ladd.RunError, ladd.UsageError, sample.CheckpointError)

    def hang(*_):
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    for turn in range(ROUNDS):
        kind = list(kinds)[turn % len(kinds)]
        name, content, read = kinds[kind]
        folder(path, {name: harm(content, rng)})
        said = io.StringIO()
        signal.alarm(10)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                assert read() not in (1,)
            except meant as error:
                print(error)
            except SystemExit as stop:
                assert stop.code == 2
        signal.alarm(0)
        for word in ("Traceback", "MemoryError", "can't allocate"):
            assert word not in said.getvalue(), (kind, said.getvalue())
        folder(path, {name: content})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def test_no_harmed_file_ends_in_a_traceback_a_hang_or_a_gigabyte(tmp_path):
    """A process of its own reads 700 files of 28 kinds, each with some bytes changed."""
    here = Path(__file__).parent
    code = f"import test_hostile; test_hostile.storm({str(tmp_path)!r}, 0)"
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) < 1 << 20  # kB
