"""Read the tar archives that we have written ourselves: whole, sane, parents before what is in them.

Format: POSIX pax, with extended attributes as `SCHILY.xattr.NAME`. Archives of others are read by
`banger.images`, which trusts none of their bytes; this module does.
"""

from __future__ import annotations

import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

from banger.errors import ProgramFailed
from banger.model import Value

XATTR = "SCHILY.xattr."
BLOCK = 4096

_TYPES = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.LNKTYPE: stat.S_IFREG,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


class Entry(Value):
    """One entry. `path` is relative to the root, which itself is `b""`; `mode` has type and permissions.

    `link` is a symbolic link's target as it stands there; `same_as` is the path of the file that a hard
    link is another name of. A file's `size` bytes begin at `offset` in the archive.
    """

    path: bytes
    mode: int
    uid: int
    gid: int
    mtime_s: int
    size: int
    offset: int
    link: bytes | None
    same_as: bytes | None
    device: tuple[int, int]
    xattrs: dict[bytes, bytes]


def entries(archive: Path) -> Iterator[Entry]:
    """Read an archive's entries one by one; memory does not grow with their number.

    Raises ProgramFailed for one that is not whole.
    """
    try:
        with tarfile.open(archive, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined] # tarfile would keep them all
                yield _entry(member)
    except tarfile.TarError as error:
        raise ProgramFailed(f"The archive {archive.name} cannot be read: {error}.") from error


def _entry(member: tarfile.TarInfo) -> Entry:
    kind = _TYPES[member.type]
    return Entry(
        path=_path(member.name),
        mode=kind | stat.S_IMODE(member.mode),
        uid=member.uid,
        gid=member.gid,
        mtime_s=int(member.mtime),
        size=member.size if member.isreg() else 0,
        offset=member.offset_data,
        link=_bytes(member.linkname) if member.issym() else None,
        same_as=_path(member.linkname) if member.islnk() else None,
        device=(member.devmajor, member.devminor) if member.isdev() else (0, 0),
        xattrs={
            _bytes(name.removeprefix(XATTR)): _bytes(value)
            for name, value in member.pax_headers.items()
            if name.startswith(XATTR)
        },
    )


def _path(name: str) -> bytes:
    return b"/".join(part for part in _bytes(name).split(b"/") if part not in (b"", b"."))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
