"""Nothing hostile gets in: each image of the threat list, through the real function and its real process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from banger.images.remote.oci import Layer
from tests.images.hostile_cases import CASES, Blob, Case
from tests.images.listing import listing
from tests.images.measured import attempt
from tests.images.tarbytes import END, layer_of

LONGEST_CPU_S = 10.0
"""Of the processor: the tests may share it with others."""

LONGEST_S = 60.0
MOST_KIB = 256 * 1024


class Bystander:
    """A tree beside the work directory that images try to reach, and all else that lies around it."""

    def __init__(self, place: Path):
        self.place = place
        (place / "victim").mkdir()
        (place / "victim/hello").write_text("untouched")
        (place / "passwd").write_text("root")
        (place / "link").symlink_to("victim")
        self.before = self.look()

    def look(self) -> dict[str, tuple[object, ...]]:
        found: dict[str, tuple[object, ...]] = {}
        for path in sorted(self.place.rglob("*")):
            about = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
            found[str(path)] = (about.st_mode, about.st_ino, about.st_nlink, about.st_mtime_ns, content)
        return found


@pytest.fixture(scope="module")
def measured() -> Iterator[ProcessPoolExecutor]:
    """A process whose only children are those that flatten: what the largest took is known there."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
    # Spawning started a process that lives as long as we do; other tests count our children.
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


def put(place: Path, case: Case) -> list[Layer]:
    """Write the layers' blobs."""
    layers = []
    for number, layer in enumerate(case.layers):
        path = place / f"blob{number}"
        given = layer() if callable(layer) else layer
        if isinstance(given, Blob):
            layers.append(layer_of(path, given.tar, packed=given.packed))
        else:
            layers.append(layer_of(path, given + (END if case.ended else b"")))
    return layers


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_image_is_refused_or_contained(
    name: str, tmp_path: Path, measured: ProcessPoolExecutor
) -> None:
    """It ends as the table says, soon, in little memory, and what is outside of its archive is untouched."""
    case = CASES[name]
    (tmp_path / "blobs").mkdir()
    layers = put(tmp_path / "blobs", case)
    bystander = Bystander(tmp_path)
    staging = tmp_path / "staging"
    staging.mkdir()
    out = staging / "root.tar"

    refusal, took_s, took_cpu_s, took_kib = measured.submit(attempt, layers, out, case.limits).result()

    left = sorted(path.name for path in staging.iterdir())
    if case.refused is None:
        assert refusal is None
        assert listing(out) == case.merged
        assert left == ["root.tar"]
        out.unlink()
    else:
        assert case.refused in (refusal or "it was taken")
        assert refusal is not None
        assert refusal.isprintable()
        assert left == []
    staging.rmdir()
    assert bystander.look() == bystander.before
    assert took_cpu_s < LONGEST_CPU_S
    assert took_s < LONGEST_S
    assert took_kib < MOST_KIB
