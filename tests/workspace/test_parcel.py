"""What travels: the state as a commit, byte by byte, and no history."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from banger.workspace import parcel, repository
from banger.workspace.parcel import Base
from banger.workspace.repository import Wish
from tests.workspace.conftest import WEIRD, Repo


class Taken:
    """A repository's state, taken and packed."""

    def __init__(self, repo: Repo, place: Path, **more: object):
        wish = Wish(repository=str(repo.root), **more)  # type: ignore[arg-type]
        found = repository.find(wish)
        self.base = Base(directory=place / "base")
        self.commit = parcel.take(found, wish, self.base.directory)
        self.parcel = place / "parcel"
        self.parcel.mkdir()
        parcel.pack(found, self.base, self.commit, self.parcel)

    def files(self) -> dict[bytes, bytes]:
        names = self.base.git("ls-tree", "-r", "-z", "--name-only", self.commit).split(b"\0")[:-1]
        return {name: self.base.git("cat-file", "blob", self._object(name)) for name in names}

    def _object(self, name: bytes) -> str:
        return f"{self.commit}:{os.fsdecode(name)}"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "place"
    place.mkdir()
    return place


def test_a_clean_checkout_is_its_own_commit(repo: Repo, place: Path) -> None:
    """Nothing is made up where nothing differs."""
    assert Taken(repo, place).commit == repo.git("rev-parse", "HEAD").decode().strip()


def test_a_dirty_tree_travels_as_it_is(repo: Repo, place: Path) -> None:
    """Edits, deletions and modes are in it, staged or not; the repository and its index stay as they are."""
    repo.write("file", b"edited\n")
    repo.write("staged", b"staged\n")
    repo.git("add", "staged")
    (repo.root / "link").unlink()
    (repo.root / ".gitignore").chmod(0o755)
    before = repo.git("status", "--porcelain=v2"), (repo.root / ".git" / "index").read_bytes()
    taken = Taken(repo, place)
    assert (repo.git("status", "--porcelain=v2"), (repo.root / ".git" / "index").read_bytes()) == before
    assert taken.files() == {
        b".gitignore": b"*.ignored\n",
        WEIRD: b"\0weird",
        b"file": b"edited\n",
        b"program": b"#!/bin/sh\n",
        b"staged": b"staged\n",
    }
    modes = taken.base.git("ls-tree", taken.commit, ".gitignore")
    assert modes.startswith(b"100755")


def test_what_filters_make_of_files_does_not_travel(repo: Repo, place: Path) -> None:
    """Line ends and filtered content are as on the disk, not as in git."""
    repo.git("config", "filter.shout.clean", "tr a-z A-Z")
    repo.write(".gitattributes", b"*.txt eol=crlf\n*.loud filter=shout\n")
    repo.write("a.txt", b"a\r\nb\r\n")
    repo.write("a.loud", b"quiet")
    repo.commit()
    files = Taken(repo, place).files()
    assert files[b"a.txt"] == b"a\r\nb\r\n"
    assert files[b"a.loud"] == b"quiet"


def test_a_repository_without_a_commit_travels(tmp_path: Path, place: Path) -> None:
    """What is tracked but was never committed is a state, too."""
    repo = Repo(tmp_path / "fresh")
    repo.git("update-ref", "-d", "HEAD")
    assert Taken(repo, place).files()[b"file"] == b"one\n"


def test_history_stays_at_home(repo: Repo, place: Path) -> None:
    """The guest's checkout has the commit and its files; older ones are not there, and git accepts that."""
    repo.write("file", b"two\n")
    repo.commit()
    old = repo.git("rev-parse", "HEAD~1").decode().strip()
    taken = Taken(repo, place)
    inside = ["git", f"--git-dir={taken.parcel / 'git'}"]
    subprocess.run([*inside, "fsck", "--strict", "--no-dangling"], check=True, capture_output=True)
    subprocess.run([*inside, "log", "-1", "--stat", "main"], check=True, capture_output=True)
    assert subprocess.run([*inside, "cat-file", "-e", old], check=False, capture_output=True).returncode != 0


def test_a_split_index_is_read_whole(repo: Repo, place: Path) -> None:
    """An index that leaves most to another file is not copied without it."""
    repo.git("update-index", "--split-index")
    repo.write("file", b"edited\n")
    repo.git("add", "file")
    assert Taken(repo, place).files()[b"file"] == b"edited\n"


def test_for_a_guest_without_git_files_are_spread(repo: Repo, place: Path) -> None:
    """With modes and links as they are, readable by every user."""
    taken = Taken(repo, place)
    spread = place / "spread"
    spread.mkdir()
    parcel.spread(taken.base, taken.commit, spread)
    tree = spread / "tree"
    assert (tree / "link").readlink() == Path("nowhere")
    assert (tree / "program").stat().st_mode & 0o777 == 0o755
    assert (tree / "file").stat().st_mode & 0o777 == 0o644
