"""What the cache holds beside images and kernels, and how it is emptied.

    images/<digest>/, kernels/<digest>/    artifacts: `store`
    blobs/sha256/<hex>[.part]              layers from registries: `registry`
    bundles/sha256/<hex>[.part]            bundles that were not unpacked yet: `bundle`

Blobs and bundles are only on their way into an artifact. Who needs some of them there holds `using`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from banger.images import store
from banger.model import Artifact, Value

PASSING = ("blobs", "bundles")
"""Directories of what is only on its way into an artifact."""

_KINDS = ("image", "kernel")
_LOCK = ".using.lock"
_ASIDE = ".pruned-"


class Passing(Value):
    """Blobs or bundles: how many are whole, how many are beginnings, what they take on the disk."""

    directory: str
    whole: int = 0
    partial: int = 0
    size_bytes: int = 0


class Holdings(Value):
    """What the cache holds. `broken` are kind and digest of what has no manifest that can be read."""

    artifacts: tuple[Artifact, ...]
    broken: tuple[tuple[str, str], ...]
    passing: tuple[Passing, ...]

    @property
    def size_bytes(self) -> int:
        """What it takes on the disk."""
        return sum(a.size_bytes for a in self.artifacts) + sum(p.size_bytes for p in self.passing)


class Pruned(Value):
    """What was removed (or would be): digests, counts, bytes on the disk.

    `busy`: a pull is under way, so all blobs and bundles stayed.
    """

    size_bytes: int
    artifacts: tuple[str, ...]
    blobs: int
    partial: int
    bundles: int
    busy: bool


@contextlib.contextmanager
def using(cache: Path) -> Iterator[None]:
    """Keep blobs and bundles from being pruned, from when one is asked for until it is used.

    Any number may hold this; it is freed with its process. Waits while the cache is pruned: for no longer
    than a few renames take.
    """
    with _lock(cache) as fd:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield


def holdings(cache: Path) -> Holdings:
    """Tell what the cache holds."""
    artifacts: list[Artifact] = []
    broken: list[tuple[str, str]] = []
    for kind in _KINDS:
        for digest in _digests(cache, kind):
            found = store.find(cache, kind, digest)
            if found is None:
                broken.append((kind, digest))
            else:
                artifacts.append(found)
    passing = tuple(_passing(cache / name) for name in PASSING)
    return Holdings(artifacts=tuple(artifacts), broken=tuple(broken), passing=passing)


def prune(cache: Path, in_use: frozenset[str], *, dry_run: bool = False) -> Pruned:
    """Remove blobs, bundles and the artifacts whose digest is not in use; tell what that gave.

    Nobody finds half of anything meanwhile: what goes is renamed aside first. A pull that is under way
    keeps what it needs, and an artifact that is being made stays. With `dry_run` nothing is touched.
    """
    held = holdings(cache)
    passing = _prune_passing(cache, held.passing, dry_run=dry_run)
    known: dict[tuple[str, str], int] = {(a.kind, a.digest): a.size_bytes for a in held.artifacts}
    unused = [(kind, digest) for kind, digest in [*known, *held.broken] if digest not in in_use]
    if not dry_run:
        store.sweep(cache)
        unused = [found for found in unused if store.delete_idle(cache, *found)]
    return Pruned(
        size_bytes=sum(known.get(found, 0) for found in unused) + sum(p.size_bytes for p in passing or ()),
        artifacts=tuple(digest for _, digest in unused),
        blobs=sum(found.whole for found in passing or () if found.directory == "blobs"),
        partial=sum(found.partial for found in passing or ()),
        bundles=sum(found.whole for found in passing or () if found.directory == "bundles"),
        busy=passing is None,
    )


def _prune_passing(cache: Path, held: tuple[Passing, ...], *, dry_run: bool) -> tuple[Passing, ...] | None:
    """Remove blobs and bundles, and tell what they were; None when some of them are in use."""
    with _alone(cache) as alone:
        if not alone:
            return None
        for name in PASSING if not dry_run else ():
            _put_aside(cache / name)
    if not dry_run:
        _remove_aside(cache)
    return held


def _digests(cache: Path, kind: str) -> list[str]:
    places = (cache / f"{kind}s").glob("*")
    return sorted(place.name for place in places if re.fullmatch("[0-9a-f]{64}", place.name))


def _passing(directory: Path) -> Passing:
    files = [path for path in directory.glob("*/*") if path.is_file()]
    partial = sum(path.suffix == ".part" for path in files)
    return Passing(
        directory=directory.name,
        whole=len(files) - partial,
        partial=partial,
        size_bytes=sum(path.lstat().st_blocks * 512 for path in files),
    )


@contextlib.contextmanager
def _lock(cache: Path) -> Iterator[int]:
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(cache / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[bool]:
    """Hold off whoever wants to use blobs or bundles; False when somebody does already."""
    with _lock(cache) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield not any(_is_claimed(part) for name in PASSING for part in (cache / name).glob("*/*.part"))


def _is_claimed(part: Path) -> bool:
    """Tell whether somebody is fetching the rest of a part: he has it locked."""
    with contextlib.suppress(FileNotFoundError), part.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _put_aside(directory: Path) -> None:
    """Rename a directory away and make an empty one in its place."""
    if directory.exists():
        aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=directory.parent))
        directory.rename(aside / directory.name)
        directory.mkdir(mode=0o700)


def _remove_aside(cache: Path) -> None:
    """Remove what was put aside, now or by one that died before it came to this."""
    for aside in cache.glob(f"{_ASIDE}*"):
        shutil.rmtree(aside, ignore_errors=True)
