"""Images and kernels from files that the user has."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from banger.errors import Cancelled, InvalidImage, InvalidRequest, from_os_error
from banger.images import base, custom, magic, seed, store
from banger.images.store import Details
from banger.model import Artifact

VERSION = 2
"""Counts changes of what is made from a file; part of the digest."""

_PIECE = 4 << 20
_AGAIN = "`banger image register` takes it as it is now; `banger image promote` makes a copy of banger's own."


def register(
    file: Path,
    name: str,
    cache: Path,
    *,
    take_seed: seed.Take = seed.take,
    announce: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Make it so that a root file system is an image where it is: the cache has a link to it.

    `file` is ext4 or squashfs and must stay as it is: VMs share it. `announce` is called with the artifact's
    digest before it exists. Raises InvalidRequest when it cannot
    be read, InvalidImage, Cancelled.
    """
    file = _regular(file)
    found, before = magic.root_format(file), _state(file)
    sha256 = _sha256(file, cancelled)
    if _state(file) != before:
        raise InvalidImage(f"{str(file)!r} changed while it was read.")

    def make(staging: Path) -> Details:
        (staging / base.FILE).symlink_to(file)
        take_seed(file, found, staging / seed.FILE, cancelled=cancelled)
        return {"format": found, "file": str(file), "file_sha256": sha256, **before}

    digest = _digest("registered", name, str(file), sha256, before)
    announce(digest)
    return store.build(cache, "image", name, digest, make, cancelled)


def check(image: Artifact) -> None:
    """Raise InvalidImage when an image's file is the user's own and is not what was registered.

    It looks at size and time, not at the content: this is done before each start of a VM.
    """
    if not is_registered(image):
        return
    file = image.details["file"]
    try:
        now = _state(image.path / base.FILE)
    except OSError:
        raise InvalidImage(f"The file {file!r} of the image {image.name} is gone.", hint=_AGAIN) from None
    if any(image.details.get(key) != value for key, value in now.items()):
        raise InvalidImage(
            f"The file {file!r} of the image {image.name} changed since it was registered.", hint=_AGAIN
        )


def is_registered(image: Artifact) -> bool:
    """Tell whether an image's file is the user's own."""
    return (image.path / base.FILE).is_symlink()


def promote(
    image: Artifact,
    cache: Path,
    *,
    take_seed: seed.Take = seed.take,
    announce: Callable[[str], None] = lambda _: None,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Make it so that a registered image is in the cache with a copy of its file; holes stay holes.

    The copy is another artifact: VMs on the registered one keep that. Raises InvalidRequest when it is no
    registered one, InvalidImage when its file is not what was registered, DiskFull, Cancelled.
    """
    if not is_registered(image):
        raise InvalidRequest(f"The image {image.name} has its own copy already.")
    sha256 = str(image.details["file_sha256"])

    def make(staging: Path) -> Details:
        check(image)
        progress(f"copying {image.details['file']}")
        copy = staging / base.FILE
        _copy(image.path / base.FILE, copy, cancelled)
        if _sha256(copy, cancelled) != sha256:
            raise InvalidImage(f"The file {image.details['file']!r} changed since it was registered.")
        form = magic.root_format(copy)
        take_seed(copy, form, staging / seed.FILE, cancelled=cancelled)
        return {"format": form, "sha256": sha256}

    digest = _digest("own", image.name, sha256)
    announce(digest)
    return store.build(cache, "image", image.name, digest, make, cancelled)


def import_kernel(
    kernel: Path,
    name: str,
    cache: Path,
    *,
    initrd: Path | None = None,
    modules: Path | None = None,
    announce: Callable[[str], None] = lambda _: None,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Make it so that a kernel (bzImage or ELF) is in the cache, with its initrd.

    An initrd of the user's own is used as it is; else ours is made, with modules of a directory. Raises
    InvalidRequest, InvalidImage, HostLacks, ProgramFailed, DiskFull, Cancelled.
    """
    files = {custom.KERNEL: _regular(kernel)} | ({custom.INITRD: _regular(initrd)} if initrd else {})
    magic.kernel_format(files[custom.KERNEL])
    if modules is not None and not modules.is_dir():
        raise InvalidRequest(f"{str(modules)!r} is not a directory.")
    sums = {known: _sha256(path, cancelled) for known, path in files.items()}

    def make(staging: Path) -> Details:
        for known, path in files.items():
            _copy(path, staging / known, cancelled)
            if _sha256(staging / known, cancelled) != sums[known]:
                raise InvalidImage(f"{str(path)!r} changed while it was copied.")
        if initrd is None:
            progress("making the initrd")
        return custom.complete(staging, modules, cancelled)

    listing = _listing(modules) if modules and not initrd else []
    digest = _digest("kernel", name, sums, listing, "" if initrd else custom.ours())
    announce(digest)
    return store.build(cache, "kernel", name, digest, make, cancelled)


def _digest(*parts: object) -> str:
    return hashlib.sha256(msgspec.json.encode((VERSION, *parts))).hexdigest()


def _regular(file: Path) -> Path:
    """Give the whole path of a regular file that we may read. Raises InvalidRequest."""
    try:
        path = file.expanduser().resolve(strict=True)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb"):  # noqa: PTH123  a FIFO blocks
            pass
        str(path).encode("utf-8")
    except OSError as error:
        raise InvalidRequest(from_os_error(error).message) from None
    except UnicodeEncodeError:
        raise InvalidRequest(f"The path {str(file)!r} is not UTF-8.") from None
    if not path.is_file():
        raise InvalidRequest(f"{str(path)!r} is not a regular file.")
    return path


def _state(file: Path) -> dict[str, int]:
    """Give what changes with a file: its size in bytes and its time in µs since the epoch."""
    found = file.stat()
    return {"file_bytes": found.st_size, "file_mtime_us": found.st_mtime_ns // 1000}


def _listing(modules: Path) -> list[tuple[str, int, int]]:
    """List a directory's modules with size and time: another kernel's have others."""
    return sorted(
        (str(path.relative_to(modules)), path.stat().st_size, path.stat().st_mtime_ns // 1000)
        for path in modules.rglob("*.ko*")
        if path.is_file()
    )


def _sha256(file: Path, cancelled: Callable[[], bool]) -> str:
    hasher = hashlib.sha256()
    with file.open("rb", buffering=0) as content:
        while piece := content.read(_PIECE):
            if cancelled():
                raise Cancelled
            hasher.update(piece)
    return hasher.hexdigest()


def _copy(source: Path, target: Path, cancelled: Callable[[], bool]) -> None:
    """Copy a file's data; where it has holes, its copy has them, too."""
    with source.open("rb") as old, target.open("xb") as new:
        for start, end in _data(old):
            at = os.lseek(new.fileno(), start, os.SEEK_SET)
            # 0 when the file became shorter: its digest tells.
            while at < end and (sent := os.sendfile(new.fileno(), old.fileno(), at, min(_PIECE, end - at))):
                at += sent
                if cancelled():
                    raise Cancelled
        os.ftruncate(new.fileno(), os.fstat(old.fileno()).st_size)


def _data(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Give the ranges of a file that are not holes (lseek(2), SEEK_DATA)."""
    end = 0
    while True:
        try:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                return
            raise
        end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        yield start, end
