"""What the owner's home gives to a VM's /root: files that config.toml names, who they are to git, their key.

It goes into the work disk when that is made, beside what the image has there: both are one archive, held in
memory, so that nothing of the owner's is left in a file if this process dies.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from banger import proc
from banger.config import Config, FileSync
from banger.errors import HostLacks, InvalidRequest, ProgramFailed
from banger.images import seed
from banger.tasks.context import Ctx

MOST_BYTES = 64 << 20
MOST_FILES = 10_000
GIT = ".gitconfig"
KEYS = ".ssh/authorized_keys"
_PUBLIC_KEY = re.compile(r"(ssh-|ecdsa-|sk-)[a-z0-9@.-]+ [A-Za-z0-9+/=]+( .*)?", re.ASCII)
_TOP = os.fsdecode(seed.DIRECTORY)


class Gathered:
    """Files for /root by path relative to it, each with content and mode; and what was left out, and why."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, int]] = {}
        self.directories: dict[str, int] = {}
        self.skipped: list[str] = []
        self._bytes = 0

    def add(self, path: str, content: bytes, mode: int) -> None:
        """Take a file, in place of one of that name. Raises InvalidRequest when it is too much."""
        self._bytes += len(content)
        if self._bytes > MOST_BYTES or len(self.files) >= MOST_FILES:
            raise InvalidRequest(
                f"[[file_sync]] names more than {MOST_FILES} files or {MOST_BYTES >> 20} MiB.",
                hint="Name less there; `banger vm cp` takes what is large.",
            )
        self.files[path] = content, mode

    def parents(self) -> Iterator[str]:
        """Give the directories that the files are in, from above."""
        above = {str(parent) for path in self.files for parent in PurePosixPath(path).parents}
        yield from sorted((above | set(self.directories)) - {"."})


def with_files(ctx: Ctx, content: Path | None) -> Path | None:
    """Give the archive for a work disk: what the image has, with what the owner adds; as it is, if nothing.

    It is there for as long as this attempt at the step is. Raises InvalidRequest.
    """
    if content is None:  # the guest itself will copy its image's, over anything here
        return None
    found = gather(ctx.config, ctx.world.owner_home)
    if found.skipped:
        ctx.progress("not taken along: " + "; ".join(found.skipped))
    if not found.files and not found.directories:
        return content
    memory = os.fdopen(os.memfd_create("home"), "w+b")
    weakref.finalize(ctx, memory.close)
    merge(content, found, memory)
    memory.flush()
    return Path(f"/proc/self/fd/{memory.fileno()}")


# -- what the owner has --------------------------------------------------------------------------


def gather(config: Config, home: Path) -> Gathered:
    """Read what the settings name. Raises InvalidRequest for too much, and for a key that is none."""
    found = Gathered()
    if config.git_identity and (identity := git_identity(home)):
        found.add(GIT, identity, 0o644)
    if config.ssh_key is not None:
        found.add(KEYS, _public_key(_below(home, config.ssh_key)), 0o600)
    for sync in config.file_sync:
        _take(sync, home, found)
    return found


def _below(home: Path, host: str) -> Path:
    return home / host.removeprefix("~/")


def _take(sync: FileSync, home: Path, found: Gathered) -> None:
    """Take a file, or a directory with all that is in it; the name itself may be a link within the home."""
    source = _below(home, sync.host)
    try:
        real = source.resolve(strict=True)
    except (OSError, RuntimeError):
        found.skipped.append(f"{sync.host} (not there)")
        return
    if not real.is_relative_to(home.resolve()):
        found.skipped.append(f"{sync.host} (it leads out of your home directory)")
    else:
        _take_path(real, sync.inside, int(sync.mode, 8), found)


def _take_path(source: Path, inside: str, mode: int, found: Gathered) -> None:
    try:
        kind = source.lstat().st_mode
        if stat.S_ISDIR(kind):
            found.directories[inside] = mode | (mode & 0o444) >> 2
            for entry in sorted(source.iterdir()):
                _take_path(entry, f"{inside}/{entry.name}", mode, found)
        elif stat.S_ISREG(kind):
            found.add(inside, _read(source), mode)
        else:
            what = "a link" if stat.S_ISLNK(kind) else "no file"
            found.skipped.append(f"{source.name!a} ({what})")
    except OSError as error:
        found.skipped.append(f"{source.name!a} ({error.strerror})")


