"""An image as one ext4 file system, for root disks that the host joins with a VM's changes: dm-snapshot.

Where its base file is squashfs, such a twin is made of it once, beside it, for all of its VMs; it goes with
the image. Changes are recorded by block, so that they fit one making of it and no other: its uuid tells.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from banger.errors import Cancelled
from banger.images import base, seed, store
from banger.images.layers import flatten
from banger.model import Artifact
from banger.storage import ext4

FILE = "base.ext4"
_ARCHIVE = "root.tar"


class Write(Protocol):
    """How a twin is written: `write`, or what a recording host has for it."""

    def __call__(
        self,
        squashfs: Path,
        target: Path,
        *,
        label: str,
        least_mib: int,
        limits: flatten.Limits | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make `target` an ext4 with what a squashfs has."""


def write(
    squashfs: Path,
    target: Path,
    *,
    label: str,
    least_mib: int,
    limits: flatten.Limits | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Make `target` an ext4 with what a squashfs has, and `least_mib` in size; it is sparse.

    The squashfs is read as one of somebody else's: by a process without rights, within limits. Raises
    InvalidImage, HostLacks, DiskFull or Cancelled.
    """
    archive = target.with_name(_ARCHIVE)
    try:
        seed.take_all(squashfs, archive, limits=limits, cancelled=cancelled)
        ext4.make_from_tar(target, archive, label=label, least_mib=least_mib, cancelled=cancelled)
        ext4.check(target)  # it makes lost+found, and would tell of each VM that it has mended something
    finally:
        archive.unlink(missing_ok=True)


def make(
    image: Artifact, *, least_mib: int, write: Write = write, cancelled: Callable[[], bool] = lambda: False
) -> Path:
    """Make it so that an image is there as ext4; give its path. Raises what `write` does."""
    if cancelled():
        raise Cancelled
    if _is_whole(image):
        return base.path_of(image)

    def fill(target: Path) -> None:
        write(base.path_of(image), target, label=image.name, least_mib=least_mib, cancelled=cancelled)

    return store.add(image, FILE, fill, cancelled)


def path_of(image: Artifact) -> Path | None:
    """Give an image as ext4: its base file or the twin of that; None when there is none."""
    found = base.path_of(image) if _is_whole(image) else image.path / FILE
    return found if found.exists() else None


def _is_whole(image: Artifact) -> bool:
    """Tell whether the base file is ext4 itself."""
    return base.path_of(image).name == base.FORMER_FILE or image.details.get("format") == "ext4"
