"""What an archive of ours holds, read by Python's own reader: one line of words for each path."""

from __future__ import annotations

import tarfile
from pathlib import Path


def listing(path: Path) -> dict[str, str]:
    """Map each path but the root to what it is: `f content`, `d`, `s target`, `h first`, `c 1:3`, `p`."""
    with tarfile.open(path, errors="surrogateescape") as tar:
        return {member.name: _told(tar, member) for member in tar if member.name != "."}


def _told(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.isreg():
        file = tar.extractfile(member)
        assert file is not None
        return f"f {file.read().decode('latin-1')}"
    if member.ischr() or member.isblk():
        return f"{'c' if member.ischr() else 'b'} {member.devmajor}:{member.devminor}"
    if member.issym() or member.islnk():
        return f"{'s' if member.issym() else 'h'} {member.linkname}"
    return "d" if member.isdir() else "p"
