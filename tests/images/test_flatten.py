"""Layers become one archive: what a sane image comes to, and what is left when it ends early."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from banger import proc
from banger.errors import Cancelled, DiskFull, InvalidImage
from banger.images.layers.flatten import Flattened, Limits, flatten
from banger.images.remote.oci import Layer
from tests.images.listing import listing
from tests.images.tarbytes import END, binary, d, device, f, h, head, layer_of, pax, record, s


def put(place: Path, *tars: bytes) -> list[Layer]:
    return [layer_of(place / f"layer{number}", tar + END) for number, tar in enumerate(tars)]


def members(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path, errors="surrogateescape") as tar:
        return {member.name: member for member in tar}


def test_metadata_reaches_the_archive(tmp_path: Path) -> None:
    """Owners, modes with their set-id and sticky bits, times, allowed attributes: as the layers have them."""
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    layers = put(
        tmp_path,
        d(b"./", mode=b"0000711", uid=b"0000005")
        + d(b"tmp", mode=b"0001777")
        + pax(("SCHILY.xattr.security.capability", capability), ("SCHILY.xattr.user.a=b", b"1\n\0=2"))
        + f(b"ping", mode=b"0006755", uid=binary(3_000_000, 8), gid=b"0000007", mtime=b"14524770000")
        + pax(("mtime", b"1700000000.987654321"), ("uid", b"4294967294"))
        + f(b"late"),
    )
    flatten(layers, tmp_path / "out.tar")
    found = members(tmp_path / "out.tar")
    ping, late = found["ping"], found["late"]
    assert [(found[name].mode, found[name].uid) for name in (".", "tmp")] == [(0o711, 5), (0o1777, 0)]
    assert (ping.mode, ping.uid, ping.gid, ping.mtime) == (0o6755, 3_000_000, 7, 0o14524770000)
    assert (late.uid, late.mtime, set(late.pax_headers)) == (4294967294, 1_700_000_000, {"uid"})
    raw = (tmp_path / "out.tar").read_bytes()
    assert record("SCHILY.xattr.security.capability", capability) in raw
    assert record("SCHILY.xattr.user.a=b", b"1\n\0=2") in raw


def test_attributes_that_are_left_out_are_told(tmp_path: Path) -> None:
    """SELinux labels, ACLs and trusted attributes do not reach the guest; each kind is told once, escaped."""
    labelled = pax(("SCHILY.xattr.security.selinux", b"x"), ("SCHILY.xattr.trusted.\x1b]0;", b"y"))
    flattened = flatten(put(tmp_path, labelled + f(b"a") + labelled + f(b"b")), tmp_path / "out.tar")
    assert flattened.warnings == (
        "The attribute 'security.selinux' of 2 files was dropped.",
        "The attribute 'trusted.\\x1b]0;' of 2 files was dropped.",
    )
    assert b"SCHILY" not in (tmp_path / "out.tar").read_bytes()


def test_warnings_are_bounded(tmp_path: Path) -> None:
    """An image cannot make us tell more than a screen of attributes."""
    tar = b"".join(pax((f"SCHILY.xattr.x{number}", b"")) + f(b"%d" % number) for number in range(100))
    assert len(flatten(put(tmp_path, tar), tmp_path / "out.tar").warnings) == 20


def test_a_directory_keeps_what_is_in_it(tmp_path: Path) -> None:
    """An upper layer's directory has new metadata; one that is only passed through keeps the old."""
    lower = d(b"a", mode=b"0000700") + f(b"a/x") + d(b"b", mode=b"0000700")
    upper = d(b"a", mode=b"0000750") + f(b"b/y")
    flatten(put(tmp_path, lower, upper), tmp_path / "out.tar")
    found = members(tmp_path / "out.tar")
    assert {name: found[name].mode for name in ("a", "b")} == {"a": 0o750, "b": 0o700}
    assert {"a/x", "b/y"} <= found.keys()


