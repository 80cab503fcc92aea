"""Bundles: what is made is got back, and nothing hostile gets in."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from banger.errors import Cancelled, DownloadFailed, InvalidImage, InvalidRequest
from banger.images import base, bundle, cache, custom, store
from banger.images.bundle import Bundle, Limits
from banger.images.remote import download
from banger.model import Artifact
from banger.storage import ext4
from tests.images import tiny
from tests.images.serving import Site, serving

SMALL = Limits(bundle_bytes=1 << 20, unpacked_bytes=8 << 20)
ROOT = "root.squashfs"
CONTENT = tiny.squashfs()
BZIMAGE = bytes(0x1FE) + b"\x55\xaa\x00\x00HdrS" + bytes(4096)


# -- building them byte by byte -------------------------------------------------------------


def entry(name: bytes, data: bytes = b"", *, flag: bytes = b"0", link: bytes = b"", size: int = -1) -> bytes:
    """One entry of a tar archive (POSIX ustar); `size` is what its header says."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108] = b"0000644\0"
    header[108:124] = b"0000000\0" * 2
    header[124:136] = b"%011o\0" % (len(data) if size < 0 else size)
    header[136:148] = b"%011o\0" % 0
    header[156:157] = flag
    header[157 : 157 + len(link)] = link
    header[257:265] = b"ustar\x0000"
    header[329:345] = b"0000001\0" * 2
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def manifest(files: dict[str, int], **more: object) -> bytes:
    said = {"format": 1, "kind": "image", "files": files, **more}
    return entry(b"manifest.json", json.dumps(said).encode())


END = bytes(1024)
LISTED = manifest({ROOT: len(CONTENT)})
GOOD = LISTED + entry(ROOT.encode(), CONTENT) + END


def packed(archive: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(archive)


def frame(archive: bytes, window: int) -> bytes:
    """One zstd frame of raw blocks, made by hand, that asks for a window of 2^window bytes."""
    blocks = [archive[at : at + 65536] for at in range(0, len(archive), 65536)]
    body = b"".join(
        (len(b) << 3 | (i == len(blocks) - 1)).to_bytes(3, "little") + b for i, b in enumerate(blocks)
    )
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window - 10) << 3]) + body


