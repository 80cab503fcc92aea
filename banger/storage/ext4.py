"""ext4 in files, without root."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from banger import proc
from banger.errors import DiskFull, ProgramFailed

MKFS_TIMEOUT_S = 600.0
CHECK_TIMEOUT_S = 600.0
CORRECTED = 3
"""e2fsck(8): exit bits 1 (errors corrected) and 2 (reboot if it was mounted) are no failure."""

# Inode tables and journal are written when they are used: a file of any size is made in milliseconds.
_LAZY = "lazy_itable_init=1,lazy_journal_init=1"
_FLOOR_MIB = 1024


def make(path: Path, size_mib: int, *, label: str) -> None:
    """Make it so that an empty file system of `size_mib` is at `path`, sparse, its root owned by root.

    An existing file is left as it is. Raises DiskFull, ProgramFailed.
    """
    if path.exists():
        return
    _make_whole(path, lambda new: _mkfs(["mkfs.ext4"], new, size_mib, label))


def make_from_tar(
    path: Path, archive: Path, *, label: str, cancelled: Callable[[], bool] = lambda: False
) -> None:
    """Make a file system with the content of a tar archive: owners, modes, devices and all.

    The archive is unpacked under fakeroot, which remembers what an ordinary user may not set, and
    mkfs.ext4 reads it back from there. Half as large again as the content, at least 1 GiB, sparse.
    """
    size_mib = max(_FLOOR_MIB, content_mib(archive) * 3 // 2)
    with tempfile.TemporaryDirectory(prefix=".tree-", dir=path.parent) as tree:

        def fill(new: Path) -> None:
            # Words reach the shell as arguments, never as text to be read as commands.
            script = 'tar -x --numeric-owner -p -f "$1" -C "$2" && shift 2 && exec "$@"'
            unpack = ["fakeroot", "sh", "-c", script, "sh", str(archive), tree, "mkfs.ext4", "-d", tree]
            _mkfs(unpack, new, size_mib, label, cancelled)

        _make_whole(path, fill)


def content_mib(archive: Path) -> int:
    """Sum up what a tar archive's files take in blocks of 4 KiB, in MiB."""
    with tarfile.open(archive) as tar:
        return sum((member.size + 4095) // 4096 for member in tar) // 256 + 1


def check(path: Path) -> bool:
    """Check and mend a file system that is not mounted; True when something was mended.

    Raises ProgramFailed when it cannot be mended.
    """
    try:
        proc.run(["e2fsck", "-f", "-y", str(path)], timeout_s=CHECK_TIMEOUT_S)
    except ProgramFailed as error:
        if error.status is not None and error.status <= CORRECTED:
            return True
        raise
    return False


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
    command: list[str],
    path: Path,
    size_mib: int,
    label: str,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    words = [
        *command,
        "-q",
        "-F",
        "-E", f"root_owner=0:0,{_LAZY}",
        "-L", label[:16],
        str(path), f"{size_mib}M",
    ]  # fmt: skip
    try:
        proc.run(words, timeout_s=MKFS_TIMEOUT_S, cancelled=cancelled, mark=str(path.parent))
    except ProgramFailed as error:
        if "No space left on device" in error.message:
            raise DiskFull(f"There is no space left on the disk for {path.parent}.") from None
        raise
