"""A layer as a stream of bytes: read once, hashed, and kept on the disk if it was compressed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Executor, Future

from banger.errors import InvalidImage


class Tape:
    """Read a stream of chunks in order; `position` is where the next read begins.

    The next chunk is unpacked in another thread while this one is looked at. With `spool`, all that
    passes is written there, so that it can be read again at the same positions.
    """

    def __init__(self, chunks: Iterator[bytes], ahead: Executor, spool: int | None = None):
        self.position = 0
        self._chunks = chunks
        self._ahead = ahead
        self._spool = spool
        self._hash = hashlib.sha256()
        self._chunk = b""
        self._at = 0
        self._coming: Future[bytes] | None = ahead.submit(next, chunks, b"")

    def read(self, size: int) -> bytes:
        """Read exactly `size` bytes. Raises InvalidImage when the stream ends before."""
        end = self._at + size
        if end <= len(self._chunk):
            data = self._chunk[self._at : end]
            self._at = end
            self.position += size
            return data
        return self._read_across(size)

    def skip(self, size: int) -> None:
        """Pass `size` bytes. Raises InvalidImage when the stream ends before."""
        while size > 0:
            step = min(size, len(self._chunk) - self._at)
            if not step and not self._turn():
                raise InvalidImage("It is cut off.")
            self._at += step
            self.position += step
            size -= step

    def finish(self) -> str:
        """Pass all that is left and give the stream's digest, `sha256:` and 64 hex digits."""
        self.position += len(self._chunk) - self._at
        while self._turn():
            self.position += len(self._chunk)
        self._at = len(self._chunk)
        return f"sha256:{self._hash.hexdigest()}"

    def _read_across(self, size: int) -> bytes:
        """Read across the end of a chunk."""
        pieces = []
        while size:
            piece = self._chunk[self._at : self._at + size]
            if not piece and not self._turn():
                raise InvalidImage("It is cut off.")
            pieces.append(piece)
            self._at += len(piece)
            self.position += len(piece)
            size -= len(piece)
        return b"".join(pieces)

    def _turn(self) -> bool:
        """Go to the next chunk; False at the end."""
        if self._coming is None:
            return False
        chunk = self._coming.result()
        if not chunk:
            self._coming = None
            return False
        self._coming = self._ahead.submit(next, self._chunks, b"")
        self._hash.update(chunk)
        if self._spool is not None:
            _write(self._spool, chunk)
        self._chunk, self._at = chunk, 0
        return True


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
