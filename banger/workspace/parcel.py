"""What travels: a repository's state as one commit, in a parcel for the guest and a base for the host.

The state is a commit of its own on top of the checkout's, so that the guest can tell its own changes
from those it came with. Files are in it byte by byte: git's filters and line ends are overruled.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from banger.errors import InvalidRequest, ProgramFailed
from banger.model import Value
from banger.workspace import repository as repositories
from banger.workspace.repository import Repository, Wish, git

RAW = "* -text -eol -filter -ident -working-tree-encoding -export-ignore -export-subst\n"
"""Attributes that overrule those of the repository: in $GIT_DIR/info/attributes (gitattributes(5))."""

REF = "refs/banger/prepared"
LAST = "whole"
"""The file that is sent last: where it is, all has come."""

_WHO = {"GIT_AUTHOR_NAME": "banger", "GIT_AUTHOR_EMAIL": "banger@localhost"} | {
    "GIT_COMMITTER_NAME": "banger",
    "GIT_COMMITTER_EMAIL": "banger@localhost",
}
# The same state is the same commit, whenever it is taken.
_WHEN = {"GIT_AUTHOR_DATE": "@0 +0000", "GIT_COMMITTER_DATE": "@0 +0000"}


class Base(Value):
    """A repository of banger's own that borrows the objects of the user's: what was brought, for later."""

    directory: Path

    @property
    def index(self) -> Path:
        """Its index, which the user's git never sees."""
        return self.directory / "index"

    def argv(self, *words: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
        """Give the words that run git on it."""
        return ["git", f"--git-dir={self.directory}", *words]

    def git(
        self, *words: str | os.PathLike[str], stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> bytes:
        """Run git on it. Raises ProgramFailed."""
        return git(self.argv(*words)[1:], stdin=stdin, env=env)


def take(repository: Repository, wish: Wish, directory: Path) -> str:
    """Make a base in a directory that is not there yet; give the commit of the state that was taken.

    Raises InvalidRequest when git cannot read the repository.
    """
    base = Base(directory=directory)
    try:
        _make(base, repository)
        if wish.source is None:
            _read_working_tree(base, repository, wish)
        else:
            base.git("read-tree", str(repository.head))
        commit = _commit(base, repository)
        base.git("update-ref", REF, commit)
    except ProgramFailed as error:
        raise InvalidRequest(f"git could not read the repository. {error.message}") from None
    base.index.unlink(missing_ok=True)
    return commit


def pack(repository: Repository, base: Base, commit: str, parcel: Path) -> None:
    """Fill a directory with a git directory for the guest: the state and its commit, without history."""
    inside = parcel / "git"
    git(["init", "--quiet", "--bare", f"--object-format={repository.form}", "--template=", inside])
    (inside / "info").mkdir()
    (inside / "info" / "attributes").write_text(RAW)
    (inside / "config").write_text(_config(repository))
    _write_refs(inside, repository, commit)
    wanted = "\n".join(dict.fromkeys(filter(None, (repository.head, commit)))).encode() + b"\n"
    shallow = base.directory / "shallow"
    if repository.head is not None:
        shallow.write_text(f"{repository.head}\n")
    # No search for new deltas, and little compression: what is packed already stays as it is.
    base.git(
        "-c", "pack.compression=1",
        "pack-objects", "--quiet", "--revs", "--shallow", "--window=0", "--delta-base-offset",
        inside / "objects" / "pack" / "pack",
        stdin=wanted,
    )  # fmt: skip
    (parcel / LAST).touch()


def spread(base: Base, commit: str, parcel: Path) -> None:
    """Fill a directory with the files as they are, for a guest without git."""
    tree = parcel / "tree"
    tree.mkdir()
    tree.chmod(0o755)
    base.git("read-tree", commit)
    words = base.argv("checkout-index", "--all", "--force", f"--prefix={tree}/")[1:]
    git(words, umask=0o022)
    base.index.unlink()
    (parcel / LAST).touch()


def _make(base: Base, repository: Repository) -> None:
    git(["init", "--quiet", "--bare", f"--object-format={repository.form}", "--template=", base.directory])
    (base.directory / "info").mkdir()
    (base.directory / "info" / "attributes").write_text(RAW)
    (base.directory / "objects" / "info" / "alternates").write_bytes(_quoted(repository.objects))
    for name, value in (("bare", "false"), ("fileMode", "true"), ("symlinks", "true"), ("autocrlf", "false")):
        base.git("config", f"core.{name}", value)


def _quoted(path: Path) -> bytes:
    """Quote a path as git-config quotes, which an alternates file takes (gitrepository-layout(5))."""
    plain = os.fsencode(path)
    return b'"' + plain.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n") + b'"\n'


def _read_working_tree(base: Base, repository: Repository, wish: Wish) -> None:
    """Bring an index of our own up to what the files are now; unchanged ones are not read again."""
    tree = {"GIT_WORK_TREE": str(repository.root)}
    if _plain(repository):
        shutil.copyfile(repository.index, base.index)
    else:
        # Without what stat(2) said of them, all files are read, as they are.
        rows = [
            b"%s %s\t%s" % (mode, known, name) for mode, known, _, name in repositories.entries(repository)
        ]
        base.git("update-index", "-z", "--index-info", stdin=b"".join(row + b"\0" for row in rows))
    base.git("-C", repository.root, "add", "--update", "--", ".", env=tree)
    if wish.untracked:
        names = b"".join(name + b"\0" for name in repositories.untracked(repository))
        base.git("-C", repository.root, "update-index", "-z", "--add", "--stdin", stdin=names, env=tree)


def _plain(repository: Repository) -> bool:
    """Tell whether the repository's index knows files as they are: whole, and nothing filtered on the way."""
    root = repository.root
    if not repository.index.exists() or any(repository.index.parent.glob("sharedindex.*")):
        return False
    for name in ("core.autocrlf", "core.fileMode", "core.symlinks", "core.eol"):
        told = git(["-C", root, "config", "--default", "", "--get", name]).strip()
        if told not in (b"", {"core.autocrlf": b"false", "core.eol": b"native"}.get(name, b"true")):
            return False
    names = b"".join(name + b"\0" for *_, name in repositories.entries(repository))
    wanted = ("text", "eol", "filter", "ident", "working-tree-encoding", "crlf")
    told = git(["-C", root, "check-attr", "-z", "--stdin", *wanted], stdin=names)
    return all(value in (b"unspecified", b"unset") for value in told.split(b"\0")[2::3])


def _commit(base: Base, repository: Repository) -> str:
    """Make the state's commit: the checkout's own one, when nothing differs from it."""
    tree = base.git("write-tree").strip().decode()
    parents = []
    if repository.head is not None:
        if base.git("rev-parse", f"{repository.head}^{{tree}}").strip().decode() == tree:
            return repository.head
        parents = ["-p", repository.head]
    made = base.git("commit-tree", tree, *parents, "-m", "as it was prepared", env=_WHO | _WHEN)
    return made.strip().decode()


def _config(repository: Repository) -> str:
    sha256 = repository.form == "sha256"
    lines = ["[core]", f"\trepositoryformatversion = {int(sha256)}", "\tbare = false", "\tfilemode = true"]
    return "\n".join([*lines, *(["[extensions]", "\tobjectformat = sha256"] if sha256 else [])]) + "\n"


def _write_refs(inside: Path, repository: Repository, commit: str) -> None:
    refs = [f"{commit} {REF}\n"]
    if repository.head is not None:
        (inside / "shallow").write_text(f"{repository.head}\n")
        if repository.branch:
            refs.append(f"{repository.head} refs/heads/{repository.branch}\n")
    (inside / "packed-refs").write_text("".join(refs))
    named = f"ref: refs/heads/{repository.branch or 'main'}" if repository.branch else repository.head
    (inside / "HEAD").write_text(f"{named or 'ref: refs/heads/main'}\n")