@pytest.mark.parametrize("marker", [b"a/.wh..wh..opq", b".wh.a"])
@pytest.mark.parametrize("first", [True, False])
def test_where_a_marker_stands_does_not_matter(tmp_path: Path, marker: bytes, *, first: bool) -> None:
    """Before or after what its layer has, a marker hides the lower layers, their metadata with them."""
    lower = d(b"a", mode=b"0000700") + d(b"a/b", mode=b"0000711") + f(b"a/b/old")
    parts = [f(marker, b""), f(b"a/b/new")]
    flatten(put(tmp_path, lower, b"".join(parts if first else parts[::-1])), tmp_path / "out.tar")
    found = members(tmp_path / "out.tar")
    assert sorted(found) == [".", "a", "a/b", "a/b/new"]
    assert found["a/b"].mode == 0o755
    assert found["a"].mode == (0o755 if marker == b".wh.a" else 0o700)


def test_the_archive_is_in_order_and_the_same_each_time(tmp_path: Path) -> None:
    """Parents come before children, names in order, whatever the order of the layers' entries."""
    forward = put(tmp_path, d(b"b") + f(b"b/1") + f(b"b/2") + s(b"a", b"b") + f(b"c"))
    (tmp_path / "other").mkdir()
    backward = put(tmp_path / "other", f(b"c") + s(b"a", b"b") + d(b"b") + f(b"b/2") + f(b"b/1"))
    flatten(forward, tmp_path / "one.tar")
    flatten(backward, tmp_path / "two.tar")
    assert list(members(tmp_path / "one.tar")) == [".", "a", "b", "b/1", "b/2", "c"]
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


@pytest.mark.parametrize("packing", ["plain", "gzip", "zstd"])
def test_large_files_are_copied_whole(tmp_path: Path, packing: str) -> None:
    """Files of all sizes around those of our buffers come out byte by byte, however the layer is packed."""
    contents = {
        f"f{size}": random.Random(size).randbytes(size)
        for size in (0, 1, 511, 512, 513, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, (1 << 20) + 1, 3_000_000)
    }
    tar = b"".join(f(name.encode(), content) for name, content in contents.items()) + END
    packed = tar
    if packing != "plain":
        packed = subprocess.run([packing, "-c"], input=tar, stdout=subprocess.PIPE, check=True).stdout
    flattened = flatten([layer_of(tmp_path / "blob", tar, packed=packed)], tmp_path / "out.tar")
    assert listing(tmp_path / "out.tar") == {k: f"f {v.decode('latin-1')}" for k, v in contents.items()}
    assert flattened.size == (tmp_path / "out.tar").stat().st_size
    assert flattened.entries == len(contents) + 1


def test_other_readers_read_the_archive(tmp_path: Path) -> None:
    """GNU tar finds the same odd names, long ones, links and devices as we wrote."""
    long = b"/".join([b"n" * 200] * 5)
    tar = (
        f(b"-rf") + f(b"a\nb") + f(b"\xff\xfe") + f(long) + s(b"s", b"t" * 300) + h(b"zz", long)
        + device(b"null", b"3", 1, 3) + head(b"pipe", b"6") + f(b"big", uid=binary(4_000_000_000, 8))
    )  # fmt: skip
    flatten(put(tmp_path, tar), tmp_path / "out.tar")
    words = ["tar", "--numeric-owner", "--quoting-style=c", "-tvf", str(tmp_path / "out.tar")]
    shown = [line.split(None, 5) for line in proc.run(words).splitlines()]
    name = "/".join(["n" * 200] * 5)
    assert [line[5] for line in shown] == [
        '"./"', '"-rf"', '"a\\nb"', '"big"',
        *(f'"{name[: 201 * depth]}"' for depth in range(1, 5)),
        f'"{name}"', '"null"', '"pipe"', f'"s" -> "{"t" * 300}"', f'"zz" link to "{name}"', '"\\377\\376"',
    ]  # fmt: skip
    assert {line[5]: line[1] for line in shown}['"big"'] == "4000000000/0"


# Against another program


