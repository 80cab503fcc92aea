"""Put an archive's tree into a fresh ext4 file system."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from banger.errors import Cancelled
from banger.storage.archive import Entry
from banger.storage.libext2fs import ROOT, FileSystem, Metadata

LOOK_EVERY = 256
_LOST = b"lost+found"


def fill(
    fs: FileSystem, entries: Iterable[Entry], archive: Path, cancelled: Callable[[], bool] = lambda: False
) -> None:
    """Make an archive's entries in an empty file system. Raises DiskFull, ProgramFailed, Cancelled."""
    tree = _Tree(fs)
    fs.remove_empty(ROOT, _LOST)  # the image may have one of its own, of any type
    with archive.open("rb") as content:
        for number, entry in enumerate(entries):
            if number % LOOK_EVERY == 0 and cancelled():
                raise Cancelled("Writing the file system was ended.")
            tree.add(entry, content.fileno())


def below(directory: bytes, entries: Iterable[Entry]) -> Iterator[Entry]:
    """Give what is below a directory, and no more, by paths that begin there."""
    prefix = directory + b"/"
    for entry in entries:
        if entry.path.startswith(prefix):
            first = entry.same_as
            yield msgspec.structs.replace(
                entry,
                path=entry.path.removeprefix(prefix),
                same_as=None if first is None else first.removeprefix(prefix),
            )


class _Tree:
    """The directories made so far, by path; everything else is found through them."""

    def __init__(self, fs: FileSystem):
        self._fs = fs
        self._directories = {b"": ROOT}

    def add(self, entry: Entry, source: int) -> None:
        """Make one entry, with its content from descriptor `source`."""
        what = _metadata(entry)
        if entry.path in self._directories:  # the root, or one that was made for its child
            inode = self._directories[entry.path]
            self._fs.set_metadata(inode, what)
        else:
            above, _, name = entry.path.rpartition(b"/")
            parent = self._directory(above)
            if entry.same_as is not None:
                inode = self._inode(entry.same_as)
                self._fs.count_link(inode)
            else:
                inode = self._make(entry, what, parent, source)
            self._fs.link(parent, name, inode, entry.mode)
        if entry.xattrs:
            self._fs.set_xattrs(inode, entry.xattrs)

    def _make(self, entry: Entry, what: Metadata, parent: int, source: int) -> int:
        if stat.S_ISDIR(entry.mode):
            inode = self._fs.directory(parent, what)
            self._directories[entry.path] = inode
            return inode
        if entry.link is not None:
            return self._fs.symlink(parent, entry.link, what)
        if stat.S_ISREG(entry.mode):
            return self._fs.file(parent, what, source, entry.offset)
        return self._fs.special(parent, what)

    def _directory(self, path: bytes) -> int:
        """Give a directory's inode; one that the archive does not name is made as mkfs makes the root."""
        if path not in self._directories:
            above, _, name = path.rpartition(b"/")
            what = Metadata(mode=stat.S_IFDIR | 0o755, uid=0, gid=0, mtime_s=0)
            parent = self._directory(above)
            self._directories[path] = self._fs.directory(parent, what)
            self._fs.link(parent, name, self._directories[path], what.mode)
        return self._directories[path]

    def _inode(self, path: bytes) -> int:
        above, _, name = path.rpartition(b"/")
        return self._fs.lookup(self._directory(above), name)


def _metadata(entry: Entry) -> Metadata:
    return Metadata(
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        mtime_s=entry.mtime_s,
        size=entry.size,
        device=entry.device,
    )
