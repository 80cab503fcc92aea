"""An image as one ext4: made once beside its squashfs, with all that it has, and gone with it."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from banger.errors import Cancelled, InvalidImage
from banger.images import base, cache, store, whole
from banger.images.layers import flatten
from banger.model import Artifact
from banger.storage import ext4

LEAST_MIB = 16
DIGEST = "d" * 64


def member(name: str, **more: object) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(found, key, value)
    return found


@pytest.fixture
def image(tmp_path: Path) -> Artifact:
    """A published image whose base is a squashfs with a file, a link to it, a device and an attribute."""
    archive = tmp_path / "root.tar"
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member("etc", type=tarfile.DIRTYPE, mode=0o755))
        marked = member("etc/word", size=5, mode=0o4750, uid=7, gid=8, mtime=1_000_000_000)
        marked.pax_headers = {"SCHILY.xattr.user.mark": "here"}
        tar.addfile(marked, io.BytesIO(b"hello"))
        tar.addfile(member("etc/same", type=tarfile.LNKTYPE, linkname="etc/word"))
        tar.addfile(member("etc/link", type=tarfile.SYMTYPE, linkname="word"))
        tar.addfile(member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666))

    def make(staging: Path) -> store.Details:
        return {"format": base.make(archive, staging / base.FILE, label="tiny").format}

    return store.build(tmp_path / "cache", "image", "tiny", DIGEST, make, lambda: False)


def debugfs(file: Path, request: str) -> str:
    words = ["debugfs", "-R", request, str(file)]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout


def test_the_twin_has_all_that_the_squashfs_has(image: Artifact) -> None:
    """Owners, modes, times, links, devices and attributes are the same, and e2fsck has nothing to mend."""
    twin = whole.make(image, least_mib=LEAST_MIB)
    assert twin.stat().st_size == LEAST_MIB << 20
    assert debugfs(twin, "cat /etc/same") == "hello"
    told = debugfs(twin, "stat /etc/word")
    for part in (
        "Mode:  04750",
        "User:     7",
        "Group:     8",
        "Links: 2",
        "0x3b9aca00",
        'user.mark (4) = "here"',
    ):
        assert part in told
    assert 'Fast link dest: "word"' in debugfs(twin, "stat /etc/link")
    assert "Type: character special" in debugfs(twin, "stat /null")
    assert ext4.check(twin) is False


def test_it_is_made_once_and_counts_as_the_images(image: Artifact) -> None:
    """The second VM finds it as it is; it is in the image's size, and goes with the image."""
    assert whole.path_of(image) is None
    first = ext4.uuid(whole.make(image, least_mib=LEAST_MIB))
    twin = whole.make(image, least_mib=2 * LEAST_MIB)
    assert ext4.uuid(twin) == first
    assert whole.path_of(image) == twin
    place = image.path.parents[1]
    known = store.find(place, "image", DIGEST)
    assert known is not None
    assert known.size_bytes > image.size_bytes
    assert cache.prune(place, frozenset()).artifacts == (DIGEST,)
    assert [path.name for path in image.path.parent.iterdir()] == []


def test_an_ext4_image_is_used_as_it_is(tmp_path: Path, image: Artifact) -> None:
    """There is no second file beside one that is ext4 already."""

    def make(staging: Path) -> store.Details:
        ext4.make(staging / base.FILE, LEAST_MIB, label="own")
        return {"format": "ext4"}

    own = store.build(tmp_path / "cache", "image", "own", "e" * 64, make, lambda: False)
    assert whole.make(own, least_mib=LEAST_MIB) == own.path / base.FILE
    assert sorted(path.name for path in own.path.iterdir()) == [base.FILE, store.MANIFEST]
    assert whole.path_of(image) is None


@pytest.mark.parametrize(("limits", "cancel"), [(flatten.Limits(entries=2), False), (flatten.Limits(), True)])
def test_nothing_is_left_of_one_that_was_not_made(
    image: Artifact, limits: flatten.Limits, cancel: bool
) -> None:
    """A squashfs with more than is allowed, or a change of mind, leaves the image as it was."""

    def write(squashfs: Path, target: Path, **more: object) -> None:
        whole.write(squashfs, target, **{**more, "limits": limits, "cancelled": lambda: cancel})  # type: ignore[arg-type]

    before = sorted(image.path.rglob("*"))
    with pytest.raises((InvalidImage, Cancelled)):
        whole.make(image, least_mib=LEAST_MIB, write=write)
    assert sorted(image.path.rglob("*")) == before
    assert list(image.path.parent.glob(".building-*")) == []
