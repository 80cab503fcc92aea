"""Keep images and kernels in the cache, by digest; publish whole ones only.

An artifact is a directory `<cache>/<kind>s/<digest>/` with a manifest. It is built beside, under a
lock, and renamed into place: another builder of the same digest waits for the lock and finds it done.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, cast

import msgspec

from banger import proc
from banger.errors import Cancelled, from_os_error
from banger.model import Artifact

Kind = Literal["image", "kernel"]
Details = dict[str, str | int | list[str]]
MANIFEST = "manifest.json"
LOCK_LOOK_S = 0.1
_BUILDING = ".building-"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is written beside an artifact's files."""

    name: str
    created_us: int
    details: Details


def find(cache: Path, kind: str, digest: str) -> Artifact | None:
    """Find a published artifact; None when there is none, or its manifest cannot be read."""
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        return None
    place = _place(cache, kind, digest)
    try:
        manifest = msgspec.json.decode((place / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None
    return Artifact(
        kind=cast("Kind", kind),
        name=manifest.name,
        digest=digest,
        path=place,
        # What it takes on the disk: images are sparse, and a link to the user's own file takes nothing.
        size_bytes=sum(file.lstat().st_blocks * 512 for file in place.iterdir()),
        created_us=manifest.created_us,
        details=manifest.details,
    )


def build(
    cache: Path,
    kind: Kind,
    name: str,
    digest: str,
    make: Callable[[Path], Details],
    cancelled: Callable[[], bool],
) -> Artifact:
    """Make it so that the artifact is published; `make` fills a private directory and gives details.

    Raises what `make` raises (DiskFull for a full disk) and leaves nothing behind then; Cancelled
    when `cancelled()` turns true while another builder works on the same.
    """
    place = _place(cache, kind, digest)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(_lock(place), cancelled):
        if (found := find(cache, kind, digest)) is not None:
            return found
        _sweep(place.parent, digest)
        try:
            staging = Path(tempfile.mkdtemp(prefix=f"{_BUILDING}{digest}-", dir=place.parent))
            try:
                manifest = Manifest(name=name, created_us=time.time_ns() // 1000, details=make(staging))
                (staging / MANIFEST).write_bytes(msgspec.json.encode(manifest))
                _flush(*staging.iterdir(), staging)
                shutil.rmtree(place, ignore_errors=True)  # one whose manifest cannot be read
                staging.rename(place)
                _flush(place.parent)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
        except OSError as error:
            raise from_os_error(error) from error
    found = find(cache, kind, digest)
    assert found is not None
    return found


def add(image: Artifact, file: str, make: Callable[[Path], None], cancelled: Callable[[], bool]) -> Path:
    """Make it so that a published artifact has one more file, whole; `make` writes it. Gives its path.

    Raises what `make` raises (DiskFull for a full disk), and Cancelled.
    """
    place = image.path
    with _locked(_lock(place), cancelled):
        _sweep(place.parent, image.digest)  # one that died as late as it could has left its directory
        if (place / file).exists():
            return place / file
        staging = Path(tempfile.mkdtemp(prefix=f"{_BUILDING}{image.digest}-", dir=place.parent))
        try:
            make(staging / file)
            _flush(staging / file)
            (staging / file).rename(place / file)
            _flush(place)
        except OSError as error:
            raise from_os_error(error) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return place / file


def delete(cache: Path, kind: str, digest: str) -> None:
    """Make it so that the artifact is gone: renamed aside first, so that nobody finds half of it."""
    place = _place(cache, kind, digest)
    aside = place.with_name(f"{_BUILDING}{digest}-deleted")
    with contextlib.suppress(FileNotFoundError):
        place.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def delete_idle(cache: Path, kind: str, digest: str) -> bool:
    """Do what `delete` does unless somebody builds this artifact just now; tell whether it was done."""
    lock = _lock(_place(cache, kind, digest))
    with _claimed(lock) as free:
        if free:
            delete(cache, kind, digest)
            lock.unlink()  # who waits for it looks whether it is still there
    return free


def sweep(cache: Path) -> None:
    """Remove what dead builders left; what a living one works on stays."""
    for kind in ("image", "kernel"):
        for staging in (cache / f"{kind}s").glob(f"{_BUILDING}*"):
            digest = staging.name.removeprefix(_BUILDING).split("-")[0]
            with _claimed(_lock(staging.with_name(digest))) as free:
                if free:
                    _remove(staging)


def _sweep(parent: Path, digest: str) -> None:
    """Remove what dead builders of this digest left; the caller has its lock."""
    for staging in parent.glob(f"{_BUILDING}{digest}-*"):
        _remove(staging)


def _remove(staging: Path) -> None:
    """Remove what a dead builder left, after the programs that it left (fakeroot's daemon, say)."""
    proc.end_marked(str(staging))
    shutil.rmtree(staging, ignore_errors=True)


def _place(cache: Path, kind: str, digest: str) -> Path:
    return cache / f"{kind}s" / digest


def _lock(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


@contextlib.contextmanager
def _claimed(lock: Path) -> Iterator[bool]:
    """Hold a lock if nobody else does; tell whether it is held. The kernel frees a dead holder's lock."""
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it may have removed it since we opened it.
            held = os.path.samestat(os.fstat(fd), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        yield held
    finally:
        os.close(fd)


@contextlib.contextmanager
def _locked(lock: Path, cancelled: Callable[[], bool]) -> Iterator[None]:
    """Hold the lock of one digest; a waiter may leave."""
    while True:
        with _claimed(lock) as held:
            if held:
                yield
                return
        if cancelled():
            raise Cancelled
        time.sleep(LOCK_LOOK_S)  # flock has no deadline and cannot be waited on with others


def _flush(*paths: Path) -> None:
    """Bring files and directories to the disk: a power cut must not leave a name without its content."""
    for path in paths:
        if path.is_symlink():  # the user's own file: a name in the directory is all there is of it here
            continue
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
