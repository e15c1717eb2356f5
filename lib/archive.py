"""A folder or a zip from a stranger: its files by name, and what reading one may cost.

Nothing is ever extracted; links of a folder are followed, a zip with links is refused. A bomb is
unpacked no further than a picture or captions can need.
"""

import contextlib
import functools
import io
import os
import re
import stat
import zipfile
import zlib
from pathlib import Path
from unicodedata import normalize

from lib.errors import DataError, pass_on

MOST_BYTES = 1 << 26  # of one file, unpacked, or of a zip's list of names: half a million
HIDDEN = re.compile(r"(?s)(.*?/)??(\.|__MACOSX)[^/]*")  # a name up to its first hidden part


class ZipBytes(io.FileIO):
    """A zip on disk, whose list of names is not read where it is too long to be honest."""

    def read(self, size=-1):
        if size > MOST_BYTES + 1:
            raise zipfile.BadZipFile("too many files; unpack it into a folder")
        return super().read(size)


def name_of(member):
    """The name of a zip's member, with "/" and without a leading "./". Linux's own zip writes UTF-8
    and does not say so: zipfile takes such names for those of DOS."""
    name = member.filename
    if not member.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return re.sub(r"^(\./)+(?=.)", "", name.replace("\\", "/"))


def check_members(path, members):
    """Refuses a zip that would not unpack to what it shows, though nothing of it is unpacked."""
    seen = set()
    for member in members:
        name = name_of(member)
        kind, wrong = stat.S_IFMT(member.external_attr >> 16), None
        if not name:
            wrong = "one of its files has no name"
        elif re.match("/|[A-Za-z]:", name) or ".." in name.split("/"):
            wrong = "leads out of its folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            wrong = "is a link or a device"
        elif name.casefold() in seen:
            wrong = "is there twice, perhaps in other case"
        seen.add(name.casefold())
        if wrong:
            raise DataError(f"{path}: {name} {wrong}. Make the zip anew without it.")


def walk(root):
    """The files below a folder, and behind its links to other folders. Every folder is read once:
    as itself rather than by a link, and those above the root are not read, so that no link loops.

    -> their names; {why: names of what is left out}"""
    top = Path(root).resolve()
    seen = {(s.st_dev, s.st_ino) for s in map(os.stat, top.parents)}
    names, folders, links, left_out = [], [""], [], {}
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        place = os.path.join(root, folder)
        try:
            status, inside = os.stat(place), sorted(os.listdir(place))
        except OSError as error:
            left_out.setdefault("unreadable", []).append(f"{folder or root} ({error.strerror})")
            continue
        if (status.st_dev, status.st_ino) in seen:
            left_out.setdefault("linked a second time", []).append(folder)
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in (f"{folder}/{name}" if folder else name for name in inside):
            path = os.path.join(root, name)
            if HIDDEN.match(name):
                left_out.setdefault("hidden", []).append(name)
            elif os.path.isfile(path):
                names.append(name)
            elif os.path.isdir(path):
                (links if os.path.islink(path) else folders).append(name)
            else:
                left_out.setdefault("unreadable", []).append(name)
    return sorted(names), left_out


class Files:
    """The files of a folder or of a zip by their relative names, with "/"; else DataError.

    left_out {why: names}: what else is there. sums {name: CRC-32}: of what was read."""

    def __init__(self, path):
        self.path, self.zip, self.sums = Path(path), None, {}
        if self.path.is_dir():
            self.names, self.left_out = walk(self.path)
        elif not self.path.is_file():
            raise DataError(f"{path}: neither a folder nor a file.")
        else:
            try:
                self.zip = zipfile.ZipFile(ZipBytes(self.path))
            except Exception as error:  # zipfile raises nearly anything on damaged files
                pass_on(error, path)
                what = f"not a readable zip ({error}); either it is cut short, or no zip at all"
                raise DataError(f"{path}: {what}. Give a folder or a zip.") from None
            check_members(path, self.zip.infolist())
            self.members = {name_of(member): member for member in self.zip.infolist()}
            names = sorted(name for name in self.members if not name.endswith("/"))
            self.names = [name for name in names if not HIDDEN.match(name)]
            hidden = [HIDDEN.match(name)[0] for name in names if HIDDEN.match(name)]
            self.left_out = dict(hidden=list(dict.fromkeys(hidden))) if hidden else {}

    @functools.cached_property
    def spelled(self):
        return {normalize("NFC", name): name for name in self.names} | {n: n for n in self.names}

    def called(self, name):
        """The name of a file as it stands here: a Mac writes é as two signs, people as one."""
        return self.spelled.get(name) or self.spelled.get(normalize("NFC", name), name)

    def open(self, name):
        """A file to read from, in binary."""
        if self.zip is None:
            return (self.path / name).open("rb")
        member = self.members[name]
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("packed by another method than deflate")
        return self.zip.open(member)

    def mark(self, name):
        """Tells a file, unread, from another of its name: in a zip its CRC-32, else its size."""
        if self.zip is None:
            return (self.path / name).stat().st_size
        return self.members[name].CRC

    def read(self, name):
        """The bytes of a file, unpacked no further than a picture or captions can need."""
        most = MOST_BYTES
        if self.zip is not None:
            most = min(most, (1 << 20) + 100 * self.members[name].compress_size)
        with self.open(name) as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"more than {most:,} bytes unpacked")
        self.sums[name] = zlib.crc32(content)
        return content

    def text(self, name):
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"{self.path}: {name} is not UTF-8 text. Save it as UTF-8.") from None
        except Exception as error:  # a damaged or encrypted member of a zip raises nearly anything
            raise DataError(f"{self.path}: {name} can't be read ({error}).") from None
