"""Write into a fresh ext4 file system with e2fsprogs' own library: no root, no mount, no command language.

Format: the kernel's Documentation/filesystems/ext4 (inodes, extents). Functions: lib/ext2fs/ext2fs.h.
Use it on file systems that we have made ourselves: one that a guest could write to may be damaged on
purpose, and the library runs in this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import stat
import struct
from collections.abc import Iterator
from ctypes import byref, c_char_p, c_int, c_long, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from banger.errors import DiskFull, HostLacks, ProgramFailed
from banger.model import Value

ROOT = 2
"""The number of the root directory's inode."""

BLOCK = 4096
INODE_SIZE = 256
MAX_XATTRS = 3072
"""What an inode's extended attributes may take, with names, before they need the feature ea_inode."""

_LOADED = "libext2fs.so.2", "libcom_err.so.2"
_OPEN_RW, _OPEN_64BITS, _OPEN_EXCLUSIVE = 0x1, 0x20000, 0x4000
_ALLOCATE_WRITTEN = 0x2  # EXT2_FALLOCATE_FORCE_INIT: the extents count as written
_ANYWHERE = (1 << 64) - 1  # near the inode
_EXTENT_ROOT, _EXTENT_NEXT_LEAF, _EXTENT_IS_LEAF = 0x1, 0x7, 0x1
_EXTENTS_FLAG = 0x80000
_NO_EXTENTS = struct.pack("<HHHHI", 0xF30A, 0, 4, 0, 0)  # an extent tree's head, without extents
_LARGE_XATTR = BLOCK - 56  # EXT4_XATTR_MIN_LARGE_EA_SIZE
_BUFFER = 1 << 20
_EXTRA_SIZE = 32  # how much of the larger inode is used

# What is told by a number of its own (ext2_err.et); the others by their text.
_NO_SPACE_IN_DIRECTORY = 2133571366
_NO_NEXT_EXTENT = 2133571452
_FULL = (2133571400, 2133571401)  # no block, no inode

# Directory entries name the kind of what they lead to (EXT2_FT_...).
_KINDS = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFLNK: 7,
}


class Metadata(Value):
    """What an inode says of a file. `mode` has type and permissions, as in st_mode; `size` is in bytes."""

    mode: int
    uid: int
    gid: int
    mtime_s: int
    size: int = 0
    device: tuple[int, int] = (0, 0)


class _Extent(ctypes.Structure):
    """A run of blocks (struct ext2fs_extent)."""

    _fields_ = (("physical", c_uint64), ("logical", c_uint64), ("length", c_uint), ("flags", c_uint))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[FileSystem]:
    """Open the file system in a file to write to it; changes of a block that raises are not all written."""
    fs = FileSystem(path)
    try:
        yield fs
    except BaseException:
        fs.abandon()
        raise
    fs.close()


