"""What of a repository would travel, and what is refused before anybody asks a guest."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from banger.errors import InvalidRequest
from banger.workspace import repository
from banger.workspace.repository import Wish
from tests.workspace.conftest import WEIRD, Repo


def names(wish: Wish) -> list[bytes]:
    return [name for name, _ in repository.listing(repository.find(wish), wish).files]


def wish(repo: Repo, **more: object) -> Wish:
    return Wish(repository=str(repo.root), **more)  # type: ignore[arg-type]


def test_tracked_files_travel_as_they_are(repo: Repo) -> None:
    """What git tracks and is there, by names of any bytes; not what is new, ignored or deleted."""
    repo.write("new", b"")
    repo.write("x.ignored", b"")
    (repo.root / "program").unlink()
    assert sorted(names(wish(repo))) == sorted([b".gitignore", WEIRD, b"file", b"link"])


def test_new_files_travel_when_asked_for_and_ignored_ones_never(repo: Repo) -> None:
    """--include-untracked adds what git would."""
    repo.write("new", b"")
    repo.write("x.ignored", b"")
    found = names(wish(repo, untracked=True))
    assert b"new" in found
    assert b"x.ignored" not in found


def test_a_commit_travels_as_it_was(repo: Repo) -> None:
    """With --from the working tree does not matter."""
    repo.write("later", b"")
    repo.commit()
    assert b"later" not in names(wish(repo, branch="try", source="HEAD~1"))
    assert b"later" in names(wish(repo, branch="try", source="HEAD"))


def test_any_directory_of_it_names_it(repo: Repo) -> None:
    """A repository is found from below, and from a linked worktree."""
    below = repo.write("deep/er/file", b"").parent
    assert repository.find(Wish(repository=str(below))).root == repo.root
    other = repo.root.parent / "other"
    repo.git("worktree", "add", "--quiet", str(other))
    found = repository.find(Wish(repository=str(other)))
    assert found.root == other
    assert found.objects == repo.root / ".git" / "objects"


def _bare(repo: Repo) -> Path:
    bare = repo.root.parent / "bare.git"
    repo.git("clone", "--quiet", "--bare", str(repo.root), str(bare))
    return bare


def _none(repo: Repo) -> Path:
    return repo.root.parent


def _missing(repo: Repo) -> Path:
    return repo.root / "not-there"


def _submodule(repo: Repo) -> Path:
    repo.git("submodule", "--quiet", "add", str(_bare(repo)), "sub")
    return repo.root


def _conflict(repo: Repo) -> Path:
    repo.git("switch", "--quiet", "--create", "other")
    repo.write("file", b"other\n")
    repo.commit()
    repo.git("switch", "--quiet", "main")
    repo.write("file", b"ours\n")
    repo.commit()
    with pytest.raises(subprocess.CalledProcessError):
        repo.git("merge", "--quiet", "other")
    return repo.root


def _odd_mode(repo: Repo) -> Path:
    (repo.root / "file").unlink()
    os.mkfifo(repo.root / "file")
    return repo.root


REFUSED = [
    (_bare, "bare"),
    (_none, "not a git repository"),
    (_missing, "no directory"),
    (_submodule, "submodule"),
    (_conflict, "conflict"),
    (_odd_mode, "neither a file nor a link"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
def test_what_cannot_travel_is_refused(repo: Repo, make: object, words: str) -> None:
    """In words that say what it is."""
    asked = Wish(repository=str(make(repo)))  # type: ignore[operator]
    with pytest.raises(InvalidRequest, match=words):
        names(asked)


def test_a_repository_inside_is_refused_only_as_a_new_file(repo: Repo) -> None:
    """One that git does not track is no concern of ours, unless new files are asked for."""
    Repo(repo.root / "inner")
    assert b"inner/" not in names(wish(repo))
    with pytest.raises(InvalidRequest, match="of its own"):
        names(wish(repo, untracked=True))


@pytest.mark.parametrize(
    "more",
    [
        {"source": "HEAD"},
        {"source": "nothing", "branch": "b"},
        {"branch": "two..dots"},
        {"source": "HEAD", "branch": "b", "untracked": True},
        {"source": "--output=/tmp/x", "branch": "b"},
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(repo: Repo, more: dict[str, object]) -> None:
    """A branch must be one, a commit be there, and --from comes with --branch alone."""
    with pytest.raises(InvalidRequest):
        repository.find(wish(repo, **more))


def test_the_stamp_tells_whether_anything_moved(repo: Repo) -> None:
    """It is the same as long as nothing is touched, and another after an edit, a commit, a new file."""

    def stamp(**more: object) -> str:
        return repository.stamp(repository.find(wish(repo, **more)), wish(repo, **more))

    first = stamp()
    assert stamp() == first
    repo.write("file", b"two\n")
    edited = stamp()
    assert edited != first
    repo.write("file", b"three\n")
    assert stamp() not in (first, edited)
    repo.commit()
    committed = stamp()
    repo.write("new", b"")
    assert stamp() == committed
    assert stamp(untracked=True) != committed


def test_names_for_a_guest_never_hide_a_directory_of_its_own(repo: Repo) -> None:
    """A repository called .ssh must not become /root/.ssh."""
    hidden = Repo(repo.root.parent / ".ssh")
    assert repository.guest_name(repository.find(wish(hidden))) == "ssh"
    assert repository.guest_name(repository.find(wish(repo))) == "my-repo"
