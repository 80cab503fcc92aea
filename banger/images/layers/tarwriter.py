"""Write a tar archive that every reader understands alike (POSIX.1-2017 pax)."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping

from banger.errors import InvalidImage
from banger.images.layers.tarstream import BLOCK, Kind
from banger.model import Value

_BUFFER = 1 << 20
_COPIED_BY_US = 1 << 18
"""A smaller file is read and written with its neighbours; for a larger one the kernel copies."""

_ONE_COPY = 1 << 30
_ZEROS = bytes(BLOCK)
_LONGEST = 100
_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s8s64x8s8s167x")
_LARGEST_OWNER = 0o7777777
_LARGEST_SIZE = 0o77777777777


class Member(Value):
    """One entry of an archive to be written. `layer` and `offset` are where a file's `size` bytes are.

    `xattrs` are pax records. `first` is the path written before for the same file; then this one is a
    hard link to it.
    """

    path: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    layer: int
    offset: int
    target: bytes
    device: tuple[int, int]
    xattrs: bytes
    first: bytes | None = None


class Writer:
    """Write members to a descriptor, their data out of `layers` (descriptors by number)."""

    def __init__(self, out: int, layers: Mapping[int, int], most_bytes: int):
        self.written = 0
        self._out = out
        self._layers = layers
        self._most = most_bytes
        self._buffer = bytearray()

    def add(self, member: Member) -> None:
        """Write one entry and its data. Raises InvalidImage when the archive becomes too large."""
        self._buffer += header(member)
        if member.kind is Kind.FILE and member.first is None and member.size:
            self._copy(self._layers[member.layer], member.offset, member.size)
            self._buffer += bytes(-member.size % BLOCK)
        if len(self._buffer) >= _BUFFER:
            self._flush()

    def finish(self) -> None:
        """Write the end of the archive."""
        self._buffer += 2 * _ZEROS
        self._flush()

    def _copy(self, fd: int, offset: int, size: int) -> None:
        self._check_room(size)
        if size <= _COPIED_BY_US:
            data = os.pread(fd, size, offset)
            assert len(data) == size
            self._buffer += data
            return
        self._flush()
        self.written += size
        while size:
            copied = _copy_some(fd, self._out, offset, size)
            assert copied
            offset, size = offset + copied, size - copied

    def _flush(self) -> None:
        self._check_room(len(self._buffer))
        with memoryview(self._buffer) as view:
            at = 0
            while at < len(view):
                at += os.write(self._out, view[at:])
        self.written += len(self._buffer)
        self._buffer.clear()

    def _check_room(self, size: int) -> None:
        if self.written + size > self._most:
            raise InvalidImage(
                f"Its files come to more than {self._most >> 20} MiB.",
                hint="`content_mib` of `[limits]` in config.toml is the limit; raise it if you trust it.",
            )


def _copy_some(source: int, out: int, offset: int, size: int) -> int:
    """Let the kernel copy a part of a file; not every file system can."""
    size = min(size, _ONE_COPY)
    try:
        return os.copy_file_range(source, out, size, offset)
    except OSError:
        return os.write(out, os.pread(source, min(size, _BUFFER), offset))


def record(key: bytes, value: bytes) -> bytes:
    """Write a pax record; its length counts its own digits."""
    rest = b" " + key + b"=" + value + b"\n"
    size = len(rest)
    while size != len(str(size)) + len(rest):
        size = len(str(size)) + len(rest)
    return str(size).encode() + rest


def header(member: Member) -> bytes:
    """Write a member's header, an extended one before it for what does not fit."""
    kind, target, size = member.kind, member.target, member.size
    if member.first is not None:
        kind, target, size = Kind.HARD_LINK, member.first, 0
    path = member.path + b"/" if kind is Kind.DIRECTORY else member.path
    extended = b"" if kind is Kind.HARD_LINK else member.xattrs
    if len(path) > _LONGEST:
        extended += record(b"path", path)
    if len(target) > _LONGEST:
        extended += record(b"linkpath", target)
    for key, value, most in (
        (b"uid", member.uid, _LARGEST_OWNER),
        (b"gid", member.gid, _LARGEST_OWNER),
        (b"size", size, _LARGEST_SIZE),
    ):
        if value > most:
            extended += record(key, b"%d" % value)
    return _extended(extended) + _block(member, b"%d" % kind, path, target, size)


def _extended(records: bytes) -> bytes:
    if not records:
        return b""
    plain = Member(
        path=b"", kind=Kind.FILE, mode=0o644, uid=0, gid=0, mtime=0, size=0,
        layer=0, offset=0, target=b"", device=(0, 0), xattrs=b"",
    )  # fmt: skip
    return _block(plain, b"x", b"pax", b"", len(records)) + records + bytes(-len(records) % BLOCK)


def _block(member: Member, flag: bytes, path: bytes, target: bytes, size: int) -> bytes:
    """Write one block; what does not fit is cut, an extended header has it."""
    block = bytearray(
        _HEADER.pack(
            path[:_LONGEST],
            b"%07o" % member.mode,
            b"%07o" % (member.uid & _LARGEST_OWNER),
            b"%07o" % (member.gid & _LARGEST_OWNER),
            b"%011o" % (size & _LARGEST_SIZE),
            b"%011o" % member.mtime,
            b" " * 8,
            flag,
            target[:_LONGEST],
            b"ustar\x0000",
            b"%07o" % member.device[0],
            b"%07o" % member.device[1],
        )
    )
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)
