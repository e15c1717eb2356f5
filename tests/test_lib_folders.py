"""lib/folders.py: captions, folders and zips of images; errors that say where and why."""

import json
import re
import zipfile

import numpy as np
import pytest
import torch
from conftest import PICTURE, encode, folder, json_lines, plain, png, row_of, run_on, zipped
from PIL import Image

import data
import ladd
from lib.errors import MOST_CHARACTERS, DataError


def read(path, height, width, **options):
    """The data set of a folder or a zip."""
    return data.load(f"{path}", [(height, width)], **options)


def test_without_flip_no_image_of_a_folder_is_mirrored(tmp_path):
    """For captions that name a side, and for letters and digits."""
    half = np.zeros((4, 4, 3), np.uint8)
    half[:, 2:] = 255
    folder(
        tmp_path, {f"dark left/{k:02}.png": encode(Image.fromarray(half), "PNG") for k in range(20)}
    )
    right, mirrored = (read(tmp_path, 4, 4, flip=f).batch(range(80))[0] for f in (False, True))
    assert (right[..., 0] == 0).all()
    assert 0 < (mirrored[..., 0] == 255).double().mean() < 1


def keys(images):
    return images[:, 0, 0, 0].tolist()


def caption_lines(captions):
    return "\n".join(json.dumps({"file": k, "caption": v}) for k, v in captions.items()).encode()


PETS = {f"{'cat' if k % 3 else 'polar_bear'}/{k:02}.png": plain(k) for k in range(31)}
SENTENCES = {n: f"a photo of a {n.split('/')[0].replace('_', ' ')}" for n in PETS}
WAYS = {
    "classes": PETS,
    "jsonl": PETS | {"captions.jsonl": caption_lines(SENTENCES)},
    "txt": PETS | {n.replace(".png", ".txt"): f" {t}\n".encode() for n, t in SENTENCES.items()},
}


