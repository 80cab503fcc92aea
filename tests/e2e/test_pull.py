"""Images from a real registry, to the guest's first answer."""

from __future__ import annotations

import functools
import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.images import base, debian
from banger.testing.home import Home
from banger.testing.registry import Registry
from tests.guest import roots
from tests.guest.conftest import NAME
from tests.guest.test_ownership import archive_of, differing, expected, odd_members, seen

pytestmark = pytest.mark.guest


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home() as home:
        home.configure("memory_mib = 256\ngit_identity = false\n")  # what is compared is the image's
        yield home


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry") as registry:
        yield registry


def inside(home: Home, vm: str, script: str) -> bytes:
    """Run a script in a VM; give its output as it is."""
    argv = home.argv("vm", "exec", vm, "--", "sh", "-c", script)
    return subprocess.run(argv, env=home.environ, capture_output=True, check=True, timeout=120).stdout


def without_disks(tar: Path, out: Path) -> bytes:
    """Copy an archive without its block devices, which no image from a registry may have."""
    with tarfile.open(tar) as old, tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as new:
        for member in old:
            if not member.isblk():
                new.addfile(member, old.extractfile(member) if member.isreg() else None)
    return out.read_bytes()


def home_members() -> list[tarfile.TarInfo]:
    """Give what /root is to have: everything that is odd, under names that no shell likes."""
    members = [member for member in odd_members() if not member.isblk()]
    for member in members:
        member.name = member.name.replace("srv/", "root/", 1)
        member.linkname = member.linkname.replace("srv/", "root/", 1)
    return members


def in_home(script: str) -> str:
    """Turn a script that lists a guest's root into one that lists its /root."""
    script = script.replace("find / -xdev -printf '", "find /root -xdev -mindepth 1 -printf 'root/")
    return script.replace('os.walk(b"/"', 'os.walk(b"/root"')


def upper_layer() -> bytes:
    """Make a second layer: a file replaced, one taken away, a directory emptied, one more, an odd /root."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content, mode in (
            ("etc/issue", b"replaced\n", 0o600),
            ("etc/.wh.issue.net", b"", 0o644),
            ("usr/share/misc/.wh..wh..opq", b"", 0o644),
            ("usr/share/misc/only", b"new\n", 0o4755),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.uid = len(content), mode, 33
            tar.addfile(member, io.BytesIO(content))
        for member in home_members():
            tar.addfile(member)
    return out.getvalue()


def test_a_pulled_debian_is_what_its_layers_say(home: Home, registry: Registry, tmp_path: Path) -> None:
    """Owner, mode, size, link, device, attributes of every entry are as in the layers; also in /root."""
    default = base.path_of(debian.build(debian.RECIPES[NAME], home.dirs.cache))
    whole = archive_of(default, tmp_path / "whole.tar")
    lower = without_disks(whole, tmp_path / "lower.tar")
    registry.image("team/debian", "12", lower, upper_layer(), compress=True)
    pulled = home.banger("image", "pull", f"{registry.host}/team/debian:12", "--name", "deb")
    assert pulled.returncode == 0, pulled.stderr
    assert home.banger("vm", "create", "web", "--image", "deb", "--wait").returncode == 0
    wanted = expected(tmp_path / "lower.tar")
    for path in [path for path in wanted if path.startswith(b"usr/share/misc/")]:
        del wanted[path]
    del wanted[b"etc/issue.net"]
    wanted[b"etc/issue"] = (b"f", 0o600, 33, 0, 9, b"", (0, 0), {})
    wanted[b"usr/share/misc/only"] = (b"f", 0o4755, 33, 0, 4, b"", (0, 0), {})
    assert len(wanted) > 8000
    assert differing(wanted, seen(functools.partial(inside, home, "web"))) == {}
    (tmp_path / "upper.tar").write_bytes(upper_layer())
    wanted = {path: what for path, what in expected(tmp_path / "upper.tar").items() if path[:5] == b"root/"}
    found = seen(lambda script: inside(home, "web", in_home(script)))
    given = {b"root/.bashrc", b"root/.profile", b"root/.ssh", b"root/.ssh/authorized_keys"}
    assert set(found) - set(wanted) == given
    assert {path: found[path] for path in wanted} == wanted
    shown = home.json("image", "show", "deb")["image"]
    assert shown["details"]["manifest"].startswith("sha256:")
    assert shown["op"] == home.json("ops", "list")["ops"][-1]["id"]
    assert home.banger("vm", "delete", "web").returncode == 0
    assert home.leftovers() == []


def test_an_image_that_is_nothing_but_busybox_answers(home: Home, registry: Registry, tmp_path: Path) -> None:
    """Asked for by its reference, it is pulled, boots and runs a command; the second time it is here."""
    tree: roots.Tree = {
        "bin/busybox": roots.BUSYBOX.read_bytes(),
        "bin/sh": "->busybox",
        "bin/uname": "->busybox",
    }
    layer = roots.archive(tmp_path / "tiny.tar", tree).read_bytes()
    registry.image("tiny", "1", layer, compress=True)
    for _ in range(2):
        ran = home.banger("vm", "run", "--rm", "--image", f"{registry.host}/tiny:1", "--", "uname", "-s")
        assert (ran.returncode, ran.stdout) == (0, "Linux\n"), ran.stderr
    kinds = [op["kind"] for op in home.json("ops", "list")["ops"]]
    assert kinds.count("image.pull") == 1
    assert home.leftovers() == []


def test_a_pull_that_cannot_be_says_so_and_leaves_nothing(
    home: Home, registry: Registry, tmp_path: Path
) -> None:
    """Unknown, unreachable, not a reference, refused by its content: a sentence, a hint where one helps."""
    registry.image("escape", "1", roots.archive(tmp_path / "bad.tar", {"../evil": "x"}).read_bytes())
    for reference, code, words in (
        (f"{registry.host}/nope:1", 6, "does not have"),
        ("127.0.0.1:1/nope:1", 6, "cannot be reached"),
        ("no/registry", 2, "which registry"),
        (f"{registry.host}/UPPER:1", 2, "not the name of an image"),
        (f"{registry.host}/escape:1", 6, "refused"),
    ):
        refused = home.banger("image", "pull", reference)
        assert (refused.returncode, words in refused.stderr) == (code, True), refused.stderr
        assert "Traceback" not in refused.stderr
    assert home.json("image", "list")["images"][0]["name"] == "debian-12"
    assert not list((home.dirs.cache / "images").glob(".building-*"))
    assert home.leftovers() == []