def at(path: Path, content: bytes) -> Bundle:
    """Put a bundle's bytes into a file, and say the truth about them."""
    path.write_bytes(content)
    return Bundle(place=str(path), sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def left(directory: Path) -> list[str]:
    """List what is in a cache, other than locks and the directories that are always there."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if not path.name.endswith(".lock") and not path.is_dir()
    )


def state(directory: Path) -> list[tuple[object, ...]]:
    """Everything that could change about a tree."""
    found: list[tuple[object, ...]] = []
    for path in sorted(directory.rglob("*")):
        at_it = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(at_it.st_mode) else None
        found.append((path, at_it.st_mode, at_it.st_mtime_ns, at_it.st_ino, at_it.st_nlink, content))
    return found


@pytest.fixture
def canaries(tmp_path: Path) -> Iterator[Path]:
    """Files beside the cache that nothing may touch."""
    around = tmp_path / "around"
    around.mkdir()
    (around / "passwd").write_bytes(b"root")
    (around / "link").symlink_to("passwd")
    os.utime(around / "passwd", ns=(1, 1))
    before = state(around)
    yield around
    assert state(around) == before


def install(tmp_path: Path, found: Bundle, kind: bundle.Kind = "image", **more: object) -> Artifact:
    return bundle.install(found, kind, "tiny", tmp_path / "cache", limits=SMALL, **more)  # type: ignore[arg-type]


# -- what works -----------------------------------------------------------------------------


def test_an_image_goes_through_a_bundle_unchanged(tmp_path: Path) -> None:
    """What is written from a directory is installed as it was, holes and all, and can be written again."""
    made, twin = tmp_path / "made", tmp_path / "twin.tar.zst"
    made.mkdir()
    ext4.make(made / "root.ext4", 4, label="tiny")
    packed_up = bundle.write(made, tmp_path / "tiny.tar.zst", details={"from": "a test"})
    image = install(tmp_path, packed_up)
    root = base.path_of(image)
    assert root.read_bytes() == (made / "root.ext4").read_bytes()
    assert root.stat().st_blocks * 512 < root.stat().st_size
    assert image.details["format"] == "ext4"
    assert image.details["from"] == "a test"
    assert bundle.write(image.path, twin, details={"from": "a test"}).sha256 == packed_up.sha256
    assert [name for name in left(tmp_path / "cache") if name.startswith("bundles")] == []


def test_a_kernel_goes_through_a_bundle_unchanged(tmp_path: Path) -> None:
    """A kernel with an initrd of its own keeps both; they have the names that the VMM looks for."""
    made = tmp_path / "made"
    made.mkdir()
    (made / "vmlinuz").write_bytes(BZIMAGE)
    (made / "initrd").write_bytes(b"070701 and so on")
    kernel = install(tmp_path, bundle.write(made, tmp_path / "kernel.tar.zst"), "kernel")
    assert (kernel.path / custom.KERNEL).read_bytes() == BZIMAGE
    assert (kernel.path / custom.INITRD).read_bytes() == b"070701 and so on"
    assert kernel.details["initrd"] == "its own"
    assert sorted(path.name for path in kernel.path.iterdir()) == ["initrd.cpio", "manifest.json", "vmlinuz"]


def test_a_bundle_by_hand_is_taken(tmp_path: Path, canaries: Path) -> None:
    """The hostile ones below are refused for what they do: the same without it is installed."""
    for number, content in enumerate((packed(GOOD), frame(GOOD, 20), packed(GOOD + bytes(8192)))):
        image = install(tmp_path, at(tmp_path / f"{number}.tar.zst", content))
        assert base.path_of(image).read_bytes() == CONTENT


def test_the_second_name_of_a_bundle_is_another_image(tmp_path: Path) -> None:
    """Deleting one name's image leaves the other's."""
    found = at(tmp_path / "x.tar.zst", packed(GOOD))
    one = install(tmp_path, found)
    other = bundle.install(found, "image", "other", tmp_path / "cache", limits=SMALL)
    store.delete(tmp_path / "cache", "image", one.digest)
    assert base.path_of(other).read_bytes() == CONTENT


def test_nothing_is_written_that_is_no_bundle(tmp_path: Path) -> None:
    """A directory with two roots, or with none, makes no bundle and leaves no file."""
    made = tmp_path / "made"
    made.mkdir()
    with pytest.raises(InvalidRequest, match="exactly one"):
        bundle.write(made, tmp_path / "x.tar.zst")
    for name in ("root.squashfs", "root.ext4"):
        (made / name).write_bytes(CONTENT)
    with pytest.raises(InvalidRequest, match="exactly one"):
        bundle.write(made, tmp_path / "x.tar.zst")
    assert left(tmp_path) == ["made/root.ext4", "made/root.squashfs"]


# -- what is refused ------------------------------------------------------------------------

SKIPPABLE = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"evil"
FILE = entry(ROOT.encode(), CONTENT)
EXTRA = {ROOT: len(CONTENT)}
BOMB = manifest({ROOT: 1 << 23}) + entry(ROOT.encode(), bytes(1 << 23)) + bytes(64 << 20)

HOSTILE: dict[str, tuple[bytes, str]] = {
    "a path upwards": (packed(LISTED + entry(b"../x", CONTENT) + FILE + END), "not listed"),
    "a path upwards that is listed": (
        packed(manifest({"../x": 3}) + entry(b"../x", b"abc") + END),
        "no part",
    ),
    "a hidden path upwards": (packed(LISTED + entry(b"modules/../../x", b"abc") + FILE + END), "not listed"),
    "an absolute path": (packed(LISTED + entry(b"/tmp/evil", CONTENT) + FILE + END), "not listed"),
    "an absolute one that is listed": (packed(manifest({"/root.ext4": 3}) + END), "no part"),
    "a symbolic link": (
        packed(LISTED + entry(ROOT.encode(), flag=b"2", link=b"/etc/passwd") + END),
        "regular",
    ),
    "a file through a link": (
        packed(LISTED + entry(b"modules", flag=b"2", link=b"..") + entry(b"modules/x.ko", b"x") + END),
        "not listed",
    ),
    "a hard link": (
        packed(LISTED + entry(ROOT.encode(), flag=b"1", link=b"../around/passwd") + END),
        "regular",
    ),
    "a device": (packed(manifest({ROOT: 0}) + entry(ROOT.encode(), flag=b"3") + END), "regular"),
    "a fifo": (packed(manifest({ROOT: 0}) + entry(ROOT.encode(), flag=b"6") + END), "regular"),
    "a directory": (packed(LISTED + entry(b"modules/", flag=b"5") + FILE + END), "not listed"),
    "an unknown type": (packed(LISTED + entry(b"x", flag=b"Z") + FILE + END), "unknown type"),
    "a name twice": (packed(LISTED + FILE + FILE + END), "twice"),
    "the manifest twice": (packed(LISTED + LISTED + FILE + END), "not listed"),
    "no manifest": (packed(FILE + END), "does not begin with manifest.json"),
    "a manifest that comes late": (packed(FILE + LISTED + END), "does not begin with manifest.json"),
    "nothing at all": (packed(END), "does not begin with manifest.json"),
    "no end": (packed(LISTED + FILE), "cut off"),
    "a manifest of something else": (
        packed(entry(b"manifest.json", b"[1, 2]") + FILE + END),
        "manifest.json is",
    ),
    "a manifest of nested lists": (packed(entry(b"manifest.json", b"[" * 99999) + FILE + END), "is wrong"),
    "a manifest with an unknown key": (packed(manifest(EXTRA, run="sh") + FILE + END), "run"),
    "a manifest of another format": (packed(manifest(EXTRA, format=2) + FILE + END), "format"),
    "a huge manifest": (packed(entry(b"manifest.json", bytes(2 << 20)) + FILE + END), "more than"),
    "a manifest that lies of the kind": (packed(manifest({"vmlinuz": 1}, kind="kernel") + END), "one kernel"),
    "a manifest that lies of a size": (packed(manifest({ROOT: 5}) + FILE + END), "as large as listed"),
    "a manifest that lists what is not there": (packed(LISTED + END), "does not have"),
    "a manifest that lists nothing": (packed(manifest({}) + END), "exactly one"),
    "a manifest that lists both roots": (packed(manifest({ROOT: 1, "root.ext4": 1}) + END), "exactly one"),
    "a manifest that lists a negative size": (packed(manifest({ROOT: -1}) + END), "is wrong"),
    "a manifest that lists too much": (packed(manifest({ROOT: 9 << 20}) + END), "more than 8 MiB"),
    "a root that is none": (packed(manifest({ROOT: 3}) + entry(ROOT.encode(), b"abc") + END), "neither"),
    "a root of another format": (
        packed(manifest({"root.ext4": len(CONTENT)}) + entry(b"root.ext4", CONTENT) + END),
        "is squashfs",
    ),
    "a size of its own in the header": (
        packed(LISTED + entry(ROOT.encode(), CONTENT, size=len(CONTENT) + 512) + END),
        "as large as listed",
    ),
    "something after the archive": (packed(GOOD + b"evil"), "follows the end"),
    "an archive after the archive": (packed(GOOD + GOOD), "follows the end"),
    "a bomb": (packed(BOMB), "unpacks to more than"),
    "a bomb after the archive": (packed(GOOD + bytes(5 << 20)), "follows the end"),
    "a bomb in a bomb": (
        packed(
            manifest({ROOT: len(packed(packed(BOMB)))}) + entry(ROOT.encode(), packed(packed(BOMB))) + END
        ),
        "neither",
    ),
    "a bomb of a bomb": (packed(packed(BOMB)), "checksum|not a number|cut off"),
    "a window of 2^31": (frame(GOOD, 31), "a window of 2048 MiB"),
    "a window of 2^28": (frame(GOOD, 28), "a window of 256 MiB"),
    "junk after the frame": (packed(GOOD) + b"junk", "one whole zstd frame"),
    "a zero after the frame": (packed(GOOD) + b"\0", "one whole zstd frame"),
    "a skippable frame after it": (packed(GOOD) + SKIPPABLE, "one whole zstd frame"),
    "a skippable frame before it": (SKIPPABLE + packed(GOOD), "not a zstd file"),
    "two frames": (packed(GOOD[:1024]) + packed(GOOD[1024:]), "one whole zstd frame"),
    "a frame without its end": (packed(GOOD)[:-9], "one whole zstd frame"),
    "a frame with a wrong checksum": (packed(GOOD)[:-1] + b"\0", "damaged"),
    "a header of zstd and no more": (b"\x28\xb5\x2f\xfd", "header is damaged"),
    "gzip": (b"\x1f\x8b" + GOOD, "not a zstd file"),
    "a plain archive": (GOOD, "not a zstd file"),
    "less than a header": (b"abc", "not a zstd file"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_bundle_is_refused(tmp_path: Path, canaries: Path, what: str) -> None:
    """A bundle with this in it is refused in one sentence; nothing is left of it, and nothing was touched."""
    content, reason = HOSTILE[what]
    found = at(tmp_path / "bundle.tar.zst", content)
    began = time.monotonic()
    with pytest.raises(InvalidImage, match=reason) as refused:
        install(tmp_path, found)
    assert time.monotonic() - began < 10
    assert left(tmp_path / "cache") == []
    assert refused.value.message.isprintable()
    assert (tmp_path / "bundle.tar.zst").read_bytes() == content


@pytest.mark.parametrize("cut", range(0, len(GOOD), 512))
def test_an_archive_that_ends_early_is_refused(tmp_path: Path, cut: int) -> None:
    """Cut off at whichever block, it is not taken for a smaller one."""
    with pytest.raises(InvalidImage):
        install(tmp_path, at(tmp_path / "bundle.tar.zst", packed(GOOD[:cut])))
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("lie", "reason"),
    [({"sha256": "0" * 64}, "something else"), ({"size": 7}, "not 7"), ({"size": 1 << 30}, "are allowed")],
)
def test_another_file_than_the_catalog_pinned_is_refused(
    tmp_path: Path, lie: dict[str, object], reason: str
) -> None:
    """A wrong hash or size is told before a byte is unpacked: what is inside is never looked at."""
    truth = at(tmp_path / "bundle.tar.zst", b"not even zstd")
    pinned = {"place": truth.place, "sha256": truth.sha256, "size": truth.size} | lie
    with pytest.raises(InvalidImage, match=reason):
        install(tmp_path, Bundle(**pinned))  # type: ignore[arg-type]
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize("make", [lambda _: None, os.mkfifo, os.mkdir])
def test_a_bundle_that_is_not_there_is_told(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A path that leads to nothing, or to no file, is an error that names it; nobody waits for a FIFO."""
    make(tmp_path / "bundle.tar.zst")
    with pytest.raises(DownloadFailed, match=r"bundle\.tar\.zst"):
        install(tmp_path, Bundle(place=str(tmp_path / "bundle.tar.zst"), sha256="0" * 64, size=7))
    assert left(tmp_path / "cache") == []


def test_a_name_that_is_there_is_never_written_through(tmp_path: Path, canaries: Path) -> None:
    """Should a link be where a file is to be made, the file behind it stays as it is."""
    (into := tmp_path / "into").mkdir()
    (into / ROOT).symlink_to(canaries / "passwd")
    found = at(tmp_path / "bundle.tar.zst", packed(GOOD))
    fd = os.open(found.place, os.O_RDONLY)
    with pytest.raises(FileExistsError):
        bundle.unpack(fd, into, "image", limits=SMALL)
    os.close(fd)


def test_a_directory_that_is_a_link_is_not_entered(tmp_path: Path, canaries: Path) -> None:
    """Should `modules` be a link, no module is written through it."""
    (into := tmp_path / "into").mkdir()
    (into / "modules").symlink_to(canaries)
    said = {"vmlinuz": 1, "modules/x.ko": 1}
    archive = manifest(said, kind="kernel") + entry(b"modules/x.ko", b"x") + entry(b"vmlinuz", b"x") + END
    found = at(tmp_path / "bundle.tar.zst", packed(archive))
    fd = os.open(found.place, os.O_RDONLY)
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        bundle.unpack(fd, into, "kernel", limits=SMALL)
    os.close(fd)


def test_a_cancelled_unpacking_leaves_the_bundle_only(tmp_path: Path) -> None:
    """What was fetched and found right is there for the next try; the half of an image is not."""
    found = at(tmp_path / "bundle.tar.zst", packed(GOOD))
    said: list[str] = []
    with pytest.raises(Cancelled):
        install(tmp_path, found, progress=said.append, cancelled=lambda: bool(said))
    assert left(tmp_path / "cache") == [f"bundles/sha256/{found.sha256}"]
    (tmp_path / "bundle.tar.zst").unlink()
    assert base.path_of(install(tmp_path, found)).read_bytes() == CONTENT


# -- over HTTP ------------------------------------------------------------------------------

LARGE = CONTENT + os.urandom(600_000)
WEB = packed(manifest({ROOT: len(LARGE)}) + entry(ROOT.encode(), LARGE) + END)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as found:
        found.files["/b.tar.zst"] = WEB
        yield found


def on(site: Site, path: str = "/b.tar.zst", **more: str) -> Bundle:
    sha256 = hashlib.sha256(WEB).hexdigest()
    return Bundle(place=site.address + path, sha256=sha256, size=len(WEB), **more)


def test_a_bundle_is_fetched_and_unpacked(tmp_path: Path, site: Site) -> None:
    """It comes in one request, and is gone when the image is there."""
    image = install(tmp_path, on(site))
    assert base.path_of(image).read_bytes() == LARGE
    assert site.sent == len(WEB)
    assert not any(name.startswith("bundles") for name in left(tmp_path / "cache"))


def test_what_came_is_not_asked_for_again(tmp_path: Path, site: Site) -> None:
    """A connection that breaks every 100,000 bytes costs requests, and no byte twice."""
    site.cut_after = 100_000
    assert base.path_of(install(tmp_path, on(site))).read_bytes() == LARGE
    assert site.sent == len(WEB)
    assert len(site.asked) == -(-len(WEB) // 100_000)


def test_a_cancelled_download_goes_on_where_it_was(tmp_path: Path, site: Site) -> None:
    """Cancelling ends it at once, though the server is silent; the next try asks for the rest only."""
    site.stall_after = 200_000
    began = time.monotonic()
    with pytest.raises(Cancelled):
        install(tmp_path, on(site), cancelled=site.stalled.is_set)
    assert time.monotonic() - began < 5
    site.stall_after, site.gone = None, threading.Event()
    install(tmp_path, on(site))
    assert site.asked[-1][1] == "bytes=200000-"


def test_a_server_without_ranges_is_asked_for_all(tmp_path: Path, site: Site) -> None:
    """What it sends from the beginning is not put behind what is here."""
    site.stall_after = 200_000
    with pytest.raises(Cancelled):
        install(tmp_path, on(site), cancelled=site.stalled.is_set)
    site.stall_after, site.ranges = None, False
    assert base.path_of(install(tmp_path, on(site))).read_bytes() == LARGE


def test_a_silent_server_is_not_waited_for(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a time without a byte it is an error, and what came stays."""
    monkeypatch.setattr(download, "INACTIVITY_S", 0.5)
    site.stall_after = 200_000
    with pytest.raises(DownloadFailed, match="next to nothing"):
        install(tmp_path, on(site))
    assert left(tmp_path / "cache") == [f"bundles/sha256/{on(site).sha256}.part"]


def refusals() -> dict[str, tuple[Callable[[Site], Bundle], str]]:
    def redirected(to: str) -> Callable[[Site], Bundle]:
        def prepare(site: Site) -> Bundle:
            site.redirects["/r"] = to
            return on(site, "/r")

        return prepare

    def told(**how: object) -> Callable[[Site], Bundle]:
        def prepare(site: Site) -> Bundle:
            for key, value in how.items():
                setattr(site, key, value)
            return on(site)

        return prepare

    def other(site: Site) -> Bundle:
        site.files["/b.tar.zst"] = WEB[:-1] + b"!"
        return on(site)

    return {
        "another content": (other, "something else"),
        "another length": (told(told_length=len(WEB) + 1), "bytes, not"),
        "no such file": (lambda site: on(site, "/none"), "answers 404"),
        "a redirect in circles": (redirected("/r"), "redirects more than"),
        "a redirect to a file": (redirected("file:///etc/passwd"), "not an http|is none"),
        "a redirect to nowhere": (redirected("http://[::1"), "is none|not an http"),
        "a redirect with a password": (redirected("http://me:secret@127.0.0.1:1/"), "name or password"),
        "a catalog from outside": (lambda site: on(site, origin="http://1.1.1.1/c.toml"), "inside"),
        "a catalog over TLS": (lambda site: on(site, origin="https://1.1.1.1/c.toml"), "not encrypted"),
    }


@pytest.mark.parametrize("what", refusals())
def test_what_a_server_must_not_do(tmp_path: Path, site: Site, what: str) -> None:
    """This answer is refused in one sentence, and nothing of it stays."""
    prepare, reason = refusals()[what]
    with pytest.raises((InvalidImage, DownloadFailed, InvalidRequest), match=reason):
        install(tmp_path, prepare(site))
    assert left(tmp_path / "cache") == []


def test_the_server_of_an_unreachable_place_is_named(tmp_path: Path, site: Site) -> None:
    """A port where nobody listens is an error that says which host did not answer."""
    nowhere = Bundle(place="http://127.0.0.1:1/b.tar.zst", sha256="0" * 64, size=7)
    with pytest.raises(DownloadFailed, match=r"127\.0\.0\.1"):
        install(tmp_path, nowhere)
    assert left(tmp_path / "cache") == []


def test_a_pull_in_flight_survives_pruning(tmp_path: Path, site: Site) -> None:
    """While a bundle comes in, the cache can be pruned, and the download goes on to its end."""
    site.stall_after = 200_000
    pruned: list[cache.Pruned] = []

    def look() -> bool:
        if site.stalled.is_set() and not pruned:
            pruned.append(cache.prune(tmp_path / "cache", frozenset()))
            site.stall_after = None
            site.gone.set()
        return False

    image = install(tmp_path, on(site), cancelled=look)
    assert pruned[0].busy
    assert pruned[0].partial == 0
    assert base.path_of(image).read_bytes() == LARGE
    assert site.sent == len(WEB)