@pytest.mark.parametrize("pack", [folder, zipped])
@pytest.mark.parametrize("way", WAYS)
def test_class_folders_caption_lists_and_text_files_in_folders_and_zips_give_the_same(
    tmp_path, way, pack
):
    dataset = read(pack(tmp_path / "pets.x", WAYS[way]), 4, 6, seed=5)
    reference = read(folder(tmp_path / "reference", PETS), 4, 6, seed=5)
    assert dataset.captions == ["a photo of a cat", "a photo of a polar bear"]
    assert (dataset.train_size, len(dataset.held_out_images)) == (28, 3)
    for held_out in (False, True):
        index = np.arange(40)
        pairs = zip(dataset.batch(index, held_out), reference.batch(index, held_out), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    images, caption = dataset.batch(np.arange(28))
    assert images.shape == (28, 3, 4, 6) and images.dtype == torch.uint8
    assert [int(k % 3 > 0) for k in keys(images)] == (1 - caption).tolist()
    if way == "classes":
        assert dataset.attributes == {"class": ("cat", "polar bear")}
    else:
        assert "cat" in dataset.attributes


def test_captions_that_are_the_names_of_folders_are_other_data_than_classes(tmp_path):
    """Of classes sentences are made, "a photo of a cat"; captions stay as they are."""
    names = {n: n.split("/")[0].replace("_", " ") for n in PETS}
    texts = {n.replace(".png", ".txt"): text.encode() for n, text in names.items()}
    lists = [PETS, PETS | texts, PETS | {"captions.jsonl": caption_lines(names)}]
    classes, *others = (
        read(folder(tmp_path / f"{k}", files), 4, 6) for k, files in enumerate(lists)
    )
    assert all(other.captions == ["cat", "polar bear"] for other in others)
    assert others[0].name == others[1].name != classes.name


def test_an_image_keeps_the_caption_that_was_written_for_it(tmp_path):
    texts = {f"{k}.png": f"caption of number {k}" for k in range(20)}
    files = {n: plain(k) for k, n in enumerate(texts)} | {"captions.jsonl": caption_lines(texts)}
    dataset = read(folder(tmp_path, files), 2, 3)
    for held_out, n in ((False, 18), (True, 2)):
        images, caption = dataset.batch(np.arange(n), held_out)
        said = [dataset.captions[i] for i in caption]
        assert said == [f"caption of number {k}" for k in keys(images)]


def test_every_caption_list_counts_and_names_files_from_its_own_folder(tmp_path):
    files = {"a/0.png": plain(0), "b/deep/1.png": plain(1), "b/2.png": plain(2)}
    files["a/captions.jsonl"] = caption_lines({"0.png": "zero"})
    files["b/captions.jsonl"] = caption_lines({"deep/1.png": "one", "./2.png": "two"})
    assert read(folder(tmp_path, files), 2, 2).captions == ["one", "two", "zero"]


def test_a_list_names_files_whether_accents_are_signs_of_their_own_or_not(tmp_path):
    """As a Mac writes names, and nobody types them."""
    files = {f"cafe\u0301 {k}.png": plain(k) for k in range(4)}
    files["captions.jsonl"] = caption_lines({f"café {k}.png": "a cup" for k in range(4)})
    folder(tmp_path, files)
    assert read(tmp_path, 4, 4).captions == ["a cup"]


def test_caption_lists_may_hold_blank_lines_windows_line_ends_and_odd_characters(tmp_path):
    rows = [{"file": "0.png", "caption": "ein\u2028Bär "}, {"file": "1.png", "caption": "x"}]
    lines = "\ufeff" + "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\r\n"
    files = {"0.png": plain(0), "1.png": plain(1), "captions.jsonl": lines.encode()}
    assert read(folder(tmp_path, files), 2, 2).captions == ["ein\u2028Bär", "x"]


def test_images_without_a_caption_are_left_out_and_counted(tmp_path, capsys):
    files = {f"{k}.png": plain(k) for k in range(5)} | {"3.txt": b"three", "1.txt": b"one"}
    dataset = read(folder(tmp_path, files), 2, 2)
    assert dataset.captions == ["one", "three"]
    assert "left out: 3 without a caption (0.png, 2.png, 4.png)" in capsys.readouterr().err


def test_hidden_files_are_ignored(tmp_path):
    files = PETS | {".thumbs/x.png": b"no", "cat/._01.png": b"no", "__MACOSX/cat/01.png": b"no"}
    for path in (folder(tmp_path / "f", files), zipped(tmp_path / "f.zip", files)):
        dataset = read(path, 2, 2)
        assert dataset.train_size + len(dataset.held_out_images) == len(PETS)


def test_a_tenth_is_held_out_by_name_for_every_seed_and_is_never_trained_on(tmp_path):
    path = folder(tmp_path, PETS)
    one, two = (read(path, 2, 2, seed=seed) for seed in (0, 1))
    assert torch.equal(one.held_out_images, two.held_out_images)
    held, train = keys(one.held_out_images), keys(one.batch(np.arange(28 * 3))[0])
    assert {*held, *train} == set(range(31)) and not set(held) & set(train)
    assert len(held) == 3


def test_every_class_is_held_out_in_proportion(tmp_path):
    files = {f"{'ab'[k % 2]}/{k}.png": plain(k) for k in range(200)}
    dataset = read(zipped(tmp_path / "set.zip", files), 2, 2)
    assert len(dataset.held_out_images) == 20
    assert 5 <= sum(k % 2 for k in keys(dataset.held_out_images)) <= 15


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp"])
def test_suffixes_count_in_any_case_and_the_content_decides(tmp_path, suffix):
    dataset = read(folder(tmp_path, {f"cat/1.{suffix}": plain(9)}), 2, 2)
    assert keys(dataset.images) == [9]


def with_bad(bad):
    """150 images, of which some are damaged; the others differ in colour."""
    return {f"cat/{k:03}.png": plain(k) for k in range(150)} | bad


@pytest.mark.parametrize(
    "content",
    [b"", b"no image at all", plain(1, (64, 64))[:60], b"\x89PNG\r\n\x1a\n" + b"\xff" * 50],
    ids=["empty", "text", "cut", "noise"],
)
def test_a_damaged_image_is_left_out_counted_and_named(tmp_path, capsys, content):
    path = folder(tmp_path, with_bad({"cat/077.png": content}))
    dataset = read(path, 2, 2)
    assert sorted(keys(dataset.images) + keys(dataset.held_out_images)) == [
        *range(77),
        *range(78, 150),
    ]
    said = capsys.readouterr().err
    assert "cat/077.png" in said and "1 of 150" in said and str(path) in said


def test_images_behind_a_damaged_one_keep_their_own_captions(tmp_path):
    files = with_bad({"cat/020.png": b""})
    texts = {name: f"number {k}" for k, name in enumerate(sorted(files))}
    files["captions.jsonl"] = caption_lines(texts)
    dataset = read(folder(tmp_path, files), 2, 2)
    assert len(dataset.captions) == 149
    said = [dataset.captions[i] for i in dataset.caption]
    assert said == [f"number {k}" for k in keys(dataset.images)]


@pytest.mark.parametrize("harm", ["data", "encrypted", "method"])
def test_a_damaged_member_of_a_zip_is_left_out_counted_and_named(tmp_path, capsys, harm):
    path = zipped(tmp_path / "set.zip", with_bad({}))
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("cat/077.png")
    content = bytearray(path.read_bytes())
    directory = content.rindex(b"cat/077.png") - 46  # its entry in the central directory
    if harm == "data":
        start = member.header_offset + 30 + len("cat/077.png")
        content[start : start + 8] = b"\xff" * 8
    elif harm == "encrypted":
        content[directory + 8] |= 1
        content[member.header_offset + 6] |= 1
    else:
        content[directory + 10] = content[member.header_offset + 8] = 99
    path.write_bytes(content)
    dataset = read(path, 2, 2)
    assert dataset.train_size + len(dataset.held_out_images) == 149
    said = capsys.readouterr().err
    assert "cat/077.png" in said and "1 of 150" in said


def test_more_than_one_percent_of_damaged_images_stops_with_the_first_named(tmp_path):
    path = folder(tmp_path, with_bad({"cat/077.png": b"", "cat/078.png": b"x"}))
    with pytest.raises(DataError, match=r"2 of 150 .* 1 %.*cat/077\.png") as error:
        read(path, 2, 2)
    assert str(path) in str(error.value)


def test_one_broken_picture_in_a_hundred_is_skipped_counted_and_named(tmp_path, capsys):
    files = {f"cat/{k}.png": plain(k) for k in range(100)} | {"cat/7.png": png(7000, 10_000)}
    dataset = read(zipped(tmp_path / "set.zip", files), 4, 4)
    assert dataset.train_size + len(dataset.held_out_images) == 99
    said = capsys.readouterr().err
    assert "cat/7.png: 7000 × 10000 pixels" in said and "skipped 1 of 100" in said


ONE = {"0.png": plain(0)}
BROKEN = {
    "no images": ({"notes.md": b"hello"}, ["no images", ".jpg", ".webp"]),
    "nothing at all": ({}, ["no images"]),
    "no captions": (
        ONE | {"cat/1.png": plain(1)},
        ["without captions, 0.png.", "captions.jsonl", ".txt", "folder per class"],
    ),
    "empty list": (ONE | {"captions.jsonl": b"\n"}, ["none of its images has a caption"]),
    "not JSON": (
        ONE | {"captions.jsonl": caption_lines({"0.png": "x"}) + b"\n\n{oops\n"},
        ["captions.jsonl line 3", '"file"', '"caption"'],
    ),
    "no caption in it": (ONE | {"captions.jsonl": b'{"file": "0.png"}'}, ["line 1"]),
    "a caption that is no text": (
        ONE | {"captions.jsonl": b'{"file": "0.png", "caption": null}'},
        ["line 1"],
    ),
    "a file that is no text": (
        ONE | {"captions.jsonl": b'{"file": [1], "caption": "x"}'},
        ["line 1"],
    ),
    "a list": (ONE | {"captions.jsonl": b'["0.png", "x"]'}, ["line 1"]),
    "missing files": (
        ONE | {"captions.jsonl": caption_lines({"7.png": "x", "0.png": "y", "8.png": "z"})},
        ["names 2 missing files", "7.png"],
    ),
}


@pytest.mark.parametrize("pack", [folder, zipped])
@pytest.mark.parametrize("case", BROKEN)
def test_a_set_that_cannot_be_used_says_where_and_why(tmp_path, case, pack):
    files, words = BROKEN[case]
    (tmp_path / "set").mkdir()
    path = pack(tmp_path / ("set" if pack is folder else "set.zip"), files)
    with pytest.raises(DataError) as error:
        read(path, 2, 2)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_a_damaged_caption_list_in_a_zip_is_refused_by_name(tmp_path):
    path = zipped(tmp_path / "set.zip", {"captions.jsonl": caption_lines({"0.png": "x"}), **ONE})
    content = bytearray(path.read_bytes())
    content[44:52] = b"\xff" * 8  # the data of the first member, after its header and name
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"captions\.jsonl can't be read") as error:
        read(path, 2, 2)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "no/where.zip", "cifar", "bad\0name"])
