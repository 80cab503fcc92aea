"""The process that reads /root out of a base file: `python -I -m banger.images.seed_child`.

Its job is on its standard input. It opens two files, gives up every right to open more, and only then looks
at the first byte. For squashfs it becomes sqfs2tar, under the same restrictions, which says what is wrong in
words; for ext4 it reads itself, and answers with one line of JSON.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator

import msgspec

from banger import proc
from banger.errors import BangerError, InvalidImage, from_os_error
from banger.images.layers import sandbox
from banger.images.layers.flatten_child import MEMORY_BYTES, Limits
from banger.images.layers.names import LONGEST_PATH, shown
from banger.images.layers.tarstream import BLOCK, LATEST, Kind
from banger.images.layers.tarwriter import Member, header, record
from banger.images.magic import RootFormat
from banger.model import Value
from banger.storage import libext2fs
from banger.storage.ext4_reader import Node, Reader

NOTHING = bytes(2 * BLOCK)
"""The archive in which there is nothing."""

SQFS2TAR = ("--keep-as-dir", "--subdir", "root")
"""The whole path is kept: version 1.2.0 cannot make a subdirectory the new root of a tree with hard links."""

_DIRECTORY = b"root"
_PROGRAMS = ("/usr", "/lib", "/lib64")
_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFCHR: Kind.CHAR_DEVICE,
    stat.S_IFBLK: Kind.BLOCK_DEVICE,
    stat.S_IFIFO: Kind.FIFO,
}


class Job(Value):
    """What the child is to do: a base file to read, of a format, and the new archive to write.

    `whole`: all that is in a squashfs, not only /root.
    """

    base: str
    form: RootFormat
    out: str
    limits: Limits
    whole: bool = False


class Answer(Value):
    """What came of it: an error, or none."""

    error: dict[str, str | None] | None = None


def main() -> None:
    """Do the job on standard input; answer on standard output."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    base = os.open(job.base, os.O_RDONLY | os.O_CLOEXEC)
    out = os.open(job.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    if job.form == "squashfs":
        _become_sqfs2tar(job, out)
    libext2fs.loaded()
    sandbox.confine(read=[sys.prefix, sys.base_prefix])
    _limit(job.limits)
    sys.stdout.buffer.write(msgspec.json.encode(Answer(error=_error_of(base, out, job.limits))))


def _limit(limits: Limits) -> None:
    sandbox.limit(file_bytes=limits.size, memory_bytes=MEMORY_BYTES, cpu_s=int(limits.timeout_s) + 1)


def _become_sqfs2tar(job: Job, out: int) -> None:
    """Run Debian's reader of squashfs in this process; its words go to standard error."""
    program = proc.which("sqfs2tar", "squashfs-tools-ng")
    os.dup2(out, sys.stdout.fileno())
    sandbox.confine(read=[job.base], run=_PROGRAMS)
    _limit(job.limits)
    os.execv(program, ["sqfs2tar", *(() if job.whole else SQFS2TAR), job.base])  # noqa: S606  there is none to start


def _error_of(base: int, out: int, limits: Limits) -> dict[str, str | None] | None:
    try:
        _copy(Reader(base), out, limits)
    except BangerError as error:
        found = error if isinstance(error, InvalidImage) else InvalidImage(error.message)
    except MemoryError:
        found = InvalidImage("To read the image's /root takes too much memory.")
    except OSError as error:
        return from_os_error(error).to_dict()
    else:
        return None
    return found.to_dict()


def _copy(fs: Reader, out: int, limits: Limits) -> None:
    """Write /root and what is below it as an archive. Raises InvalidImage."""
    left = limits.size
    for member, node in _members(fs, limits.entries):
        pieces = [header(member)]
        if member.kind is Kind.FILE and member.first is None:
            left -= node.size
            if left < 0:
                raise InvalidImage(f"The files in /root come to more than {limits.size >> 20} MiB.")
            _write(out, pieces.pop())
            for piece in fs.content(node):
                _write(out, piece)
            pieces.append(bytes(-node.size % BLOCK))
        _write(out, b"".join(pieces))
    _write(out, NOTHING)


def _write(out: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(out, view) :]


def _members(fs: Reader, most: int) -> Iterator[tuple[Member, Node]]:
    """Give what is to be written, directories before what is in them; a file's later names are links."""
    waiting = [(name, inode) for name, inode in fs.names(libext2fs.ROOT, most) if name == _DIRECTORY]
    seen: dict[int, bytes] = {}
    count = 0
    while waiting:
        path, inode = waiting.pop()
        node = fs.node(inode)
        if stat.S_ISSOCK(node.mode):  # of a program that does not run any more; no archive can hold one
            continue
        count += 1
        if count + len(waiting) > most:
            raise InvalidImage(f"There are more than {most} entries in /root.")
        yield _member(fs, path, node, seen.get(inode)), node
        if stat.S_ISDIR(node.mode):
            if inode in seen:
                raise InvalidImage(f"The directory {shown(path)} is in itself, or has two names.")
            waiting += reversed([(_below(path, name), child) for name, child in fs.names(inode, most)])
        seen.setdefault(inode, path)


def _below(path: bytes, name: bytes) -> bytes:
    if not name or b"/" in name or b"\0" in name or len(path) + len(name) >= LONGEST_PATH:
        raise InvalidImage(f"{shown(name)} in {shown(path)} is no name that Linux takes.")
    return path + b"/" + name


def _member(fs: Reader, path: bytes, node: Node, first: bytes | None) -> Member:
    kind = _KINDS.get(stat.S_IFMT(node.mode))
    if kind is None:
        raise InvalidImage(f"{shown(path)} is of no type that Linux knows.")
    values = {} if first else fs.xattrs(node.inode)
    return Member(
        path=path,
        kind=kind,
        mode=stat.S_IMODE(node.mode),
        uid=node.uid,
        gid=node.gid,
        mtime=min(max(0, node.mtime_s), LATEST),
        size=node.size if kind is Kind.FILE else 0,
        layer=0,
        offset=0,
        target=fs.target(node) if kind is Kind.SYMLINK else b"",
        device=node.device if kind in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE) else (0, 0),
        xattrs=b"".join(record(b"SCHILY.xattr." + name, value) for name, value in sorted(values.items())),
        first=first if kind is Kind.FILE else None,
    )


if __name__ == "__main__":
    main()
