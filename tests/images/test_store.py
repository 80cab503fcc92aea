import errno
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from banger import proc
from banger.errors import Cancelled, DiskFull
from banger.images import store
from banger.model import Artifact

DIGEST = "ab" * 32
Details = dict[str, str | int | list[str]]


def build(cache: Path, make: Callable[[Path], Details], *, cancelled: bool = False) -> Artifact:
    return store.build(cache, "image", "tiny", DIGEST, make, lambda: cancelled)


def fill(staging: Path) -> Details:
    (staging / "root").write_bytes(b"x" * 8192)
    return {"suite": "none"}


def visible(cache: Path) -> set[str]:
    return {path.name for path in (cache / "images").iterdir() if not path.name.endswith(".lock")}


def test_what_is_built_is_found(tmp_path: Path) -> None:
    """Whoever asks by digest gets the same artifact, with its size on the disk and its details."""
    built = build(tmp_path, fill)
    assert store.find(tmp_path, "image", DIGEST) == built
    assert built.size_bytes >= 8192
    assert built.details == {"suite": "none"}


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """A full disk is told as such; neither the artifact nor the half of it is there after."""

    def full(staging: Path) -> Details:
        fill(staging)
        raise OSError(errno.ENOSPC, "No space left on device", str(staging))

    with pytest.raises(DiskFull):
        build(tmp_path, full)
    assert visible(tmp_path) == set()


def test_two_builders_make_one(tmp_path: Path) -> None:
    """The second waits for the first, and uses what it made."""
    working, finish, made = threading.Event(), threading.Event(), []

    def slow(staging: Path) -> Details:
        made.append(staging)
        working.set()
        assert finish.wait(10)
        return fill(staging)

    threads = [threading.Thread(target=build, args=(tmp_path, slow)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert working.wait(10)
    finish.set()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert visible(tmp_path) == {DIGEST}


def test_a_waiter_may_leave_and_a_living_builder_is_not_swept(tmp_path: Path) -> None:
    """While one builds, another's wait can be cancelled and a sweep takes nothing away."""

    def busy(staging: Path) -> Details:
        with pytest.raises(Cancelled):
            build(tmp_path, fill, cancelled=True)
        store.sweep(tmp_path)
        return fill(staging)

    build(tmp_path, busy)
    assert visible(tmp_path) == {DIGEST}


def test_what_a_dead_builder_left_is_swept(tmp_path: Path) -> None:
    """A directory that nobody holds the lock of goes; what is published stays."""
    build(tmp_path, fill)
    (tmp_path / "images" / f".building-{DIGEST}-dead").mkdir()
    store.sweep(tmp_path)
    assert visible(tmp_path) == {DIGEST}


def test_an_unreadable_manifest_is_no_artifact(tmp_path: Path) -> None:
    """A broken directory is not found, and is built again."""
    place = build(tmp_path, fill).path
    (place / store.MANIFEST).write_text("{")
    assert store.find(tmp_path, "image", DIGEST) is None
    assert build(tmp_path, fill).path == place


def test_deleting_can_be_repeated(tmp_path: Path) -> None:
    """What was deleted is not found, and deleting it again is no error."""
    build(tmp_path, fill)
    for _ in range(2):
        store.delete(tmp_path, "image", DIGEST)
        assert store.find(tmp_path, "image", DIGEST) is None
    assert visible(tmp_path) == set()


def test_what_a_dead_builder_ran_is_ended(tmp_path: Path) -> None:
    """A sweep ends the programs that a killed builder left behind, with its directory."""
    staging = tmp_path / "images" / f".building-{'0' * 64}-dead"
    staging.mkdir(parents=True)
    subprocess.run(
        ["setsid", "--fork", "sleep", "60"], env={**os.environ, proc.MARK: str(staging)}, check=True
    )
    assert len(proc.find_by_environ(proc.MARK, str(staging))) == 1
    store.sweep(tmp_path)
    assert proc.find_by_environ(proc.MARK, str(staging)) == []
    assert not staging.exists()
