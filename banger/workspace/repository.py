"""A repository on the host: what of it would travel, and whether that can."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from banger import proc
from banger.errors import InvalidRequest, ProgramFailed
from banger.model import Value

GIT_S = 300.0
FALLBACK_NAME = "workspace"

# What a caller's own git told its children must not lead ours elsewhere.
_FOREIGN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR")
_FILE_MODES = (b"100644", b"100755", b"120000")
_SUBMODULE = b"160000"
MISE_FILES = frozenset((
    b"mise.toml", b".mise.toml", b".tool-versions", b"mise/config.toml", b".mise/config.toml",
    b".config/mise.toml", b".config/mise/config.toml",
))  # fmt: skip
"""What mise reads in a project (its documentation, "Configuration")."""


class Wish(Value):
    """What of a repository is to travel: its working tree, or the commit `source`, as branch `branch`."""

    repository: str
    branch: str | None = None
    source: str | None = None
    untracked: bool = False


class Repository(Value):
    """A repository that may travel. Paths are the host's; `head` is None before the first commit."""

    root: Path
    objects: Path
    index: Path
    head: str | None
    branch: str
    form: str


class Listing(Value):
    """What would travel: each file's name as bytes, relative to the root, and its size."""

    files: tuple[tuple[bytes, int], ...]

    @property
    def size_bytes(self) -> int:
        """The sum of all sizes."""
        return sum(size for _, size in self.files)

    @property
    def mise(self) -> bool:
        """Tell whether it names tools for mise."""
        return any(name in MISE_FILES for name, _ in self.files)


def git(
    words: Sequence[str | os.PathLike[str]],
    *,
    stdin: bytes = b"",
    env: dict[str, str] | None = None,
    umask: int = -1,
) -> bytes:
    """Run git, in English and asking nobody; give what it says. Raises ProgramFailed."""
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C.UTF-8"}
    unset = [word for name in _FOREIGN if name not in (env or {}) for word in ("-u", name)]
    argv = ["env", *unset, "git", "-c", "core.quotePath=false", *words]
    return proc.output(argv, stdin=stdin, env={**quiet, **(env or {})}, umask=umask, timeout_s=GIT_S)


def find(wish: Wish) -> Repository:
    """Find the repository that is meant, from any directory in it.

    Raises InvalidRequest when it is none, bare, or asked for what does not go together.
    """
    _check_wish(wish)
    where = Path(wish.repository)
    if not where.is_dir():
        raise InvalidRequest(f"There is no directory {wish.repository}.", hint="Name a git repository.")
    asked = ["rev-parse", "--is-bare-repository", "--is-inside-work-tree", "--show-object-format"]
    try:
        bare, inside, form = git(["-C", where, *asked]).split()
    except ProgramFailed as error:
        raise _not_one(wish, error) from None
    if bare == b"true" or inside != b"true":
        raise InvalidRequest(
            f"{wish.repository} is a bare repository: it has no files to bring.",
            hint="Name a checkout of it: `git clone`, or `git worktree add`.",
        )
    root = Path(os.fsdecode(_line(where, "rev-parse", "--show-toplevel")))
    _check_path(root)
    return Repository(
        root=root,
        objects=_absolute(root, _line(root, "rev-parse", "--git-path", "objects")),
        index=_absolute(root, _line(root, "rev-parse", "--git-path", "index")),
        head=_commit(root, wish.source),
        branch=wish.branch or _branch(root),
        form=form.decode(),
    )


def listing(repository: Repository, wish: Wish) -> Listing:
    """List what would travel.

    Raises InvalidRequest for submodules, an index with conflicts, and what is neither file nor link.
    """
    if wish.source is not None:
        return Listing(files=tuple(_of_commit(repository)))
    tracked = _tracked(repository)
    names = tracked + (untracked(repository) if wish.untracked else [])
    return Listing(files=tuple(_sized(repository.root, names)))


def stamp(repository: Repository, wish: Wish) -> str:
    """Digest what the repository is at: its commit, and what of the working tree differs from it."""
    digest = hashlib.sha256(f"{repository.head}\0".encode())
    if wish.source is None:
        digest.update(_dirt(repository, wish))
    return digest.hexdigest()[:32]


