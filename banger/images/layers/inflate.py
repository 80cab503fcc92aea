"""Unpack a layer's compression with a bound on everything: output, ratio, window, members.

What a layer is packed with is told by its first bytes, not by its media type, which is only a claim;
the digest of the output tells whether it was right. gzip: RFC 1952. zstd: RFC 8878.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Generator, Iterator
from typing import IO, cast

import zstandard

from banger.errors import InvalidImage

CHUNK = 1 << 20
"""The most bytes that one step gives."""

LARGEST_WINDOW = 1 << 27
"""Bytes of output that a zstd frame may refer back to, all held in memory. `zstd --long` makes 2^27."""

_INPUT = 256 * 1024
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # from the second byte; the first is 50 to 5f
_BYTES_A_MEMBER = 512  # the formats that use many gzip members put at least a tar header into each
_FREE_MEMBERS = 1024


class Bounds:
    """What a layer's output may come to: `size` bytes in all, and `ratio` times what was read.

    The ratio counts from `floor` bytes on: a small layer of zeros is no bomb.
    """

    def __init__(self, size: int, ratio: int, floor: int):
        self.size = size
        self.ratio = ratio
        self.floor = floor
        self.given = 0

    def count(self, output: int, read: int) -> None:
        """Add output to what was given before; `read` is what was read of the blob so far."""
        self.given += output
        if self.given > self.size:
            raise InvalidImage(
                f"It unpacks to more than {self.size >> 20} MiB.",
                hint="`[limits]` in config.toml: `content_mib` of images, `bundle_content_mib` of bundles.",
            )
        if self.given > max(self.floor, self.ratio * read):
            raise InvalidImage(
                f"It unpacks to more than {self.ratio} times its size: that is a bomb, not an image."
            )


def is_packed(fd: int) -> bool:
    """Tell whether a blob is compressed, by its first bytes."""
    head = os.pread(fd, 4, 0)
    return head.startswith(_GZIP) or _is_zstd(head)


def chunks(fd: int, bounds: Bounds) -> Iterator[bytes]:
    """Give a blob's content, unpacked, in pieces of at most CHUNK bytes.

    Raises InvalidImage when it is cut off, damaged, followed by something else, or out of bounds.
    """
    head = os.pread(fd, 4, 0)
    if head.startswith(_GZIP):
        return _gzip(fd, bounds)
    return _zstd(fd, bounds) if _is_zstd(head) else _plain(fd, bounds)


def _is_zstd(head: bytes) -> bool:
    return head == _ZSTD or (head[1:] == _ZSTD_SKIPPABLE and 0x50 <= head[0] <= 0x5F)


class _Blob:
    """A blob read from its beginning, whatever the descriptor's position."""

    def __init__(self, fd: int):
        self.fd = fd
        self.position = 0

    def read(self, size: int = -1) -> bytes:
        data = os.pread(self.fd, _INPUT if size < 0 else min(size, CHUNK), self.position)
        self.position += len(data)
        return data


def _plain(fd: int, bounds: Bounds) -> Iterator[bytes]:
    blob = _Blob(fd)
    while data := blob.read(CHUNK):
        bounds.count(len(data), blob.position)
        yield data


def _gzip(fd: int, bounds: Bounds) -> Iterator[bytes]:
    """Unpack gzip members one after another: some builders make one for each file."""
    blob, members = _Blob(fd), 0
    data = blob.read()
    while data:
        members += 1
        if members > _FREE_MEMBERS + bounds.given // _BYTES_A_MEMBER:
            raise InvalidImage("It has more gzip members than content.")
        data = yield from _member(data, blob, bounds)
        data = data or blob.read()


def _member(data: bytes, blob: _Blob, bounds: Bounds) -> Generator[bytes, None, bytes]:
    """Unpack one gzip member; return what follows of the bytes read."""
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    full = False  # then zlib may hold more output, though it has taken all input
    while not unpacker.eof:
        if not data and not full:
            raise InvalidImage("Its gzip stream is cut off.")
        try:
            output = unpacker.decompress(data, CHUNK)
        except zlib.error as error:
            raise InvalidImage(f"Its gzip stream is damaged ({error}).") from None
        bounds.count(len(output), blob.position)
        if output:
            yield output
        full = len(output) == CHUNK
        data = unpacker.unconsumed_tail or (b"" if unpacker.eof else blob.read())
    return unpacker.unused_data


def _zstd(fd: int, bounds: Bounds) -> Iterator[bytes]:
    """Unpack zstd frames, skippable ones between them; a stream that is cut off fails at its digest."""
    blob = _Blob(fd)
    unpacker = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    reader = unpacker.stream_reader(cast("IO[bytes]", blob), read_size=_INPUT, read_across_frames=True)
    try:
        while output := reader.read(CHUNK):
            bounds.count(len(output), blob.position)
            yield output
    except zstandard.ZstdError as error:
        raise InvalidImage(f"Its zstd stream is damaged ({error}).") from None