def random_layer(dice: random.Random) -> bytes:
    """Make a sane layer: each path once, its directories before it, links to files of the layer itself."""
    files: list[bytes] = []
    made: set[bytes] = set()
    tar = b""
    for _ in range(dice.randrange(4, 14)):
        parts = [dice.choice([b"a", b"b", b"c", b"d"]) for _ in range(dice.randrange(1, 4))]
        path = b"/".join(parts)
        above = [b"/".join(parts[:depth]) for depth in range(1, len(parts))]
        if path in made or any(one in files for one in above):
            continue
        for one in above:
            tar += d(one, mode=b"0000%o" % dice.choice([0o755, 0o700, 0o2775])) if one not in made else b""
            made.add(one)
        made.add(path)
        kind = dice.choice("fffdslwo")
        if kind == "l" and files and (target := dice.choice(files)):
            tar += h(path, target) if _is_file(tar, target) else f(path)
            files.append(path)
        elif kind in "fl":
            tar += f(
                path,
                b"%d" % dice.randrange(10**6) * dice.randrange(200),
                mode=b"0000%o" % dice.choice([0o644, 0o4755]),
            )
            files.append(path)
        elif kind == "s":
            tar += s(path, dice.choice([b"a", b"../b", b"/c/d", b"nowhere"]))
            files.append(path)
        elif kind == "w":
            tar += f(b"/".join([*above[-1:], b".wh." + parts[-1]]), b"")
            files.append(path)
        else:
            tar += d(path, mtime=b"%011o" % dice.randrange(10**9))
            tar += f(path + b"/.wh..wh..opq", b"") if kind == "o" else b""
    return tar


def _is_file(tar: bytes, path: bytes) -> bool:
    """Tell whether the layer so far holds a file of that path."""
    return any(
        tar[at : at + 100].rstrip(b"\0") == path and tar[at + 156 : at + 157] == b"0"
        for at in range(0, len(tar), 512)
    )


