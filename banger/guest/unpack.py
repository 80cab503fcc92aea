"""Write down a tar archive that a guest sends, below one directory and nowhere else.

The guest is not trusted: every name is walked from the directory's own descriptor, and a link is never
followed (openat(2), O_NOFOLLOW).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from banger.errors import InvalidImage
from banger.images.layers import names
from banger.images.layers.tarstream import Entry, Kind, entries

MOST_ENTRIES = 1_000_000
MOST_EXTRA = 1 << 20
_CHUNK = 1 << 18
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Pipe:
    """An archive that comes through a descriptor; `position` is in bytes from its beginning."""

    def __init__(self, fd: int, seen: Callable[[int], None]):
        self.position = 0
        self._fd = fd
        self._seen = seen
        self._ahead = 0

    def read(self, size: int) -> bytes:
        """Read exactly so many bytes. Raises InvalidImage at the end."""
        got = bytearray()
        while len(got) < size:
            got += self._some(size - len(got))
        return bytes(got)

    def skip(self, size: int) -> None:
        """Pass so many bytes, those of the entry that were written down among them."""
        size, self._ahead = size - self._ahead, 0
        while size:
            size -= len(self._some(min(size, _CHUNK)))

    def write_to(self, fd: int, size: int) -> None:
        """Write the next bytes, an entry's own, to a file."""
        self._ahead = size
        while size:
            data = self._some(min(size, _CHUNK))
            size -= len(data)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]

    def _some(self, size: int) -> bytes:
        data = os.read(self._fd, size)
        if not data:
            raise InvalidImage("It ends half-way.")
        self.position += len(data)
        self._seen(len(data))
        return data


def unpack(archive: Pipe, root: int) -> list[str]:
    """Write an archive's entries below the directory `root`; give the names of those left out.

    Devices, pipes and sockets are left out; setuid, setgid and owners are the guest's affair and not kept.
    Raises InvalidImage for what is malformed or would lead out, OSError.
    """
    left_out: list[str] = []
    directories: list[tuple[list[bytes], Entry]] = []
    for count, entry in enumerate(entries(archive, MOST_EXTRA)):
        if count > MOST_ENTRIES:
            raise InvalidImage(f"It has more than {MOST_ENTRIES} entries.")
        parts = names.split(entry.path) if entry.path.strip(b"./") else []
        if not parts and entry.kind is not Kind.DIRECTORY:
            raise InvalidImage("Something takes the place of the directory itself.")
        if entry.kind is Kind.DIRECTORY:
            os.close(_directory(root, parts))
            directories.append((parts, entry))
        elif entry.kind in (Kind.FILE, Kind.SYMLINK, Kind.HARD_LINK):
            _make(archive, root, parts, entry)
        else:
            left_out.append(names.shown(entry.path))
    for parts, entry in reversed(directories):  # last: what is written into one changes its time
        fd = _directory(root, parts)
        try:
            os.fchmod(fd, entry.mode & 0o777 | 0o700)
            os.utime(fd, (entry.mtime, entry.mtime))
        finally:
            os.close(fd)
    return left_out


def _directory(root: int, parts: list[bytes]) -> int:
    """Open a directory below `root`, made where there is none; a link on the way is an OSError."""
    fd = os.dup(root)
    for part in parts:
        try:
            try:
                below = os.open(part, _DIRECTORY, dir_fd=fd)
            except FileNotFoundError:
                os.mkdir(part, 0o700, dir_fd=fd)
                below = os.open(part, _DIRECTORY, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


def _make(archive: Pipe, root: int, parts: list[bytes], entry: Entry) -> None:
    above, name = _directory(root, parts[:-1]), parts[-1]
    try:
        if entry.kind is Kind.SYMLINK:
            os.symlink(entry.target, name, dir_fd=above)
            os.utime(name, (entry.mtime, entry.mtime), dir_fd=above, follow_symlinks=False)
        elif entry.kind is Kind.HARD_LINK:
            _link(root, names.split(entry.target), above, name)
        else:
            _file(archive, above, name, entry)
    finally:
        os.close(above)


def _link(root: int, target: list[bytes], above: int, name: bytes) -> None:
    source = _directory(root, target[:-1])
    try:
        os.link(target[-1], name, src_dir_fd=source, dst_dir_fd=above, follow_symlinks=False)
    finally:
        os.close(source)


def _file(archive: Pipe, above: int, name: bytes, entry: Entry) -> None:
    fd = os.open(name, _NEW, 0o600, dir_fd=above)
    try:
        archive.write_to(fd, entry.size)
        os.fchmod(fd, entry.mode & 0o777)
        os.utime(fd, (entry.mtime, entry.mtime))
    finally:
        os.close(fd)