def guest_name(repository: Repository) -> str:
    """Name the repository's directory in the guest: its own name, in letters that every shell takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", repository.root.name).lstrip(".-")[:64] or FALLBACK_NAME


def untracked(repository: Repository) -> list[bytes]:
    """List the files that git neither knows nor ignores. Raises InvalidRequest for repositories inside."""
    names = _split(git(["-C", repository.root, "ls-files", "-z", "--others", "--exclude-standard"]))
    for name in names:
        if name.endswith(b"/"):
            raise _refused("is a repository of its own, inside this one", name, "Leave untracked files out.")
    return names


def entries(repository: Repository) -> list[tuple[bytes, bytes, bytes, bytes]]:
    """List the index: mode, object, stage and name of each entry."""
    rows = _split(git(["-C", repository.root, "ls-files", "-z", "--stage"]))
    return [(*row.split(b"\t", 1)[0].split(b" "), row.split(b"\t", 1)[1]) for row in rows]  # type: ignore[misc]


def shown(name: bytes) -> str:
    """Give a file's name as text that can be printed anywhere, whatever bytes it has."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _check_wish(wish: Wish) -> None:
    if wish.source is not None and wish.branch is None:
        raise InvalidRequest("--from needs --branch.", hint="For example --branch try --from HEAD~3.")
    if wish.source is not None and wish.untracked:
        raise InvalidRequest(
            "--from brings a commit, --include-untracked belongs to the working tree: give one of them."
        )
    if wish.branch is not None:
        try:
            git(["check-ref-format", "--branch", wish.branch])
        except ProgramFailed:
            raise InvalidRequest(f"{wish.branch!r} is not a name for a branch.") from None


def _check_path(root: Path) -> None:
    """Refuse a path that the log, which is JSON, could not hold."""
    try:
        str(root).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"The path of the repository is not UTF-8: {shown(os.fsencode(root))}.",
            hint="Rename the directory, or name it by a link.",
        ) from None


def _not_one(wish: Wish, error: ProgramFailed) -> InvalidRequest:
    if "dubious ownership" in error.message:
        return InvalidRequest(
            f"{wish.repository} belongs to another user, and git does not trust it.",
            hint=f"git config --global --add safe.directory {Path(wish.repository).resolve()}",
        )
    return InvalidRequest(f"{wish.repository} is not a git repository.", hint="`git init` makes it one.")


def _line(where: Path, *words: str) -> bytes:
    return git(["-C", where, *words]).removesuffix(b"\n")


def _absolute(root: Path, path: bytes) -> Path:
    return root / os.fsdecode(path)


def _commit(root: Path, source: str | None) -> str | None:
    try:
        return _line(root, "rev-parse", "--verify", "--quiet", f"{source or 'HEAD'}^{{commit}}").decode()
    except ProgramFailed:
        if source is None:
            return None
        raise InvalidRequest(f"{root} has no commit {source!r}.") from None


def _branch(root: Path) -> str:
    """Name the branch it is on; a detached one is called what git calls it."""
    with contextlib.suppress(ProgramFailed):
        return os.fsdecode(_line(root, "symbolic-ref", "--quiet", "--short", "HEAD"))
    return ""


def _tracked(repository: Repository) -> list[bytes]:
    names = []
    for mode, _, stage, name in entries(repository):
        if stage != b"0":
            raise _refused("has a conflict that is not resolved", name, "Finish the merge, or abort it.")
        _check_mode(mode, name)
        names.append(name)
    return names


def _of_commit(repository: Repository) -> Iterator[tuple[bytes, int]]:
    rows = _split(git(["-C", repository.root, "ls-tree", "-r", "-z", "--long", str(repository.head)]))
    for row in rows:
        facts, name = row.split(b"\t", 1)
        mode, _, _, size = facts.split()
        _check_mode(mode, name)
        yield name, int(size)


def _check_mode(mode: bytes, name: bytes) -> None:
    if mode == _SUBMODULE:
        raise _refused("is a submodule, which cannot be brought", name, "Bring it as a workspace of its own.")
    if mode not in _FILE_MODES:
        raise _refused(f"has mode {mode.decode()}, which is neither a file nor a link", name)


def _sized(root: Path, names: Sequence[bytes]) -> Iterator[tuple[bytes, int]]:
    """Give names with sizes; what was deleted does not travel."""
    base = os.fsencode(root)
    for name in names:
        try:
            status = os.lstat(os.path.join(base, name))  # noqa: PTH118  names are bytes
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
            yield name, status.st_size
        elif not stat.S_ISDIR(status.st_mode):
            raise _refused("is neither a file nor a link by now", name, "Restore it: `git restore`.")


def _dirt(repository: Repository, wish: Wish) -> bytes:
    kind = "normal" if wish.untracked else "no"
    told = git(
        ["-C", repository.root, "status", "--porcelain=v2", "-z", "--no-renames", f"--untracked-files={kind}"]
    )
    base, facts = os.fsencode(repository.root), [told]
    for row in _split(told):
        name = row.split(b" ", 8 if row[:1] == b"1" else 1)[-1]
        with contextlib.suppress(OSError):
            status = os.lstat(os.path.join(base, name))  # noqa: PTH118  names are bytes
            facts.append(b"%d %d" % (status.st_mtime_ns, status.st_size))
    return b"\0".join(facts)


def _split(told: bytes) -> list[bytes]:
    return [each for each in told.split(b"\0") if each]


def _refused(why: str, name: bytes, hint: str | None = None) -> InvalidRequest:
    return InvalidRequest(f"{shown(name)} {why}.", hint=hint)
