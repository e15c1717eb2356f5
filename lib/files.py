"""Files that are whole or not there: written beside their name, then renamed; checkpoints are
checked and read without running code.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import secrets
import shutil
import zipfile
from pathlib import Path

import torch

from lib.archive import MOST_BYTES
from lib.errors import CheckpointError, DataError, clean, first_cause, pass_on, reason

STRANGERS = {  # how a file begins that holds no weights for us: what it is, and what to do
    b"GGUF": "a GGUF file, with numbers of a few bits; give the .safetensors that it was made from",
    b"version https://git-lfs": "the pointer of git-lfs, not the file itself; get it: git lfs pull",
    b"\x80": "an old pickle of PyTorch, which can run code; give a .safetensors",
}


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the name `path` once the block has ended well, and not before:
    a cut, an error or a full disk leave the old file, or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            mode = os.fstat(file.fileno()).st_mode
        if temporary.stat().st_mode != mode:  # safetensors' file has taken its place
            temporary.chmod(mode)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the new name, too, outlives a loss of power
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a full disk
            error.filename = str(path)
        raise


def write_text(text, path):
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))  # a path in it need not be text


def write_json(value, path):
    write_text(json.dumps(value, indent=1) + "\n", path)


def read_object(path):
    """The JSON object of a file of ours, as a dict; DataError names one that is no such file."""
    path, value = Path(path), None
    if path.is_file() and path.stat().st_size <= MOST_BYTES:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        wrong = "is damaged" if path.exists() else "is missing"
        raise DataError(f"{path} {wrong}: restore it, or choose another folder.")
    return value


def read_lines(path, flag, most=1 << 27, repeated=False):
    """The lines of a user's text file that are not empty, each clean; DataError if none.

    most: bytes of the file, a million prompts. repeated: keep a line that was there before"""
    try:
        with open(path, "rb") as file:
            text = file.read(most + 1)
        if len(text) > most:
            raise ValueError(f"more than {most:,} bytes")
        lines = io.StringIO(text.decode("utf-8-sig"), None)  # splitlines ends some within a line
    except (OSError, ValueError) as error:
        raise DataError(f"{flag} {path}: can't be read ({error}).") from None
    lines = list(filter(None, map(clean, lines)))
    if not lines:
        raise DataError(f"{flag} {path}: no prompt in it; one a line is expected.")
    return lines if repeated else list(dict.fromkeys(lines))


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def link(file, path):
    """Gives a file a second name, or where that can't be, makes a copy."""
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    try:
        os.link(file, path)
    except OSError:
        with open(file, "rb") as old, replacing(path) as new:
            shutil.copyfileobj(old, new)


def save(value, path):
    """Writes a file for `read` and torch.load, whole or not at all: a zip, which has a checksum
    (CRC-32) of every tensor."""
    with replacing(path) as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            raise first_cause(error) from None  # what is wrong with the disk


def kind_of(path):
    """What a file of weights is by its content, "torch" or "safetensors"; its name may end in
    anything. CheckpointError says what another file is."""
    with open(path, "rb") as file:
        start = file.read(1024)
    if start.startswith(b"PK"):  # torch.save packs a zip
        return "torch"
    if start[8:9] == b"{":  # the length of the header, and the header
        return "safetensors"
    what = "neither a .safetensors nor a file of torch.save"
    if not start:
        what = "an empty file; get it again"
    elif all(byte >= 32 or byte in b"\t\n\r" for byte in start):  # a web page, a message
        what = f"text ({start.decode(errors='replace')[:40]!r} …), not weights; get it again"
    for beginning, stranger in STRANGERS.items():
        if start.startswith(beginning):
            what = stranger
    raise CheckpointError(f"{path}: can't be read: {what}.")


def checksum(path):
    """Tells files of `save` apart, however long they are: a digest of the checksums in them."""
    with zipfile.ZipFile(path) as parts:
        sums = [part.CRC for part in parts.infolist()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def check_parts(path, whole):
    """Raises nearly anything where a file of `save` is damaged; whole: read from end to end."""
    with zipfile.ZipFile(path) as parts:
        if not any(name.endswith("data.pkl") for name in parts.namelist()):
            raise ValueError("a zip, but not one of torch.save")
        if any(part.compress_type for part in parts.infolist()):
            raise ValueError("it is compressed")  # torch.save packs nothing
        if whole and (bad := parts.testzip()):
            raise ValueError(f"its content is not what was written: the checksum of {bad} differs")


def read(path, *, check=True, mmap=False):
    """What `save` wrote, on the CPU. Runs no code. CheckpointError: it is missing or damaged.

    check: whether the checksums are. mmap: a tensor is read where it is touched."""
    path = Path(path)
    if not path.is_file():  # a pipe or a device might never end
        far = " Has the run got that far?" if (path.parent / "log.jsonl").exists() else ""
        raise CheckpointError(f"{path}: no such file.{far}")
    if kind_of(path) != "torch":
        raise CheckpointError(f"{path}: can't be read as a checkpoint: it is a safetensors.")
    try:
        check_parts(path, check)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except UnicodeEncodeError:  # torch maps no file of such a name
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: can't be read: damaged, or with code in it, which is never run."
        ) from None
    except Exception as error:  # a damaged file raises nearly anything
        pass_on(error, path)
        raise CheckpointError(f"{path}: can't be read as a checkpoint ({reason(error)}).") from None