class FileSystem:
    """An open file system. Every error is a ProgramFailed, a full one DiskFull."""

    def __init__(self, path: Path):
        self._fs = c_void_p()
        manager = c_void_p.in_dll(loaded(), "unix_io_manager")
        flags = _OPEN_RW | _OPEN_64BITS | _OPEN_EXCLUSIVE
        call("ext2fs_open", os.fsencode(path), c_int(flags), c_int(0), c_uint(0), manager, byref(self._fs))
        call("ext2fs_read_bitmaps", self._fs)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # for content, past the library

    def close(self) -> None:
        """Write what is not written yet, and the bitmaps."""
        os.close(self._fd)
        call("ext2fs_close_free", byref(self._fs))

    def abandon(self) -> None:
        """Forget it as it is: half written."""
        os.close(self._fd)
        loaded().ext2fs_free(self._fs)

    def directory(self, parent: int, what: Metadata) -> int:
        """Make a directory that has no name yet; give its inode."""
        inode = self._new_inode(parent, what.mode)
        call("ext2fs_mkdir", self._fs, c_uint(parent), c_uint(inode), None)
        self.set_metadata(inode, what)
        return inode

    def symlink(self, parent: int, target: bytes, what: Metadata) -> int:
        """Make a symbolic link that has no name yet; give its inode."""
        inode = self._new_inode(parent, what.mode)
        call("ext2fs_symlink", self._fs, c_uint(parent), c_uint(inode), None, target)
        self.set_metadata(inode, what)
        return inode

    def special(self, parent: int, what: Metadata) -> int:
        """Make a device or a fifo that has no name yet; give its inode."""
        major, minor = what.device
        if major < 256 and minor < 256:
            place = struct.pack("<I", major << 8 | minor)
        else:
            place = struct.pack("<II", 0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)
        return self._make(parent, what, place, 0)

    def file(self, parent: int, what: Metadata, source: int, offset: int) -> int:
        """Make a file that has no name yet, with `what.size` bytes of descriptor `source` from `offset`."""
        inode = self._make(parent, what, _NO_EXTENTS, _EXTENTS_FLAG)
        if what.size:
            blocks = -(-what.size // BLOCK)
            call(
                "ext2fs_fallocate", self._fs, c_int(_ALLOCATE_WRITTEN), c_uint(inode), None,
                c_uint64(_ANYWHERE), c_uint64(0), c_uint64(blocks),
            )  # fmt: skip
            for extent in self._extents(inode):
                begin, end = extent.logical * BLOCK, (extent.logical + extent.length) * BLOCK
                _copy(source, offset + begin, self._fd, extent.physical * BLOCK, min(end, what.size) - begin)
        return inode

    def link(self, directory: int, name: bytes, inode: int, mode: int) -> None:
        """Give an inode of this type a name in a directory; the number of its links is not changed."""
        words = (self._fs, c_uint(directory), name, c_uint(inode), c_int(_KINDS[stat.S_IFMT(mode)]))
        code = loaded().ext2fs_link(*words)
        if code == _NO_SPACE_IN_DIRECTORY:
            call("ext2fs_expand_dir", self._fs, c_uint(directory))
            code = loaded().ext2fs_link(*words)
        check(code)

    def lookup(self, directory: int, name: bytes) -> int:
        """Give the inode that has this name in a directory."""
        found = c_uint()
        words = (self._fs, c_uint(directory), name, c_int(len(name)), None, byref(found))
        call("ext2fs_lookup", *words)
        return found.value

    def count_link(self, inode: int) -> None:
        """Count one more name of a file."""
        content = self._read(inode)
        links = struct.unpack_from("<H", content, 26)[0]
        struct.pack_into("<H", content, 26, links + 1)
        self._write(inode, content)

    def set_metadata(self, inode: int, what: Metadata) -> None:
        """Set owner, permissions and times of what is there; its type and size stay."""
        content = self._read(inode)
        _put_metadata(content, what)
        self._write(inode, content)

    def set_xattrs(self, inode: int, values: dict[bytes, bytes]) -> None:
        """Give a file extended attributes, by their full names (`user.x`)."""
        handle = c_void_p()
        call("ext2fs_xattrs_open", self._fs, c_uint(inode), byref(handle))
        try:
            for name, value in values.items():
                call("ext2fs_xattr_set", handle, name, value, ctypes.c_size_t(len(value)))
        finally:
            call("ext2fs_xattrs_close", byref(handle))
        # A large value has an inode of its own, whose blocks the library does not count here.
        if blocks := sum(-(-len(value) // BLOCK) for value in values.values() if len(value) > _LARGE_XATTR):
            content = self._read(inode)
            sectors = struct.unpack_from("<I", content, 28)[0] + blocks * BLOCK // 512
            struct.pack_into("<I", content, 28, sectors)
            self._write(inode, content)

    def remove_empty(self, directory: int, name: bytes) -> None:
        """Remove an empty directory: `lost+found`, which mkfs makes."""
        inode = self.lookup(directory, name)
        call("ext2fs_unlink", self._fs, c_uint(directory), name, c_uint(inode), c_int(0))
        call("ext2fs_punch", self._fs, c_uint(inode), None, None, c_uint64(0), c_uint64(_ANYWHERE))
        content = self._read(inode)
        struct.pack_into("<H", content, 26, 0)
        struct.pack_into("<I", content, 20, 1)  # when it was deleted: anything but zero
        self._write(inode, content)
        loaded().ext2fs_inode_alloc_stats2(self._fs, c_uint(inode), c_int(-1), c_int(1))
        parent = self._read(directory)
        struct.pack_into("<H", parent, 26, struct.unpack_from("<H", parent, 26)[0] - 1)
        self._write(directory, parent)

    def _new_inode(self, parent: int, mode: int) -> int:
        found = c_uint()
        call("ext2fs_new_inode", self._fs, c_uint(parent), c_int(mode), None, byref(found))
        return found.value

    def _make(self, parent: int, what: Metadata, place: bytes, flags: int) -> int:
        """Make an inode with what is in its `i_block`."""
        inode = self._new_inode(parent, what.mode)
        content = bytearray(INODE_SIZE)
        struct.pack_into("<H", content, 26, 1)
        struct.pack_into("<I", content, 32, flags)
        content[40 : 40 + len(place)] = place
        struct.pack_into("<I", content, 4, what.size & 0xFFFFFFFF)
        struct.pack_into("<I", content, 108, what.size >> 32)
        struct.pack_into("<H", content, 128, _EXTRA_SIZE)
        _put_metadata(content, what)
        loaded().ext2fs_inode_alloc_stats2(self._fs, c_uint(inode), c_int(1), c_int(0))
        self._write(inode, content)
        return inode

    def _extents(self, inode: int) -> Iterator[_Extent]:
        handle, extent = c_void_p(), _Extent()
        call("ext2fs_extent_open2", self._fs, c_uint(inode), None, byref(handle))
        try:
            where = _EXTENT_ROOT
            while True:
                code = loaded().ext2fs_extent_get(handle, c_int(where), byref(extent))
                if code == _NO_NEXT_EXTENT:
                    return
                check(code)
                if extent.flags & _EXTENT_IS_LEAF:
                    yield extent
                where = _EXTENT_NEXT_LEAF
        finally:
            loaded().ext2fs_extent_free(handle)

    def _read(self, inode: int) -> bytearray:
        content = ctypes.create_string_buffer(INODE_SIZE)
        call("ext2fs_read_inode_full", self._fs, c_uint(inode), content, c_int(INODE_SIZE))
        return bytearray(content.raw)

    def _write(self, inode: int, content: bytearray) -> None:
        call("ext2fs_write_inode_full", self._fs, c_uint(inode), bytes(content), c_int(INODE_SIZE))


def _put_metadata(content: bytearray, what: Metadata) -> None:
    """Put owner, mode and times into an inode of 256 bytes; seconds have 34 bits there, from 1901."""
    moment = min(max(what.mtime_s, -(1 << 31)), (1 << 33) + (1 << 32) - 1)
    low, epoch = moment & 0xFFFFFFFF, (moment + (1 << 31)) >> 32 & 3
    struct.pack_into("<HH", content, 0, what.mode, what.uid & 0xFFFF)
    struct.pack_into("<III", content, 8, low, low, low)
    struct.pack_into("<H", content, 24, what.gid & 0xFFFF)
    struct.pack_into("<HH", content, 120, what.uid >> 16, what.gid >> 16)
    struct.pack_into("<IIIII", content, 132, epoch, epoch, epoch, low, epoch)


def _copy(source: int, offset: int, target: int, place: int, size: int) -> None:
    while size:
        try:
            done = os.copy_file_range(source, target, size, offset, place)
        except OSError:  # not every file system can
            done = os.pwrite(target, os.pread(source, min(size, _BUFFER), offset), place)
        if not done:
            raise ProgramFailed("The archive ends before its last file does.")
        offset, place, size = offset + done, place + done, size - done


@functools.cache
def loaded() -> Any:
    """Load the library, once. Raises HostLacks."""
    try:
        library = ctypes.CDLL(_LOADED[0])
    except OSError:
        raise HostLacks(f"{_LOADED[0]} is not installed.", hint="apt-get install e2fsprogs") from None
    for function in ("ext2fs_inode_alloc_stats2", "ext2fs_free", "ext2fs_extent_free"):
        getattr(library, function).restype = None
    for function in ("ext2fs_link", "ext2fs_extent_get"):
        getattr(library, function).restype = c_long
    library.initialize_ext2_error_table()
    return library


def call(function: str, *words: Any) -> None:
    """Call a function that gives an error's number. Raises ProgramFailed, DiskFull."""
    called = getattr(loaded(), function)
    called.restype = c_long
    check(called(*words))


def check(code: int) -> None:
    """Raise what an error's number stands for; 0 is none. Raises ProgramFailed, DiskFull."""
    if code:
        message = ctypes.CDLL(_LOADED[1]).error_message
        message.restype, message.argtypes = c_char_p, (c_long,)
        text = message(code).decode("utf-8", "replace")
        if code == errno.ENOSPC:
            raise DiskFull
        if code in _FULL:
            raise DiskFull(f"The file system that is being made is full: {text}.")
        raise ProgramFailed(f"The file system could not be used: {text}.")