def test_a_path_that_does_not_exist_is_named_with_the_choices(name):
    with pytest.raises(DataError, match=r"no such folder or file.*shapes, cifar10") as error:
        read(name, 2, 2)
    assert name in str(error.value)


def test_file_names_that_are_not_utf8_work(tmp_path):
    try:
        path = folder(tmp_path, PETS | {"cat/caf\udce9.png": plain(200)})
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    dataset = read(path, 2, 2)
    assert 200 in keys(dataset.images) + keys(dataset.held_out_images)


@pytest.mark.parametrize("pack", [folder, zipped])
def test_nothing_is_extracted_or_written_beside_the_images(tmp_path, pack):
    path = pack(tmp_path / "pets", WAYS["txt"])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    read(path, 2, 2).batch(np.arange(40))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_progress_is_silent_where_stderr_is_not_a_terminal(tmp_path, capsys):
    content = plain(3, (1, 1))
    path = zipped(tmp_path / "many.zip", {f"cat/{k}.png": content for k in range(2001)})
    read(path, 1, 1)
    assert capsys.readouterr() == ("", f"{path}: 2,001 images, 1 class (cat)\n")


def test_an_image_alone_in_its_size_is_left_out_and_named(tmp_path, capsys):
    """It could only be trained on and held out at once."""
    path = folder(tmp_path / "set", PETS | {"cat/wide.png": plain(99, (90, 2))})
    dataset = data.load(f"{path}", [(2, 3), (2, 30)])
    assert dataset.size == (2, 3) and dataset.train_size + dataset.held_out_size == len(PETS)
    assert "left out 1 image, each alone in its size: cat/wide.png" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# What is read, and what is not, is said in one line
