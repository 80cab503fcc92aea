"""Blobs on the disk, by digest: `<blobs>/sha256/<hex>`, and `<hex>.part` while one comes in.

A part is a beginning of its blob: what came before a connection broke, or before the process died, is not
fetched again. Whoever fetches it holds a lock on it, which the kernel frees with its process. It becomes
the blob by a rename, after its size and digest were found right; one that is proven wrong is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from banger.errors import DiskFull, RegistryUnreachable, RegistryUntrusted, from_os_error
from banger.layout import size as show_size
from banger.model import Value

LOCK_LOOK_S = 0.1
FIRST_DELAY_S = 0.2
HASH_CHUNK = 1 << 20


class Blob(Value):
    """What a blob must be: `digest` is `sha256:` and 64 hex digits, `size` in bytes."""

    digest: str
    size: int


class Body(msgspec.Struct, frozen=True):
    """A blob's bytes from the offset `start` on, as they come in."""

    start: int
    chunks: Iterator[bytes]


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where a blob comes from, and who is told.

    `read(offset)` opens it there or, where that is not possible, at 0; it and its chunks raise
    RegistryUnreachable when another try is worth it. `pause(seconds)` waits, and raises when the pull
    is to end. `report(bytes)` is told how much of the blob is here.
    """

    read: Callable[[int], AbstractContextManager[Body]]
    pause: Callable[[float], None]
    report: Callable[[int], None]
    retries: int


def path_of(blobs: Path, digest: str) -> Path:
    """Give the place of a blob."""
    return blobs / "sha256" / digest.removeprefix("sha256:")


def find(blobs: Path, blob: Blob) -> Path | None:
    """Find a blob that came whole; None when it is not here. Its digest was checked when it came."""
    path = path_of(blobs, blob.digest)
    try:
        return path if path.stat().st_size == blob.size else None
    except FileNotFoundError:
        return None


def missing(blobs: Path, blob: Blob) -> int:
    """Tell how many bytes of a blob are still to come."""
    if find(blobs, blob):
        return 0
    try:
        return max(0, blob.size - _part_of(path_of(blobs, blob.digest)).stat().st_size)
    except FileNotFoundError:
        return blob.size


def check_room(blobs: Path, needed: int) -> None:
    """Raise DiskFull when so many bytes have no room, before any of them is fetched."""
    blobs.mkdir(mode=0o700, parents=True, exist_ok=True)
    free = shutil.disk_usage(blobs).free
    if needed > free:
        raise DiskFull(
            f"The image needs {show_size(needed)} at {blobs}, where {show_size(free)} are free.",
            hint=DiskFull.default_hint,
        )


def obtain(blobs: Path, blob: Blob, source: Source) -> Path:
    """Make it so that the blob is here, and give its path; a second one to ask waits for the first.

    Raises RegistryUnreachable when it does not come, RegistryUntrusted when something else comes,
    DiskFull, and what `source` raises. A part stays where it helps the next time.
    """
    path = path_of(blobs, blob.digest)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while (found := find(blobs, blob)) is None:
            with _claimed(_part_of(path)) as part:
                if part is None:
                    source.pause(LOCK_LOOK_S)  # flock has no deadline and cannot be waited on with others
                elif find(blobs, blob) is None:
                    _Part(part, blob, source).fill()
                    _publish(part, _part_of(path), path)
    except OSError as error:
        raise from_os_error(error) from error
    return found


def put(blobs: Path, digest: str, data: bytes, pause: Callable[[float], None]) -> None:
    """Keep a small blob that is here already; `pause` as in `Source`."""

    @contextlib.contextmanager
    def read(offset: int) -> Iterator[Body]:
        yield Body(offset, iter([data[offset:]]))

    source = Source(read=read, pause=pause, report=lambda _: None, retries=0)
    obtain(blobs, Blob(digest=digest, size=len(data)), source)


def get(blobs: Path, digest: str, limit: int) -> bytes | None:
    """Give a small blob that is here; None when it is not, or is not what its name says."""
    try:
        with path_of(blobs, digest).open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return None
    return data if digest_of(data) == digest else None


def digest_of(data: bytes) -> str:
    """Name what these bytes are: `sha256:…`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[int | None]:
    """Open a part and hold its lock; None when another holds it. An empty part does not stay."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        # The one who held it may have renamed or removed it since we opened it.
        if not _is_at(fd, path):
            yield None
            return
        try:
            yield fd
        finally:
            if os.fstat(fd).st_size == 0 and _is_at(fd, path):
                path.unlink()
    finally:
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


class _Part:
    """A part whose lock is held: how much of its blob is there, and the hash of that."""

    def __init__(self, fd: int, blob: Blob, source: Source):
        self._fd, self._blob, self._source = fd, blob, source
        self._have, self._hasher = 0, hashlib.sha256()

    def fill(self) -> None:
        """Bring it to its whole size and check its digest.

        What an earlier pull left may be wrong, or too long: then all of it is fetched once more.
        """
        self._read_on()
        resumed = self._have > 0
        if not self._complete() and resumed:
            self._restart()
            self._complete()
        if not self._is_right():
            self._restart()
            raise RegistryUntrusted(f"What came as {self} is something else: its digest is not that.")

    def __str__(self) -> str:
        return self._blob.digest[:19]

    def _is_right(self) -> bool:
        return f"sha256:{self._hasher.hexdigest()}" == self._blob.digest

    def _read_on(self) -> None:
        """Hash what is there already, from its beginning."""
        while chunk := os.read(self._fd, HASH_CHUNK):
            self._source.pause(0)
            self._hasher.update(chunk)
            self._have += len(chunk)
        self._source.report(self._have)

    def _restart(self) -> None:
        os.ftruncate(self._fd, 0)
        self._have, self._hasher = os.lseek(self._fd, 0, os.SEEK_SET), hashlib.sha256()

    def _complete(self) -> bool:
        """Fetch what is missing, over as many connections as it takes; tell whether it is the blob."""
        failures = 0
        while (before := self._have) < self._blob.size:
            try:
                self._take()
            except RegistryUnreachable as error:
                # Progress makes a try free: a server that cuts after each byte is ended for being slow.
                failures = 0 if self._have > before else failures + 1
                if failures > self._source.retries:
                    raise RegistryUnreachable(f"{error.message} {self._told()}") from None
                self._source.pause(FIRST_DELAY_S * 2 ** (failures - 1) if failures else 0)
            except RegistryUntrusted:
                self._restart()
                raise
        return self._is_right()

    def _take(self) -> None:
        """Write down what one connection brings."""
        with self._source.read(self._have) as body:
            if body.start != self._have:
                self._restart()
            for chunk in body.chunks:
                self._append(chunk)
        if self._have < self._blob.size:
            raise RegistryUnreachable("The registry ended too early.")

    def _append(self, chunk: bytes) -> None:
        if self._have + len(chunk) > self._blob.size:
            raise RegistryUntrusted(f"More came as {self} than its {self._blob.size} bytes.")
        try:
            view = memoryview(chunk)
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            # A full disk is not kept full by what is of no use yet.
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._restart()
            raise
        self._hasher.update(chunk)
        self._have += len(chunk)
        self._source.report(self._have)

    def _told(self) -> str:
        return f"{self._have} of the {self._blob.size} bytes of {self} are here."


def _publish(part: int, staged: Path, path: Path) -> None:
    """Give a whole part its name, so that a power cut leaves the name with its content or not at all."""
    os.fchmod(part, 0o400)
    os.fsync(part)
    staged.rename(path)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
