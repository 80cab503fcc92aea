"""The base file of an image: what its tar archive holds, as a read-only disk that all of its VMs share.

squashfs is the default: docs/decisions/0016 has the figures. ext4 is for whoever needs to write to it.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from banger import proc
from banger.errors import Cancelled, DiskFull, ProgramFailed, from_os_error
from banger.model import Artifact, Value
from banger.storage import ext4

Format = Literal["squashfs", "ext4"]

FILE = "base.img"
FORMER_FILE = "root.ext4"
"""What the file was called when it could only be ext4: VMs may still stand on such an image."""

TIMEOUT_S = 1800.0
# lz4: guests read it through an emulated CPU, to which every other compression is slow.
COMPRESSION = "lz4"
# struct squashfs_super_block (kernel: squashfs_fs.h): its magic, and the bytes that are used.
_SUPERBLOCK = struct.Struct("<4s36xQ")
_MAGIC = b"hsqs"
_FOREIGN_XATTR = "squashfs does not support xattr prefix"
"""It holds `user.`, `trusted.` and `security.` only; tar2sqfs leaves others out unless it must not skip."""


class Base(Value):
    """What was made: the file system, and the bytes that the file takes on the disk."""

    format: Format
    size_bytes: int


def make(
    tar: Path,
    target: Path,
    *,
    label: str,
    format: Format = "squashfs",  # noqa: A002 - the word for it
    cancelled: Callable[[], bool] = lambda: False,
) -> Base:
    """Make the base file `target`, whole or not at all, from a tar archive of ours.

    Every owner, mode, device, link and extended attribute is as in the archive, without root; nothing
    is unpacked. squashfs keeps times from 1970 to 2106. Raises HostLacks, ProgramFailed, DiskFull or
    Cancelled.
    """
    if cancelled():
        raise Cancelled("Writing the file system was ended.")
    try:
        if format == "ext4":
            ext4.make_from_tar(target, tar, label=label, cancelled=cancelled)
        else:
            _make_squashfs(target, tar, cancelled)
    except OSError as error:
        raise from_os_error(error) from error
    return Base(format=format, size_bytes=target.stat().st_blocks * 512)


def path_of(image: Artifact) -> Path:
    """Give the path of an image's base file."""
    former = image.path / FORMER_FILE
    return former if former.exists() else image.path / FILE


def _make_squashfs(target: Path, tar: Path, cancelled: Callable[[], bool]) -> None:
    with tempfile.TemporaryDirectory(prefix=".base-", dir=target.parent) as beside:
        new = Path(beside, FILE)
        try:
            _tar2sqfs(tar, new, ["--no-skip"], cancelled)
        except ProgramFailed as error:
            # It has one message for all that can happen to its file.
            if "I/O error" in error.message and shutil.disk_usage(beside).free < tar.stat().st_size:
                raise DiskFull(f"There is no space left on the disk for {target.parent}.") from None
            if _FOREIGN_XATTR not in error.message:
                raise
            _tar2sqfs(tar, new, ["--force"], cancelled)  # without the access control lists of a local build
        _check_whole(new)
        new.replace(target)


def _tar2sqfs(tar: Path, new: Path, options: list[str], cancelled: Callable[[], bool]) -> None:
    proc.which("tar2sqfs", "squashfs-tools-ng")
    # The archive is its standard input. Words reach the shell as arguments, never as text to be read.
    words = ["sh", "-c", 'exec "$@" < "$0"', str(tar), "tar2sqfs", "--quiet", *options]
    words += ["--compressor", COMPRESSION, str(new)]
    proc.run(words, timeout_s=TIMEOUT_S, cancelled=cancelled, mark=str(new.parent.parent))


def _check_whole(path: Path) -> None:
    """Look at what was written, not only at how its writer ended."""
    with path.open("rb") as file:
        magic, used = _SUPERBLOCK.unpack(file.read(_SUPERBLOCK.size).ljust(_SUPERBLOCK.size, b"\0"))
    if magic != _MAGIC or not 0 < used <= path.stat().st_size:
        raise ProgramFailed("The squashfs file that was written is not whole.")