# ---------------------------------------------------------------------------------------------

ROWS = caption_lines({"train/a.png": "a cat", "val/b.png": "a cat"})
TOLD = {
    "classes": (PETS, "31 images, 2 classes (cat, polar bear)"),
    "captions": (ONE | {"0.txt": b"a cat"}, "1 image, 1 caption"),
    "other suffixes": (
        PETS | {"cat/a.bmp": PICTURE, "b.BMP": PICTURE, "README": b"", "1.heic": b""},
        "2 classes (cat, polar bear); left out: 1 .heic (1.heic), 1 without a suffix (README), "
        "2 .bmp (b.BMP, cat/a.bmp)",
    ),
    "a suffix that a list names": (
        {"a.bmp": PICTURE, "captions.jsonl": caption_lines({"a.bmp": "a cat"}), **ONE},
        "1 image, 1 caption; left out: 1 without a caption (0.png)",
    ),
    "texts beside a list": (
        {"captions.jsonl": caption_lines({"0.png": "a cat"}), **ONE, "0.txt": b"a dog"},
        "1 image, 1 caption; left out: 1 .txt (0.txt)",
    ),
    "hidden ones": (
        PETS | {".git/x/a.png": b"", "cat/.DS_Store": b"", "cat/._00.png": b""},
        "left out: 3 hidden (.git, cat/.DS_Store, cat/._00.png)",
    ),
    "thumbnails": (
        PETS | dict.fromkeys(["cat/@eaDir/0.png/S.png", "cat/Thumbs/1.png", "#recycle/2.png"], b""),
        "2 classes (cat, polar bear); left out: 3 in thumbnail or system folders (#recycle/2.png, "
        "cat/@eaDir/0.png/S.png, cat/Thumbs/1.png)",
    ),
    "parts as classes": (
        {"train/a.png": PICTURE, "val/b.png": PICTURE},
        "2 images, 2 classes (train, val); train/ and val/ are seen as classes",
    ),
    "parts above classes": (
        {"x/Train/cat/a.png": PICTURE, "x/test/cat/b.png": PICTURE},
        "1 class (cat); Train/ and test/ are read as one set",
    ),
    "parts of a list": (
        {"train/a.png": PICTURE, "val/b.png": PICTURE, "captions.jsonl": ROWS},
        "2 images, 1 caption; train/ and val/ are read as one set",
    ),
    "a class of trains": ({"train/a.png": PICTURE, "plane/b.png": PICTURE}, "(plane, train)\n"),
}


