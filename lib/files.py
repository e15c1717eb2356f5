"""Files that are whole or not there: written beside their name, then renamed; checkpoints carry a
checksum and are read without running code.
"""

import contextlib
import hashlib
import json
import os
import pickle
import secrets
import shutil
import zipfile
from pathlib import Path

import torch

from lib.archive import MOST_BYTES
from lib.errors import CheckpointError, DataError, clean, pass_on, reason
from lib.kinds import kind_of

MARK = b"\nSHA-256 "  # then the digest of all before it, in hex: the end of every file of `save`


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
        content = path.read_bytes()
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(content)
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: restore it, or choose another folder.")
    return value


def read_lines(path, flag, most=1 << 27):
    """The distinct lines of a user's text file that are not empty, each clean; DataError if none.

    most: bytes of the file, a million prompts"""
    try:
        with open(path, "rb") as file:
            text = file.read(most + 1)
        if len(text) > most:
            raise ValueError(f"more than {most:,} bytes")
        lines = text.decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{flag} {path}: can't be read ({error}).") from None
    lines = list(dict.fromkeys(filter(None, map(clean, lines))))
    if not lines:
        raise DataError(f"{flag} {path}: no prompt in it; one a line is expected.")
    return lines


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


# ---------------------------------------------------------------------------------------------
# Checkpoints: torch.save's files, and a checksum after them
# ---------------------------------------------------------------------------------------------


class Summed:
    """A file that torch.save writes to: adds up the SHA-256 of what is written. What is wrong with
    the disk, which torch.save hides, is kept in `error`."""

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, content):
        self.digest.update(content)
        try:
            if self.error is None:
                self.file.write(content)
        except OSError as error:
            self.error = error
        return len(content)

    def flush(self):
        pass


def save(value, path):
    """Writes a file for `read` and torch.load, whole or not at all, that ends in its checksum.
    Tensor by tensor: no second copy of them in memory."""
    with replacing(path) as file:
        summed = Summed(file)
        torch.save(value, summed)
        if summed.error is not None:
            raise summed.error
        file.write(MARK + summed.digest.hexdigest().encode())


def checksum(path):
    """The checksum at the end of a file of `save`; of another file, nothing."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - len(MARK) - 64))
        end = file.read()
    return end.removeprefix(MARK).decode() if end.startswith(MARK) else ""


def differs(path):
    """Whether a file of `save` is not what was written: read from end to end, and not kept. One
    without a checksum (torch.save's own) can't differ."""
    left, digest = max(0, os.path.getsize(path) - len(MARK) - 64), hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(min(left, 1 << 20)):
            digest.update(chunk)
            left -= len(chunk)
        end = file.read(len(MARK) + 64)
    return end.startswith(MARK) and end != MARK + digest.hexdigest().encode()


def load(path, *, check=True, mmap=False):
    """What `save` wrote, on the CPU. Runs no code; on a damaged file it raises nearly anything.

    check: whether the checksum is. mmap: a tensor is read where it is touched."""
    if check and differs(path):
        raise ValueError("its content is not what was written: the checksum differs")
    with zipfile.ZipFile(path) as parts:
        if not any(name.endswith("data.pkl") for name in parts.namelist()):
            raise ValueError("a zip, but not one of torch.save")
        if any(part.compress_type for part in parts.infolist()):
            raise ValueError("it is compressed")  # torch.save packs nothing
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UnicodeEncodeError:  # torch maps no file of such a name
        return torch.load(path, map_location="cpu", weights_only=True)


def read(path, *, check=True, mmap=False):
    """The same; CheckpointError says where the file is missing or damaged."""
    if Path(path).exists() and not Path(path).is_file():
        raise CheckpointError(f"{path}: not a file.")  # a pipe or a device might never end
    try:
        if kind_of(path) != "torch":
            raise CheckpointError(f"{path}: can't be read as a checkpoint: it is a safetensors.")
        return load(path, check=check, mmap=mmap)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. Has the run got that far?") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: can't be read: damaged, or with code in it, which is never run."
        ) from None
    except Exception as error:  # a damaged file raises nearly anything
        pass_on(error, path)
        raise CheckpointError(f"{path}: can't be read as a checkpoint ({reason(error)}).") from None
