"""What a guest has changed of a workspace, as a patch that git applies on the host.

The guest is not trusted: what it sends becomes objects of a repository of our own that lives as long as this
takes, and the patch is written by the host's git. No file is made by a name that the guest gives.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO

from banger import proc
from banger.errors import NotFound, OperationFailed, ProgramFailed
from banger.model import Value, Workspace
from banger.workspace import guest, parcel
from banger.workspace.parcel import Base
from banger.workspace.repository import git, shown

DIFF = (
    *("diff-tree", "-r", "--binary", "--full-index", "--no-renames", "--no-ext-diff", "--no-textconv"),
    *("--no-color", "--ignore-submodules=all", "--src-prefix=a/", "--dst-prefix=b/", "-p"),
)


class Changes(Value):
    """A patch, and the names of the files it changes, as text."""

    patch: bytes
    files: tuple[str, ...]


def changes(
    argv: list[str], workspace: Workspace, base: Base, *, against: str | None, limit_mib: int
) -> Changes:
    """Give what the guest has changed since a workspace was prepared, or since a commit.

    `argv` is the ssh command up to the host. Raises WrongState, GuestUnreachable, and NotFound when the
    host has no such commit.
    """
    place = guest.Place(path=workspace.path, op=workspace.op)
    since = workspace.commit if against is None else _resolved(workspace, against)
    with tempfile.TemporaryDirectory(prefix="banger-export-") as directory:
        sent = Path(directory, "sent")
        guest.fetch(argv, place, workspace.commit, parcel.RAW, sent, limit_mib)
        own = _Own(base, Path(directory))
        with sent.open("rb") as file:
            kind = file.readline(8)
            now = own.tree_of_patch(file, workspace) if kind == b"git\n" else own.tree_of_tar(file, workspace)
        names = own.git("diff-tree", "-r", "-z", "--name-only", "--no-renames", since, now).split(b"\0")[:-1]
        return Changes(patch=own.git(*DIFF, since, now), files=tuple(map(shown, names)))


def _resolved(workspace: Workspace, against: str) -> str:
    try:
        words = ["-C", workspace.repository, "rev-parse", "--verify", "--quiet", f"{against}^{{commit}}"]
        return git(words).decode().strip()
    except ProgramFailed:
        raise NotFound(f"{workspace.repository} has no commit {against!r}.") from None


class _Own:
    """The base with objects and an index that go away again."""

    def __init__(self, base: Base, directory: Path):
        self._base = base
        self._directory = directory
        (directory / "objects").mkdir()
        self._env = {
            "GIT_OBJECT_DIRECTORY": str(directory / "objects"),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": _quoted(base.directory / "objects"),
            "GIT_INDEX_FILE": str(directory / "index"),
        }

    def git(self, *words: str, stdin: bytes = b"") -> bytes:
        try:
            return self._base.git(*words, stdin=stdin, env=self._env)
        except ProgramFailed as error:
            if "bad object" in error.message or "unable to read" in error.message:
                raise OperationFailed(
                    "The host's repository does not have the commit any more that was prepared.",
                    hint="`banger vm workspace prepare` brings what it has now.",
                ) from None
            raise

    def tree_of_patch(self, patch: IO[bytes], workspace: Workspace) -> str:
        """Apply the guest's patch to what was prepared; give the tree it makes."""
        self.git("read-tree", workspace.commit)
        change = patch.read()
        if change:
            try:
                self.git("apply", "--cached", "--binary", "--whitespace=nowarn", "-", stdin=change)
            except ProgramFailed as error:
                raise OperationFailed(f"What the guest sent is no patch. {error.message}") from None
        return self.git("write-tree").decode().strip()

    def tree_of_tar(self, archive: BufferedReader, workspace: Workspace) -> str:
        """Make a tree of the files that the guest sent, without those that the host's git ignores."""
        self.git("read-tree", workspace.commit)
        known = {name for name in self.git("ls-files", "-z").split(b"\0") if name}
        found = self._blobs(archive)
        kept = known | (found.keys() - self._ignored(workspace, found.keys() - known))
        rows = [found[name] for name in sorted(kept & found.keys())]
        gone = [b"0 %s\t%s\0" % (b"0" * len(workspace.commit), name) for name in sorted(known - found.keys())]
        self.git("update-index", "-z", "--index-info", stdin=b"".join(gone + rows))
        return self.git("write-tree").decode().strip()

    def _blobs(self, archive: BufferedReader) -> dict[bytes, bytes]:
        """Store each file of an archive; give what the index is to know of it, by name."""
        if not archive.peek(1):
            return {}
        stream, marks = self._directory / "stream", self._directory / "marks"
        modes: list[tuple[bytes, bytes]] = []
        with stream.open("wb") as out:
            for name, mode, size, content in _files(archive):
                modes.append((name, mode))
                out.write(b"blob\nmark :%d\ndata %d\n" % (len(modes), size))
                shutil.copyfileobj(content, out)
                out.write(b"\n")
        proc.output(
            [
                "sh",
                "-c",
                'exec "$@" < "$0"',
                stream,
                *self._base.argv("fast-import", "--quiet", f"--export-marks={marks}"),
            ],
            env=self._env,
        )
        made = dict(line.split() for line in marks.read_bytes().splitlines())
        return {
            name: b"%s %s\t%s\0" % (mode, made[b":%d" % number], name)
            for number, (name, mode) in enumerate(modes, 1)
        }

    def _ignored(self, workspace: Workspace, names: set[bytes]) -> set[bytes]:
        if not names:
            return set()
        words = ["-C", workspace.repository, "check-ignore", "--no-index", "-z", "--stdin"]
        try:
            return set(git(words, stdin=b"".join(name + b"\0" for name in sorted(names))).split(b"\0"))
        except ProgramFailed as error:
            if error.status == 1:  # none of them is
                return set()
            raise


def _files(archive: IO[bytes]) -> Iterator[tuple[bytes, bytes, int, IO[bytes]]]:
    """Give each file and link of an archive: name, git's mode, size, content. Raises OperationFailed."""
    try:
        with tarfile.open(fileobj=archive, mode="r|", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:  # a name that is none, git refuses
                name = os.fsencode(member.name).removeprefix(b"./")
                if member.issym():
                    link = os.fsencode(member.linkname)
                    yield name, b"120000", len(link), io.BytesIO(link)
                elif member.isreg():
                    content = tar.extractfile(member)
                    assert content is not None
                    yield name, b"100755" if member.mode & 0o100 else b"100644", member.size, content
    except tarfile.TarError as error:
        raise OperationFailed(f"What the guest sent is no archive: {error}") from None


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