def oci_layout(place: Path, layers: list[Layer]) -> None:
    """Write an OCI image layout of these layers, tagged `t` (image-layout.md)."""
    blobs = place / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put_blob(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {
            "mediaType": f"application/vnd.oci.image.{media_type}",
            "digest": f"sha256:{digest}",
            "size": len(data),
        }

    def put_json(value: object, media_type: str) -> dict[str, object]:
        return put_blob(json.dumps(value).encode(), media_type)

    config = {
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    }  # fmt: skip
    manifest = {
        "schemaVersion": 2,
        "config": put_json(config, "config.v1+json"),
        "layers": [put_blob(layer.path.read_bytes(), "layer.v1.tar+gzip") for layer in layers],
    }
    tagged = {
        **put_json(manifest, "manifest.v1+json"),
        "annotations": {"org.opencontainers.image.ref.name": "t"},
    }
    (place / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [tagged]}))
    (place / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


Told = tuple[str, int, int, object, str]


def tree_of(root: Path) -> dict[str, Told]:
    """Tell of each path below a directory: type, mode, time, content, and the first name of its file."""
    found: dict[str, Told] = {}
    first: dict[int, str] = {}
    for path in sorted(root.rglob("*"), key=lambda path: path.relative_to(root).parts):
        about, name = path.lstat(), str(path.relative_to(root))
        kind = stat.filemode(about.st_mode)[0]
        content: object = path.readlink() if kind == "l" else path.read_bytes() if kind == "-" else None
        one = first.setdefault(about.st_ino, name)
        # Linux has no modes for links.
        found[name] = (
            kind,
            stat.S_IMODE(about.st_mode) if kind != "l" else 0,
            int(about.st_mtime),
            content,
            one,
        )
    return found


@pytest.mark.parametrize("seed", range(25))
def test_umoci_makes_the_same_tree(tmp_path: Path, seed: int) -> None:
    """What we merge and what umoci unpacks is the same, entry by entry: type, mode, time, content, links."""
    dice = random.Random(seed)
    layers = put(tmp_path, *(random_layer(dice) for _ in range(dice.randrange(2, 6))))
    oci_layout(tmp_path / "image", layers)
    proc.run(
        ["umoci", "unpack", "--rootless", "--image", f"{tmp_path / 'image'}:t", str(tmp_path / "theirs")]
    )
    flatten(layers, tmp_path / "out.tar")
    (tmp_path / "ours").mkdir()
    proc.run(["tar", "-xpf", str(tmp_path / "out.tar"), "-C", str(tmp_path / "ours")])
    ours, theirs = tree_of(tmp_path / "ours"), tree_of(tmp_path / "theirs/rootfs")
    assert ours == theirs
    assert ours


# Ends of all kinds


def endless(place: Path) -> list[Layer]:
    """A layer that takes many seconds: a million names, each different."""
    tar = b"".join(head(b"n%d" % number) for number in range(200_000))
    packed = subprocess.run(["gzip", "-1"], input=tar, stdout=subprocess.PIPE, check=True).stdout * 4
    return [layer_of(place / "blob", tar * 4 + END, packed=packed)]


def test_a_merge_is_cancelled(tmp_path: Path) -> None:
    """Cancellation ends the child within seconds and leaves nothing behind."""
    layers = endless(tmp_path)
    staging = tmp_path / "staging"
    staging.mkdir()
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        flatten(layers, staging / "root.tar", cancelled=lambda: any(staging.glob(".flatten-*/root.tar")))
    assert time.monotonic() - begun < 5
    assert list(staging.iterdir()) == []


def test_a_merge_has_a_deadline(tmp_path: Path) -> None:
    """An image that takes too long is refused as such."""
    layers = endless(tmp_path)
    staging = tmp_path / "staging"
    staging.mkdir()
    with pytest.raises(InvalidImage, match=r"within 0\.5 s"):
        flatten(layers, staging / "root.tar", limits=Limits(timeout_s=0.5))
    assert list(staging.iterdir()) == []


def test_a_killed_merge_leaves_no_process_and_is_swept(tmp_path: Path) -> None:
    """After kill -9 of the caller its child is gone, too, and the next merge removes what they left."""
    endless(tmp_path)
    staging = tmp_path / "staging"
    staging.mkdir()
    code = (
        "import sys; from pathlib import Path; from banger.images.layers.flatten import flatten\n"
        "from tests.images.tarbytes import layer_of\n"
        "here = Path(sys.argv[1])\n"
        "layer = layer_of(here / 'copy', b'', packed=(here / 'blob').read_bytes())\n"
        "flatten([layer], here / 'staging/root.tar')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path])
    _wait(lambda: any(staging.glob(".flatten-*/root.tar")))
    work = next(staging.glob(".flatten-*"))
    children = proc.find_by_environ(proc.MARK, str(work))
    parent.kill()
    parent.wait()
    assert children
    assert all(proc.wait_gone(child, 5) for child in children)
    assert work.exists()
    flatten(put(tmp_path, f(b"a")), staging / "root.tar")
    assert [path.name for path in staging.iterdir()] == ["root.tar"]


def test_two_merges_beside_each_other(tmp_path: Path) -> None:
    """Two merges with one staging directory do not see each other: neither sweeps what the other works on."""
    layers = put(tmp_path, b"".join(f(b"%d" % number) for number in range(5000)))
    made: dict[int, Flattened] = {}

    def merge(number: int) -> None:
        made[number] = flatten(layers, tmp_path / f"out{number}.tar")

    threads = [threading.Thread(target=merge, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0] == made[1] == made[2]
    assert len({(tmp_path / f"out{number}.tar").read_bytes() for number in range(3)}) == 1
    assert not list(tmp_path.glob(".flatten-*"))


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space left is the host's failure, not the image's; an earlier archive stays as it was."""
    full = _tiny_disk(tmp_path)
    if full is None:
        pytest.skip("Only root may mount a small file system.")
    try:
        (full / "root.tar").write_text("earlier")
        with pytest.raises(DiskFull):
            flatten(put(tmp_path, f(b"a", os.urandom(3_000_000))), full / "root.tar")
        assert [path.name for path in full.iterdir()] == ["root.tar"]
        assert (full / "root.tar").read_text() == "earlier"
    finally:
        proc.run(["umount", str(full)])


def _tiny_disk(place: Path) -> Path | None:
    """Mount a file system of 1 MiB, where one may."""
    tiny = place / "tiny"
    tiny.mkdir()
    with contextlib.suppress(Exception):
        proc.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tiny)])
        return tiny
    return None


def _wait(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)
