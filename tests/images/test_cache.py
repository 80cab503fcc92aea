"""The cache: what it holds is counted, what nobody needs goes, what somebody needs stays."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from pathlib import Path

import pytest

from banger.images import cache, store
from banger.model import Artifact

SIZE = 64 << 10


def artifact(place: Path, name: str, kind: store.Kind = "image") -> Artifact:
    def make(staging: Path) -> store.Details:
        (staging / "base.img").write_bytes(os.urandom(SIZE))
        return {}

    return store.build(place, kind, name, hashlib.sha256(name.encode()).hexdigest(), make, lambda: False)


def passing(place: Path, directory: str, name: str) -> Path:
    path = place / directory / "sha256" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(SIZE))
    return path


def fill(place: Path) -> tuple[Artifact, Artifact]:
    passing(place, "blobs", "a" * 64)
    passing(place, "blobs", "b" * 64)
    passing(place, "blobs", "c" * 64 + ".part")
    passing(place, "bundles", "d" * 64)
    return artifact(place, "used"), artifact(place, "unused")


def usage(place: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in place.rglob("*") if path.is_file())


def test_what_is_there_is_counted(tmp_path: Path) -> None:
    """Artifacts are named, blobs and bundles counted, and the sum is what the disk says."""
    used, unused = fill(tmp_path)
    held = cache.holdings(tmp_path)
    assert {found.digest for found in held.artifacts} == {used.digest, unused.digest}
    assert [(p.directory, p.whole, p.partial) for p in held.passing] == [("blobs", 2, 1), ("bundles", 1, 0)]
    assert held.size_bytes == usage(tmp_path)


def test_an_empty_cache_is_nothing(tmp_path: Path) -> None:
    """Where nothing was ever kept, nothing is counted and nothing is to be removed."""
    assert cache.holdings(tmp_path / "none").size_bytes == 0
    assert cache.prune(tmp_path / "none", frozenset()).size_bytes == 0


def test_pruning_gives_back_what_it_says(tmp_path: Path) -> None:
    """What is not in use goes, the disk has that much more room, and the second time there is nothing."""
    used, unused = fill(tmp_path)
    before = usage(tmp_path)
    foretold = cache.prune(tmp_path, frozenset([used.digest]), dry_run=True)
    assert usage(tmp_path) == before
    pruned = cache.prune(tmp_path, frozenset([used.digest]))
    assert pruned == foretold
    assert before - usage(tmp_path) == pruned.size_bytes
    assert (pruned.artifacts, pruned.blobs, pruned.partial, pruned.bundles) == ((unused.digest,), 2, 1, 1)
    assert store.find(tmp_path, "image", used.digest) == used
    assert cache.prune(tmp_path, frozenset([used.digest])).size_bytes == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".using.lock", "blobs", "bundles", "images"]


def test_what_cannot_be_read_goes_too(tmp_path: Path) -> None:
    """An artifact without a manifest is nobody's."""
    used, unused = fill(tmp_path)
    (unused.path / store.MANIFEST).unlink()
    assert cache.prune(tmp_path, frozenset([used.digest])).artifacts == (unused.digest,)
    assert not unused.path.exists()


def test_blobs_that_are_in_use_stay(tmp_path: Path) -> None:
    """While somebody pulls, all blobs and bundles stay; artifacts that nobody uses go all the same."""
    used, unused = fill(tmp_path)
    with cache.using(tmp_path), cache.using(tmp_path):
        pruned = cache.prune(tmp_path, frozenset([used.digest]))
    assert pruned.busy
    assert (pruned.blobs, pruned.bundles, pruned.artifacts) == (0, 0, (unused.digest,))
    assert len(list((tmp_path / "blobs" / "sha256").iterdir())) == 3
    assert not cache.prune(tmp_path, frozenset([used.digest])).busy


def test_a_part_that_somebody_fetches_stays(tmp_path: Path) -> None:
    """Its lock is enough: whoever holds it need not know of pruning."""
    fill(tmp_path)
    with (tmp_path / "blobs" / "sha256" / ("c" * 64 + ".part")).open("rb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        assert cache.prune(tmp_path, frozenset()).busy
    assert not cache.prune(tmp_path, frozenset()).busy


def test_an_artifact_that_is_being_made_stays(tmp_path: Path) -> None:
    """Pruning in the middle of a build takes nothing from it, and what it makes is found."""
    digest = "ab" * 32

    def make(staging: Path) -> store.Details:
        (staging / "base.img").write_bytes(b"x")
        assert cache.prune(tmp_path, frozenset()).artifacts == ()
        return {}

    store.build(tmp_path, "image", "busy", digest, make, lambda: False)
    assert store.find(tmp_path, "image", digest) is not None


def test_who_wants_blobs_while_the_cache_is_pruned_gets_them_after(tmp_path: Path) -> None:
    """Pulls and prunes at the same time, over and over: nobody finds his blob gone while he uses it."""
    stop, lost = threading.Event(), []

    def pull(number: int) -> None:
        while not stop.is_set():
            with cache.using(tmp_path):
                mine = passing(tmp_path, "blobs", f"{number}")
                if mine.stat().st_size != SIZE or not mine.read_bytes():
                    lost.append(mine)

    pullers = [threading.Thread(target=pull, args=(number,)) for number in range(2)]
    for puller in pullers:
        puller.start()
    removed = 0
    while removed < 5:
        pruned = cache.prune(tmp_path, frozenset())
        removed += not pruned.busy
        stop.wait(0.01)
    stop.set()
    for puller in pullers:
        puller.join()
    assert lost == []


def test_what_a_dead_pruner_put_aside_goes(tmp_path: Path) -> None:
    """One that died between its rename and its end leaves nothing for ever."""
    fill(tmp_path)
    aside = tmp_path / ".pruned-dead"
    aside.mkdir()
    (tmp_path / "blobs").rename(aside / "blobs")
    cache.prune(tmp_path, frozenset())
    assert not aside.exists()


def test_an_artifact_goes_with_its_lock_but_not_from_under_a_builder(tmp_path: Path) -> None:
    """What is idle is deleted and leaves no lock; what is being made is not deleted."""
    gone = artifact(tmp_path, "gone")
    assert store.delete_idle(tmp_path, "image", gone.digest)
    assert list((tmp_path / "images").iterdir()) == []

    def make(staging: Path) -> store.Details:
        assert not store.delete_idle(tmp_path, "image", gone.digest)
        return {}

    store.build(tmp_path, "image", "gone", gone.digest, make, lambda: False)
    assert store.find(tmp_path, "image", gone.digest) is not None


def test_a_lock_that_was_removed_in_between_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opened a lock's file and got it after it was removed takes another one: the one others see."""
    digest, real = "ab" * 32, fcntl.flock
    removed: list[Path] = []
    lock = tmp_path / "images" / f".{digest}.lock"

    def late(fd: int, how: int) -> None:
        if not removed:
            lock.unlink()
            removed.append(lock)
        real(fd, how)

    def make(staging: Path) -> store.Details:
        with lock.open("rb") as seen, pytest.raises(BlockingIOError):
            real(seen, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return {}

    monkeypatch.setattr(fcntl, "flock", late)
    store.build(tmp_path, "image", "tiny", digest, make, lambda: False)
    assert removed
