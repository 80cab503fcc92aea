"""Write archives that the kernel unpacks into its first root: cpio in the "newc" format.

Format: cpio(5), "New ASCII Format", and the kernel's Documentation/driver-api/early-userspace/
buffer-format. Owner is root, time is zero, so equal content makes equal bytes. The kernel unpacks
archives that follow one another, later files winning.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import PurePosixPath

from banger.model import Value

_MAGIC = b"070701"
_END = "TRAILER!!!"


class Entry(Value):
    """One file, directory, link or device. `mode` has type and permissions, as in st_mode."""

    path: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def file(path: str, content: bytes, mode: int = 0o644) -> Entry:
    """Make a regular file's entry."""
    return Entry(path=path, mode=stat.S_IFREG | mode, content=content)


def link(path: str, target: str) -> Entry:
    """Make a symbolic link's entry."""
    return Entry(path=path, mode=stat.S_IFLNK | 0o777, content=target.encode())


def directory(path: str, mode: int = 0o755) -> Entry:
    """Make a directory's entry."""
    return Entry(path=path, mode=stat.S_IFDIR | mode)


def archive(entries: Iterable[Entry]) -> bytes:
    """Make a whole archive; directories that are not named are made before what is in them."""
    parts: list[bytes] = []
    known: set[str] = set()
    for entry in entries:
        for parent in reversed(PurePosixPath(entry.path).parents):
            if str(parent) not in (".", "/") and str(parent) not in known:
                known.add(str(parent))
                parts.append(_member(len(parts) + 1, directory(str(parent))))
        known.add(entry.path)
        parts.append(_member(len(parts) + 1, entry))
    parts.append(_member(0, Entry(path=_END, mode=0)))
    return b"".join(parts)


def _member(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    numbers = (inode, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
    head = _MAGIC + b"".join(b"%08X" % number for number in numbers) + name
    return _padded(head) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
