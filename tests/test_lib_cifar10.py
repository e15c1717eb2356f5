"""lib/cifar10.py: the official archive, by hand or over the network; others are refused."""

import hashlib
import http.server
import io
import os
import pickle
import runpy
import socket
import tarfile
import threading

import numpy as np
import pytest
from conftest import CPU, cifar_tar, folder, run_on
from PIL import Image, ImageOps

import data
import ladd
from lib import cifar10
from lib.errors import DataError

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def load(data_dir, size=(32, 32)):
    return data.load("cifar10", [size], data_dir=data_dir)


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def cifar(monkeypatch):
    """A small archive in the form of the official one, as bytes; nothing serves it yet."""
    rng = np.random.default_rng(0)
    files, rows = {}, []
    for n, name in enumerate(BATCHES, 2):
        pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = [int(k) for k in rng.integers(0, 10, n)]
        files[name] = pickle.dumps({b"data": pixels, b"labels": labels, b"x": "é"}, protocol=2)
        rows.append((pixels, labels))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = out.getvalue()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(cifar10, "URL", f"http://127.0.0.1:{closed_port()}/cifar.tar.gz")
    monkeypatch.setattr(cifar10, "SIZE", len(archive))
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(archive).hexdigest())
    return {"archive": archive, "files": files, "rows": rows}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server
        wanted = self.headers["Range"]
        site.asked.append(wanted)
        start = int(wanted[len("bytes=") : -1]) if wanted and site.ranges else 0
        if start and start >= len(site.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(site.content) - start))
        self.end_headers()
        self.wfile.write(site.content[start:][: site.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def site(cifar, monkeypatch):
    """A server of the archive on this machine. asked: the Range headers it saw; ranges: whether it
    heeds them; cut: after how many bytes the connection breaks."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.asked, server.ranges, server.cut = cifar["archive"], [], True, None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(cifar10, "URL", f"http://127.0.0.1:{server.server_port}/cifar.tar.gz")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


ARCHIVE = "cifar-10-python.tar.gz"
PART = ARCHIVE + ".part"


def check_cifar(dataset, cifar):
    """All images and labels, in the archive's order: rows of red, then of green, then of blue."""
    classes = ["airplane", "automobile", "bird", "cat", "deer"]  # as batches.meta numbers them
    classes += ["dog", "frog", "horse", "ship", "truck"]
    assert dataset.attributes == {"class": tuple(classes)}
    assert dataset.captions == [f"a photo of a {name}" for name in classes]
    assert dataset.labels.tolist() == [[k] for k in range(10)]
    *train, test = cifar["rows"]
    pixels = np.concatenate([p for p, _ in train])
    assert dataset.train_size == len(pixels) == 20
    assert dataset.images[4, 1, 5, 7] == pixels[4, 1024 + 5 * 32 + 7]
    assert np.array_equal(dataset.images.flatten(1), pixels)
    assert dataset.caption.tolist() == [label for _, labels in train for label in labels]
    held, caption = dataset.batch(np.arange(7), held_out=True)
    assert np.array_equal(held.flatten(1), test[0]) and caption.tolist() == test[1]


def test_a_cifar_archive_placed_by_hand_is_used(tmp_path, cifar):
    folder(tmp_path, {ARCHIVE: cifar["archive"]})
    check_cifar(load(str(tmp_path)), cifar)
    assert os.listdir(tmp_path) == [ARCHIVE]  # nothing extracted


def test_a_cifar_folder_placed_by_hand_is_used(tmp_path, cifar):
    folder(tmp_path / "cifar-10-batches-py", cifar["files"])
    check_cifar(load(tmp_path), cifar)


def test_a_run_knows_cifar_by_its_content_wherever_it_lies(tmp_path, cifar, monkeypatch):
    """An archive is its folder, a folder with one other byte is not; the official files have the
    name that runs of older versions know them by."""
    files = cifar["files"]
    changed = files["data_batch_3"].replace(b"\xc3\xa9", b"\xc3\xa8")
    folder(tmp_path, {ARCHIVE: cifar["archive"]})
    folder(tmp_path / "a" / "cifar-10-batches-py", files)
    folder(tmp_path / "b" / "cifar-10-batches-py", files | {"data_batch_3": changed})
    name, same, other = (load(tmp_path / place).name for place in ("", "a", "b"))
    assert name == same != other and "digest" in other
    monkeypatch.setattr(cifar10, "OFFICIAL", name.removeprefix("cifar10, digest "))
    assert [load(tmp_path / place).name for place in ("", "a", "b")] == [
        "cifar10",
        "cifar10",
        other,
    ]


def test_cifar_batches_as_python_2_wrote_them_are_read(tmp_path, cifar):
    """The official files: strings are SHORT_BINSTRINGs, and NumPy's old module names."""

    def text(s):
        return b"U" + bytes([len(s)]) + s

    def batch(pixels, labels):
        dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|")
        dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        shape = b"K" + bytes([len(pixels)]) + b"M\x00\x0c\x86"
        content = b"T" + pixels.nbytes.to_bytes(4, "little") + pixels.tobytes()
        array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
        array += b"\x87R(K\x01" + shape + dtype + b"\x89" + content + b"tb"
        numbers = b"](" + b"".join(b"K" + bytes([k]) for k in labels) + b"e"
        return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."

    files = {n: batch(*row) for n, row in zip(BATCHES, cifar["rows"], strict=True)}
    folder(tmp_path / "cifar-10-batches-py", files)
    check_cifar(load(tmp_path), cifar)


def test_the_reader_needs_no_part_of_numpy_that_an_older_one_has_not(monkeypatch):
    """NumPy 1.26 has its own parts in numpy.core, and no numpy._core.multiarray."""
    monkeypatch.delattr(np, "_core")
    needed = runpy.run_path(cifar10.__file__)["NEEDED"]
    assert {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")} <= set(needed)


def test_cifar_is_cropped_and_resized_as_other_pictures_are(tmp_path, cifar):
    folder(tmp_path, {ARCHIVE: cifar["archive"]})
    dataset = load(tmp_path, (16, 24))
    pixels = cifar["rows"][0][0][1].reshape(3, 32, 32).transpose(1, 2, 0)
    expected = ImageOps.fit(Image.fromarray(pixels), (24, 16), Image.Resampling.BICUBIC)
    assert dataset.images.shape == (20, 3, 16, 24)
    assert dataset.held_out_images.shape == (7, 3, 16, 24)
    assert np.array_equal(dataset.images[1].permute(1, 2, 0), np.asarray(expected))


def test_an_archive_with_a_wrong_hash_is_refused_before_it_is_opened(tmp_path, cifar, monkeypatch):
    harmed = bytearray(cifar["archive"])
    harmed[100] ^= 1
    folder(tmp_path, {ARCHIVE: bytes(harmed)})

    def opened(*_, **__):
        pytest.fail("opened before it was verified")

    monkeypatch.setattr(tarfile, "open", opened)
    monkeypatch.setattr(cifar10, "ArrayUnpickler", opened)
    with pytest.raises(DataError, match=r"not the official.*SHA-256.*Delete it") as error:
        load(tmp_path)
    assert str(tmp_path / ARCHIVE) in str(error.value)
    assert (tmp_path / ARCHIVE).exists()  # it is the user's file


class Attack:
    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("call", ["system", "eval", "numpy"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, cifar, call):
    trace = tmp_path / "trace"
    attack = {
        "system": Attack(os.system, f"touch {trace}"),
        "eval": Attack(eval, f"open({str(trace)!r}, 'w')"),
        "numpy": Attack(np.save, str(trace), 1),
    }[call]
    files = cifar["files"] | {"data_batch_3": pickle.dumps({b"data": attack}, protocol=2)}
    folder(tmp_path / "cifar-10-batches-py", files)
    with pytest.raises(DataError, match="data_batch_3 is not a batch of CIFAR-10") as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert not list(tmp_path.glob("trace*"))


@pytest.mark.parametrize("harm", ["cut", "other", "labels"])
def test_a_damaged_cifar_batch_is_refused_by_name(tmp_path, cifar, harm):
    good = cifar["files"]["test_batch"]
    content = {"cut": good[:900], "other": pickle.dumps([1, 2]), "labels": b"no pickle"}[harm]
    folder(tmp_path / "cifar-10-batches-py", cifar["files"] | {"test_batch": content})
    with pytest.raises(DataError, match="test_batch is not a batch of CIFAR-10"):
        load(tmp_path)


def test_a_cifar_folder_without_all_its_files_names_the_missing_one(tmp_path, cifar):
    del cifar["files"]["data_batch_4"]
    folder(tmp_path / "cifar-10-batches-py", cifar["files"])
    with pytest.raises(DataError, match="data_batch_4"):
        load(tmp_path)


def test_cifar_is_fetched_once_into_a_new_folder_and_said_in_one_line(
    tmp_path, cifar, site, capsys
):
    place = tmp_path / "new" / "folder"
    for _ in range(2):
        check_cifar(load(place), cifar)
    assert site.asked == [None] and os.listdir(place) == [ARCHIVE]
    assert (place / ARCHIVE).read_bytes() == cifar["archive"]
    said = f"CIFAR-10 in {place}: 20 images to train on, 7 held out, 10 classes\n"
    assert capsys.readouterr() == ("", 2 * said)


def test_a_cut_download_is_continued_from_its_part(tmp_path, cifar, site):
    folder(tmp_path, {PART: cifar["archive"][:1000]})
    site.content = b"?" * 1000 + cifar["archive"][1000:]  # what is there must not be asked for
    check_cifar(load(tmp_path), cifar)
    assert site.asked == ["bytes=1000-"] and os.listdir(tmp_path) == [ARCHIVE]


def test_a_download_starts_afresh_where_the_server_cannot_continue(tmp_path, cifar, site):
    folder(tmp_path, {PART: b"?" * 1000})
    site.ranges = False
    check_cifar(load(tmp_path), cifar)
    assert site.asked == ["bytes=1000-"] and os.listdir(tmp_path) == [ARCHIVE]


def test_a_connection_that_breaks_leaves_a_part_that_the_next_try_continues(tmp_path, cifar, site):
    site.cut = 5000
    with pytest.raises(DataError, match="CIFAR-10 can't be had"):
        load(tmp_path)
    assert os.listdir(tmp_path) == [PART]
    site.cut = None
    check_cifar(load(tmp_path), cifar)
    assert site.asked == [None, "bytes=5000-"] and os.listdir(tmp_path) == [ARCHIVE]


@pytest.mark.parametrize("more", [0, 10])
def test_a_part_as_long_as_the_archive_or_longer_does_not_block_the_next_try(
    tmp_path, cifar, site, more
):
    folder(tmp_path, {PART: b"?" * (len(cifar["archive"]) + more)})
    check_cifar(load(tmp_path), cifar)


def test_a_wrong_download_is_refused_and_does_not_block_the_next_try(tmp_path, cifar, site):
    site.content = b"?" * len(cifar["archive"])
    with pytest.raises(DataError, match=r"not the official CIFAR-10 archive.*try again"):
        load(tmp_path)
    site.content = b"<html>Please log in</html>"
    with pytest.raises(DataError, match="CIFAR-10 can't be had"):
        load(tmp_path)
    assert not (tmp_path / ARCHIVE).exists()
    (tmp_path / PART).unlink()
    site.content = cifar["archive"]
    check_cifar(load(tmp_path), cifar)


def ways_out(error, data_dir):
    words = [ARCHIVE, cifar10.URL, str(data_dir), "--data-dir", "--data PATH", "--data shapes"]
    return all(word in str(error.value) for word in words)


def test_without_a_network_the_ways_out_are_named(tmp_path, cifar):
    with pytest.raises(DataError, match=r"can't be had.*refused") as error:
        load(tmp_path)
    assert ways_out(error, tmp_path)


def test_a_server_that_answers_nonsense_is_a_data_error(tmp_path, cifar, site, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.wfile.write(b"nonsense\r\n\r\n"))
    with pytest.raises(DataError) as error:
        load(tmp_path)
    assert ways_out(error, tmp_path)


def test_a_data_folder_that_cannot_be_made_is_a_data_error(tmp_path, cifar, site):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError) as error:
            load(place)
        assert ways_out(error, place)


def test_a_data_folder_that_cannot_be_written_is_a_data_error(tmp_path, cifar, site, monkeypatch):
    def refuse(path, mode="r"):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cifar10, "open", refuse, raising=False)  # root may write anywhere
    with pytest.raises(DataError, match="Permission denied") as error:
        load(tmp_path)
    assert ways_out(error, tmp_path)


UNREADABLE = {
    "another archive": ({ARCHIVE: b"hello"}, "not the official CIFAR-10 archive"),
    "a folder without its files": (
        {"cifar-10-batches-py/batches.meta": b""}, "No such file or directory"),
    "a batch that is none": (
        {f"cifar-10-batches-py/{name}": b"x" for name in BATCHES}, "data_batch_1 is not a batch"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_data_that_is_there_but_cannot_be_read_is_not_replaced_by_shapes(
    tmp_path, cifar, refused, case
):
    """`--preset tiny`, which would learn from the shapes where nothing can be fetched."""
    files, told = UNREADABLE[case]
    folder(tmp_path / "data", files)
    refused(ladd, ["--preset", "tiny", "--smoke", "--out", "run", *CPU], 2, "data", told)


# ---------------------------------------------------------------------------------------------
# Archives from strangers
# ---------------------------------------------------------------------------------------------


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
    "no images": cifar_tar(content=batch(data=np.zeros((0, 3072), np.uint8), labels=[])),
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
    refused(ladd, run_on("cifar10"), 2, "not the official CIFAR-10 archive", archive.name)
    monkeypatch.setattr(cifar10, "sha256", lambda path: cifar10.SHA256)
    refused(ladd, run_on("cifar10", "--size", 32), 2, "data", "CIFAR-10" if case in (
        "a link", "a hard link", "a device", "a member elsewhere", "cut", "no gzip",
    ) else "data_batch_3")  # fmt: skip
