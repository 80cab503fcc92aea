"""Read an ext4 file system that nobody vouches for, with e2fsprogs' own library.

The library parses it in the process that calls: let that be one that has nothing to lose (`sandbox.confine`).
Format: the kernel's Documentation/filesystems/ext4 (inodes, directory entries).
"""

from __future__ import annotations

import ctypes
import stat
import struct
from collections.abc import Iterator
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p

from banger.errors import InvalidImage
from banger.model import Value
from banger.storage.libext2fs import INODE_SIZE, call, loaded

CHUNK = 1 << 20
_OPEN_64BITS = 0x20000
_EXTENTS, _INLINE = 0x80000, 0x10000000
_IN_INODE = 60  # bytes of i_block, where a short link's target is
_ENTRY = struct.Struct("<IHBB")  # ext2_dir_entry_2: inode, record, name's length, type
_MORE, _ENOUGH = 0, 2  # DIRENT_ABORT


class Node(Value):
    """What an inode says of a file. `mode` has type and permissions; `in_inode` is a short link's target."""

    inode: int
    mode: int
    uid: int
    gid: int
    mtime_s: int
    size: int
    links: int
    device: tuple[int, int]
    in_inode: bytes | None


class Reader:
    """The file system behind a descriptor. Every error of the library is a ProgramFailed."""

    def __init__(self, fd: int):
        self._fs = c_void_p()
        manager = c_void_p.in_dll(loaded(), "unixfd_io_manager")
        name, flags = str(fd).encode(), c_int(_OPEN_64BITS)
        call("ext2fs_open", name, flags, c_int(0), c_uint(0), manager, byref(self._fs))

    def node(self, inode: int) -> Node:
        """Read an inode."""
        content = ctypes.create_string_buffer(INODE_SIZE)
        call("ext2fs_read_inode_full", self._fs, c_uint(inode), content, c_int(INODE_SIZE))
        return _node(inode, content.raw)

    def names(self, directory: int, most: int) -> list[tuple[bytes, int]]:
        """List a directory's names with their inodes, sorted; no more than one beyond `most`."""
        found: list[tuple[bytes, int]] = []

        def take(
            _dir: int, _entry: int, entry: int, _offset: int, _size: int, _buffer: int, _own: int
        ) -> int:
            inode, _, length, _ = _ENTRY.unpack(ctypes.string_at(entry, _ENTRY.size))
            name = ctypes.string_at(entry + _ENTRY.size, length)
            if name not in (b".", b".."):
                found.append((name, inode))
            return _ENOUGH if len(found) > most else _MORE

        function = _TAKE_NAME(take)
        call("ext2fs_dir_iterate2", self._fs, c_uint(directory), c_int(0), None, function, None)
        return sorted(found)

    def target(self, link: Node) -> bytes:
        """Give where a symbolic link leads."""
        if link.in_inode is not None:
            return link.in_inode
        if link.size > CHUNK:
            raise InvalidImage("A link's target is longer than any can be.")
        return b"".join(self.content(link))

    def content(self, file: Node) -> Iterator[bytes]:
        """Give a file's content piece by piece, holes as zeros: exactly its size."""
        handle, piece, got = c_void_p(), ctypes.create_string_buffer(CHUNK), c_uint()
        call("ext2fs_file_open", self._fs, c_uint(file.inode), c_int(0), byref(handle))
        try:
            left = file.size
            while left:
                call("ext2fs_file_read", handle, piece, c_uint(min(left, CHUNK)), byref(got))
                if not got.value:
                    raise InvalidImage("A file ends before its size says so.")
                left -= got.value
                yield piece.raw[: got.value]
        finally:
            loaded().ext2fs_file_close(handle)

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        """Give a file's extended attributes by their full names (`user.x`)."""
        found: dict[bytes, bytes] = {}

        def take(name: bytes, value: int, size: int, _: int) -> int:
            found[name] = ctypes.string_at(value, size)
            return 0

        handle, function = c_void_p(), _TAKE_VALUE(take)
        call("ext2fs_xattrs_open", self._fs, c_uint(inode), byref(handle))
        try:
            call("ext2fs_xattrs_read", handle)
            call("ext2fs_xattrs_iterate", handle, function, None)
        finally:
            loaded().ext2fs_xattrs_close(byref(handle))
        return found


_TAKE_NAME = ctypes.CFUNCTYPE(c_int, c_uint, c_int, c_void_p, c_int, c_int, c_void_p, c_void_p)
_TAKE_VALUE = ctypes.CFUNCTYPE(c_int, c_char_p, c_void_p, c_size_t, c_void_p)


def _node(inode: int, content: bytes) -> Node:
    mode, uid, size, _, _, mtime = struct.unpack_from("<HHIIIi", content)
    gid, links = struct.unpack_from("<HH", content, 24)
    (flags,) = struct.unpack_from("<I", content, 32)
    (size_high,) = struct.unpack_from("<I", content, 108)
    uid_high, gid_high = struct.unpack_from("<HH", content, 120)
    size |= size_high << 32
    short = stat.S_ISLNK(mode) and size < _IN_INODE and not flags & (_EXTENTS | _INLINE)
    return Node(
        inode=inode,
        mode=mode,
        uid=uid | uid_high << 16,
        gid=gid | gid_high << 16,
        mtime_s=mtime + ((struct.unpack_from("<I", content, 136)[0] & 3) << 32),
        size=size,
        links=links,
        device=_device(*struct.unpack_from("<II", content, 40)),
        in_inode=content[40 : 40 + size] if short else None,
    )


def _device(old: int, new: int) -> tuple[int, int]:
    if old:
        return old >> 8 & 0xFF, old & 0xFF
    return (new & 0xFFF00) >> 8, new & 0xFF | new >> 12 & 0xFFF00
