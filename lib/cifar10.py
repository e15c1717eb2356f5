"""CIFAR-10 as plain arrays: from the official archive, a folder of its batches, or the network."""

import hashlib
import io
import os
import pickle
import sys
import tarfile
import urllib.request

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lib.captions import class_attributes
from lib.errors import DataError, NotFetched, pass_on, plural
from lib.files import sha256
from lib.images import fit

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
SIZE = 170_498_071
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CLASSES = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip

NAMES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
OFFICIAL = "6e51b96f77ba647d"  # digest of the official files, see `name_of`
RECONSTRUCT = np.empty(0).__reduce__()[0]  # which has no public name
NEEDED = {  # by the pickle of an array, from old and new NumPy
    "numpy.core.multiarray._reconstruct": RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": RECONSTRUCT,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes in old protocols
}


class ArrayUnpickler(pickle._Unpickler):
    """Reads pickles of plain containers and NumPy arrays, and nothing else.

    Made from pickle's reader in Python: the one in C reserves what a damaged file asks for."""

    def find_class(self, module, name):
        if f"{module}.{name}" not in NEEDED:
            raise pickle.UnpicklingError(f"a pickle that asks for {module}.{name}")
        return NEEDED[f"{module}.{name}"]


def download(url, path, size):
    """Fetches url to path with a progress bar; a part from an earlier try is continued."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    have = have if have < size else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        if answer.status != 206:  # the server starts from the beginning
            have = 0
        bar = tqdm(None, path.name, size, initial=have, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if have else "wb") as out:
            while out.tell() <= size and (chunk := answer.read(1 << 16)):
                out.write(chunk)
                bar.update(len(chunk))
    have = part.stat().st_size
    if have != size:
        raise OSError(f"{url} gave {have:,} of {size:,} bytes; try again to continue")
    os.replace(part, path)


def cifar_batches(data_dir):
    """The six batch files of CIFAR-10, {name: bytes}, from the archive, a folder or the network."""
    folder, archive = data_dir / FOLDER, data_dir / ARCHIVE
    if folder.is_dir() and not archive.exists():
        return {name: (folder / name).read_bytes() for name in NAMES}
    fetched = not archive.exists()
    if fetched:
        download(URL, archive, SIZE)
    if sha256(archive) != SHA256:
        way_out = "Delete it to fetch it again"
        if fetched:
            archive.unlink()
            way_out = "It was deleted: try again"
        wrong = f"not the official CIFAR-10 archive, of SHA-256 {SHA256[:16]}…"
        raise ValueError(f"{archive}: {wrong}. {way_out}")
    with tarfile.open(archive) as tar:
        return {name: tar.extractfile(f"{FOLDER}/{name}").read() for name in NAMES}


def name_of(batches):
    """What a run knows its data by: of other files than the official ones with a digest."""
    sums = [hashlib.md5(batches[name], usedforsecurity=False).hexdigest() for name in NAMES]
    digest = hashlib.sha256(repr(sums).encode()).hexdigest()[:16]
    return "cifar10" if digest == OFFICIAL else f"cifar10, digest {digest}"


def read_cifar10(data_dir, height, width):
    """CIFAR-10's 50,000 training and 10,000 test photographs.

    -> name; (images (n, 3, H, W) uint8, classes (n,) int64) of each; captions, attributes, labels
    """
    here = (data_dir / FOLDER).exists() or (data_dir / ARCHIVE).exists()
    try:
        batches = cifar_batches(data_dir)
    except Exception as error:  # a broken connection, a full disk, a damaged archive
        raise (DataError if here else NotFetched)(
            f"CIFAR-10 can't be had ({error}). Ways out: place {ARCHIVE} from "
            f"{URL} in {data_dir}/, point --data-dir at a folder that has it, use a folder "
            "or zip of images with --data PATH, or the built-in set with --data shapes."
        ) from None
    parts = []
    for name, content in batches.items():
        try:
            batch = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
            images = batch[b"data"].astype(np.uint8, casting="no").reshape(-1, 3, 32, 32)
            classes = np.fromiter(batch[b"labels"], np.int64)
            if not 0 < len(images) == len(classes) or not set(classes) <= set(range(10)):
                raise ValueError("labels and images don't match")
        except Exception as error:  # a damaged pickle raises nearly anything
            pass_on(error, data_dir / name)
            raise DataError(f"{data_dir}: {name} is not a batch of CIFAR-10 ({error}).") from None
        if (height, width) != (32, 32):
            pictures = map(Image.fromarray, images.transpose(0, 2, 3, 1))
            images = np.stack([fit(picture, height, width) for picture in pictures])
        parts.append((torch.from_numpy(images), torch.from_numpy(classes)))
    *train, test = parts
    train = tuple(torch.cat(column) for column in zip(*train, strict=True))
    number = f"{plural(len(train[1]), 'image')} to train on, {len(test[1]):,} held out"
    print(f"CIFAR-10 in {data_dir}: {number}, {len(CLASSES)} classes", file=sys.stderr)
    return name_of(batches), train, test, *class_attributes(CLASSES)