@pytest.mark.parametrize("pack", [folder, zipped])
@pytest.mark.parametrize("case", TOLD)
def test_one_line_says_what_is_read_and_what_is_left_out(tmp_path, capsys, case, pack):
    files, told = TOLD[case]
    path = pack(tmp_path / "set.x", files)
    read(path, 2, 2)
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: ") and told in said and said.count("\n") == 1
    left_out = re.findall(r"\(([^()]*)\)", said.partition("left out")[2])
    names = ", ".join(left_out).split(", ")
    assert len(set(names)) == len(names)  # none for two reasons


def test_a_set_of_other_suffixes_alone_says_which(tmp_path):
    path = folder(tmp_path, {"cat/a.bmp": PICTURE, "cat/b.bmp": PICTURE})
    with pytest.raises(
        DataError, match=r"no images in it.*left out: 2 .bmp \(cat/a.bmp, cat/b.bmp"
    ):
        read(path, 2, 2)


def test_classes_behind_links_and_unreadable_folders_are_read_or_named(tmp_path, capsys):
    files = PETS | {"../elsewhere/1.png": plain(99)}
    path = folder(tmp_path / "set", files)
    (path / "car").symlink_to(tmp_path / "elsewhere")
    (path / "van").symlink_to(tmp_path / "elsewhere")
    (path / "bus").symlink_to(tmp_path / "nowhere")
    dataset, said = read(path, 2, 2), capsys.readouterr().err
    assert dataset.attributes == {"class": ("car", "cat", "polar bear")}
    assert "1 unreadable (bus), 1 linked a second time (van)" in said


# ---------------------------------------------------------------------------------------------
# Captions from strangers
# ---------------------------------------------------------------------------------------------