def _read(path: Path) -> bytes:
    """Read a file that is one still: it may have become a link or a pipe since it was looked at."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:  # noqa: PTH123 (a descriptor)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(0, "no file")
        return file.read(MOST_BYTES + 1)


def _public_key(path: Path) -> bytes:
    """Read public keys, one a line. Raises InvalidRequest for anything else, a private key above all."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"ssh_key in config.toml: {path} cannot be read: {error}") from None
    if not lines or not all(_PUBLIC_KEY.fullmatch(line) for line in lines):
        raise InvalidRequest(
            f"ssh_key in config.toml: {path} holds no public key.", hint="Its name mostly ends in .pub."
        )
    return "".join(f"{line}\n" for line in lines).encode()


def git_identity(home: Path) -> bytes:
    """Write a .gitconfig with the name and address that the owner's own has; empty when it has none."""
    xdg = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    if not any(path.exists() for path in (home / GIT, xdg / "git" / "config")):
        return b""
    words = ["git", "config", "--global", "--includes", "--null", "--get-regexp", r"^user\.(name|email)$"]
    try:
        said = proc.run(words, env={"HOME": str(home)})
    except (ProgramFailed, HostLacks):  # it has none, or there is no git
        return b""
    values = dict(line.split("\n", 1) for line in said.split("\0") if "\n" in line)
    lines = [f"\t{key.removeprefix('user.')} = {_git_quoted(value)}\n" for key, value in values.items()]
    return ("[user]\n" + "".join(sorted(lines))).encode() if lines else b""


def _git_quoted(value: str) -> str:
    """Quote a value as git-config(1) reads it."""
    for character, written in (("\\", r"\\"), ('"', r"\""), ("\n", r"\n"), ("\t", r"\t")):
        value = value.replace(character, written)
    return f'"{value}"'


# -- into the archive ----------------------------------------------------------------------------


def merge(content: Path, found: Gathered, out: io.BufferedIOBase) -> None:
    """Write an archive with an image's /root and the owner's files; these win, except over its .gitconfig."""
    with (
        tarfile.open(content, "r:", encoding="utf-8", errors="surrogateescape") as image,
        tarfile.open(
            fileobj=out, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
        ) as whole,
    ):
        members = {_inside(member.name): member for member in image.getmembers()}
        if GIT in members and GIT in found.files:
            del found.files[GIT]
        _keep_keys(image, members, found)
        kept = _copy(image, whole, members, found)
        _add(whole, kept, found)


def _inside(name: str) -> str:
    path = PurePosixPath("/", name)
    return str(path.relative_to(f"/{_TOP}")) if path.is_relative_to(f"/{_TOP}") else f"/{name}"


def _keep_keys(image: tarfile.TarFile, members: dict[str, tarfile.TarInfo], found: Gathered) -> None:
    """Add the owner's key to those that the image lets in."""
    there = members.get(KEYS)
    if KEYS in found.files and there is not None and there.isreg() and (file := image.extractfile(there)):
        ours, mode = found.files[KEYS]
        found.files[KEYS] = file.read(MOST_BYTES).rstrip(b"\n") + b"\n" + ours, mode


def _copy(
    image: tarfile.TarFile, whole: tarfile.TarFile, members: dict[str, tarfile.TarInfo], found: Gathered
) -> set[str]:
    """Copy what the image has and nothing of the owner's takes the place of; give the directories."""
    parents = set(found.parents())
    gone: set[str] = set()
    for path, member in members.items():
        in_the_way = path in found.files or (path in parents and not member.isdir())
        below_one = any(str(above) in gone for above in PurePosixPath(path).parents)
        if in_the_way or below_one or (member.islnk() and _inside(member.linkname) in gone):
            gone.add(path)
            continue
        whole.addfile(member, image.extractfile(member) if member.isreg() else None)
    return {path for path, member in members.items() if member.isdir() and path not in gone}


def _add(whole: tarfile.TarFile, kept: set[str], found: Gathered) -> None:
    for path in found.parents():
        if path not in kept:
            whole.addfile(_member(path, tarfile.DIRTYPE, found.directories.get(path, 0o700)))
    for path, (content, mode) in found.files.items():
        member = _member(path, tarfile.REGTYPE, mode)
        member.size = len(content)
        whole.addfile(member, io.BytesIO(content))


def _member(path: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    """Describe an entry of root's own."""
    member = tarfile.TarInfo(f"{_TOP}/{path}")
    member.type, member.mode, member.mtime = kind, mode, int(time.time())
    return member
