"""ext4 in files, without root."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from banger import proc
from banger.errors import DiskFull, InvalidRequest, ProgramFailed
from banger.model import Value
from banger.storage import archive as archives
from banger.storage import ext4_files, ext4_tree, libext2fs

MKFS_TIMEOUT_S = 600.0
CHECK_TIMEOUT_S = 600.0
COPY_TIMEOUT_S = 1800.0
CORRECTED = 3
"""e2fsck(8): exit bits 1 (errors corrected) and 2 (reboot if it was mounted) are no failure."""

# Inode tables and journal are written when they are used: a file of any size is made in milliseconds.
_LAZY = "lazy_itable_init=1,lazy_journal_init=1"
_FLOOR_MIB = 1024
_UUID_AT = 1024 + 0x68

HOME = "home"
"""The label that tells a guest (assets/stage2) that it has nothing to put into its work disk."""


def make(path: Path, size_mib: int, *, label: str) -> None:
    """Make it so that an empty file system of `size_mib` is at `path`, sparse, its root owned by root.

    An existing file is left as it is. Raises DiskFull, ProgramFailed.
    """
    if path.exists():
        return
    _make_whole(path, lambda new: _mkfs(new, size_mib, label))


def make_home(path: Path, size_mib: int, *, seed: Path, below: bytes) -> None:
    """Make it so that a file system with what `seed` has below a directory is at `path`: root's own, 0700.

    `seed` is an archive of ours. A guest tells by the label, `home`, that the file system is filled. An
    existing file is left as it is. Raises InvalidRequest when it does not fit, DiskFull, ProgramFailed.
    """
    if path.exists():
        return

    def content() -> Iterator[archives.Entry]:  # read twice: there may be a million
        return ext4_tree.below(below, archives.entries(seed))

    need = _measure(content())
    # An eighth is for the journal and the tables of inodes; what is left over then is the user's to use.
    if need.mib > size_mib * 7 // 8:
        raise InvalidRequest(
            f"The image has {need.mib} MiB in /root, which a work disk of {size_mib} MiB cannot hold.",
            hint="Ask for a larger one: `--disk-size`, or `disk_mib` in config.toml.",
        )

    def fill(new: Path) -> None:
        _mkfs(new, size_mib, HOME, need)
        with libext2fs.opened(new) as fs:
            fs.set_metadata(libext2fs.ROOT, _home())
            ext4_tree.fill(fs, content(), seed)

    _make_whole(path, fill)


def _home() -> libext2fs.Metadata:
    return libext2fs.Metadata(mode=stat.S_IFDIR | 0o700, uid=0, gid=0, mtime_s=int(time.time()))


def make_from_tar(
    path: Path,
    archive: Path,
    *,
    label: str,
    least_mib: int = _FLOOR_MIB,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Make a file system with the content of a tar archive of ours: owners, modes, devices, attributes.

    Nothing is unpacked: the content is copied from the archive into the file system. Half as large
    again as the content, at least `least_mib`, sparse. Raises DiskFull, ProgramFailed, Cancelled.
    """
    need = _measure(archives.entries(archive))

    def fill(new: Path) -> None:
        _mkfs(new, max(least_mib, need.mib * 3 // 2), label, need, cancelled)
        with libext2fs.opened(new) as fs:
            ext4_tree.fill(fs, archives.entries(archive), archive, cancelled)

    _make_whole(path, fill)


class _Need(Value):
    """What an archive's content takes of a file system."""

    mib: int
    inodes: int
    large_xattrs: bool


def _measure(entries: Iterable[archives.Entry]) -> _Need:
    """Sum up what files take in blocks of 4 KiB, and look for attributes beyond a block."""
    blocks = inodes = largest = 0
    for entry in entries:
        blocks += -(-entry.size // libext2fs.BLOCK) + 1
        inodes += 1
        largest = max(largest, sum(len(name) + len(value) + 32 for name, value in entry.xattrs.items()))
    return _Need(mib=blocks // 256 + 1, inodes=inodes, large_xattrs=largest > libext2fs.MAX_XATTRS)


def check(path: Path) -> bool:
    """Check and mend a file system that was used and is not mounted now; True when something was mended.

    A fresh one needs no check. What its journal still holds is written first. Raises ProgramFailed
    when it cannot be mended.
    """
    try:
        proc.run(["e2fsck", "-f", "-y", str(path)], timeout_s=CHECK_TIMEOUT_S)
    except ProgramFailed as error:
        if error.status is not None and 0 < error.status <= CORRECTED:
            return True
        raise ProgramFailed(
            f"The file system {path.name} is damaged and could not be mended: {error.message[-200:]!a}",
            hint=f"It was left as it is: {path}",
            status=error.status,
        ) from None
    return False


def grow(path: Path, size_mib: int) -> None:
    """Make it so that a file system that is not mounted has `size_mib`; one that has as much is left alone.

    A copy grows and then takes its place, so that no crash leaves a half-grown one: resize2fs has no
    way back. Where files can share blocks, the copy costs nothing. Raises DiskFull, ProgramFailed.
    """
    if path.stat().st_size >= size_mib << 20:
        return

    def fill(new: Path) -> None:
        proc.run(
            ["cp", "--reflink=auto", "--sparse=auto", str(path), str(new)],
            timeout_s=COPY_TIMEOUT_S, mark=str(path.parent),
        )  # fmt: skip
        _check_as_it_is(new)
        proc.run(["resize2fs", str(new), f"{size_mib}M"], timeout_s=CHECK_TIMEOUT_S, mark=str(path.parent))
        with new.open("rb") as file:
            os.fsync(file.fileno())  # it replaces what cannot be made again

    try:
        _make_whole(path, fill)
    except ProgramFailed as error:
        if "No space left on device" in error.message:
            raise DiskFull(f"There is no space left on the disk for {path.parent}.") from None
        raise


def _check_as_it_is(path: Path) -> None:
    """Check a home, which has no `lost+found` for users to wonder at; e2fsck makes one."""
    had = ext4_files.status(path, "/lost+found") is not None
    check(path)
    if not had:
        with libext2fs.opened(path) as fs:
            fs.remove_empty(libext2fs.ROOT, b"lost+found")


def uuid(path: Path) -> str:
    """Read the uuid that every making of a file system gives it (kernel: ext4's super block, s_uuid)."""
    with path.open("rb") as file:
        file.seek(_UUID_AT)
        return file.read(16).hex()


def _make_whole(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new file beside `path`, then rename it: never half a file system."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        new = Path(file.name)
    try:
        fill(new)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _mkfs(
    path: Path,
    size_mib: int,
    label: str,
    need: _Need | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    words = [
        "mkfs.ext4",
        "-q",
        "-F",
        "-E", f"root_owner=0:0,{_LAZY}",
        "-L", label[:16],
        *(_shape(need, size_mib) if need else []),
        str(path), f"{size_mib}M",
    ]  # fmt: skip
    try:
        proc.run(words, timeout_s=MKFS_TIMEOUT_S, cancelled=cancelled, mark=str(path.parent))
    except ProgramFailed as error:
        if "No space left on device" in error.message:
            raise DiskFull(f"There is no space left on the disk for {path.parent}.") from None
        raise


def _shape(need: _Need, size_mib: int) -> list[str]:
    """Ask for the sizes that libext2fs is used with, and at least as many inodes as mkfs would make."""
    inodes = max(need.inodes * 3 // 2, size_mib * 64)
    sizes = ["-b", str(libext2fs.BLOCK), "-I", str(libext2fs.INODE_SIZE), "-N", str(inodes)]
    return [*sizes, *(["-O", "ea_inode"] if need.large_xattrs else [])]