CAPTIONS = {
    "bad JSON": (b'{"file": "0.png", "caption": "x"', "line 1"),
    "no object": (b"7", "line 1"),
    "a text": (b'"0.png"', "line 1"),
    "deep nesting": (b'{"file":' + b"[" * 100_000, "line 1"),
    "a huge number": (b'{"file": "0.png", "caption": ' + b"9" * 5000 + b"}", "line 1"),
    "a huge number beside": (b'{"file":"0.png","caption":"x","n":' + b"9" * 5000 + b"}", "line 1"),
    "a caption of numbers": (json_lines(row_of(caption=[1, 2])), "line 1"),
    "a control character": (b'{"file": "0.png", "caption": "a\x1b[2Jb"}', "line 1"),
    "not UTF-8": (b'{"file": "0.png", "caption": "caf\xe9"}', "captions.jsonl is not UTF-8"),
    "UTF-16": (json_lines(row_of()).decode().encode("utf-16"), "captions.jsonl is not UTF-8"),
    "twice the same": (
        json_lines(row_of(), row_of(caption="b")),
        "line 2 names 0.png a second time",
    ),
    "twice by another way": (
        json_lines(row_of(), row_of("x/../0.png")),
        "line 2 names 0.png a second",
    ),
    "missing files": (json_lines(row_of(), row_of("gone.png")), "1 missing file: gone.png"),
    "upwards": (json_lines(row_of("../outside.png")), "missing file: ../outside.png"),
    "absolute": (json_lines(row_of("/etc/passwd")), "missing file: /etc/passwd"),
    "a NUL in the name": (json_lines(row_of("0.png\0.txt")), "missing file"),
    "an escape in the name": (json_lines(row_of("\x1b]0;owned\x07")), "missing file"),
    "a name of a megabyte": (json_lines(row_of("x" * 10**6)), "missing file"),
    "a folder": (json_lines(row_of("sub")), "missing file: sub"),
    "NaN": (b"NaN", "line 1"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_a_bad_caption_list_is_refused_by_name_and_line(tmp_path, refused, case):
    content, reason = CAPTIONS[case]
    files = {"0.png": PICTURE, "sub/1.png": PICTURE, "captions.jsonl": content}
    (tmp_path / "outside.png").write_bytes(PICTURE)
    path = folder(tmp_path / "set", files)
    assert len(refused(ladd, run_on(path), 2, path, "captions.jsonl", reason)) < 2000


def test_two_lists_that_name_the_same_picture_are_refused(tmp_path, refused):
    files = {"a/0.png": PICTURE, "a/captions.jsonl": json_lines(row_of())}
    files["captions.jsonl"] = json_lines(row_of("a/0.png"))
    path = folder(tmp_path / "set", files)
    refused(ladd, run_on(path), 2, path, "captions.jsonl line 1 names a/0.png a second time")


def test_a_caption_beside_its_picture_that_is_not_utf8_is_refused_by_name(tmp_path, refused):
    path = folder(tmp_path / "set", {"0.png": PICTURE, "0.txt": b"caf\xe9"})
    refused(ladd, run_on(path), 2, path, "0.txt is not UTF-8 text")


@pytest.mark.parametrize("beside", [False, True], ids=["in a list", "beside"])
def test_odd_captions_become_one_clean_line(tmp_path, beside):
    """Empty ones stay (the unconditional caption), 100 kB stay whole, control characters go."""
    texts = ["", "x" * 100_000, "a\x1b[31m\x00red\r\n\tcat", " \x07 ", "y" * 10**6]
    texts += [] if beside else ["half \ud800 a character"]
    want = ["", "x" * 100_000, "a [31m red cat", "", "y" * MOST_CHARACTERS]
    want += [] if beside else ["half ? a character"]
    files = {f"{k}.png": plain(k) for k in range(len(texts))}
    if beside:
        files |= {f"{k}.txt": text.encode() for k, text in enumerate(texts)}
    else:
        files["captions.jsonl"] = json_lines(*(row_of(f"{k}.png", t) for k, t in enumerate(texts)))
    dataset = read(folder(tmp_path, files), 2, 2)
    assert dataset.captions == sorted(set(want))
    context, _ = data.HashedText(8, 4)(dataset.captions)
    assert context.isfinite().all()
