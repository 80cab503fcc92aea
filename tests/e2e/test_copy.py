"""`vm cp` on a real guest: what is copied is equal, and what is not whole does not look whole."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from banger.testing.home import Home

pytestmark = pytest.mark.guest

MIB = 1 << 20
LONG_AGO = 1_000_000_000


def tree(path: Path) -> dict[bytes, tuple[int, int, bytes]]:
    """Tell what is below a path: modes, times in seconds, contents or targets, by name."""
    found = {}
    for above, directories, files in os.walk(os.fsencode(path)):
        for name in (*directories, *files):
            whole = Path(os.fsdecode(above), os.fsdecode(name))
            known = whole.lstat()
            content = b""
            if whole.is_symlink():
                content = os.fsencode(whole.readlink())
            elif whole.is_file():
                content = whole.read_bytes()
            time = 0 if whole.is_symlink() else int(known.st_mtime)  # busybox sets none of a link
            about = (known.st_mode, time, content)
            found[os.fsencode(whole.relative_to(path))] = about
    return found


@pytest.fixture
def hard(tmp_path: Path) -> Path:
    """A directory with all that makes copying hard."""
    top = tmp_path / "hard tree"
    (top / "empty").mkdir(parents=True)
    (top / "deep" / ("n" * 200) / ("m" * 200)).mkdir(parents=True)
    (top / "deep" / ("n" * 200) / ("m" * 200) / "file").write_text("far down")
    Path(os.fsdecode(os.fsencode(top) + b"/\xff\xfe not utf-8")).write_bytes(b"\0\1\2")
    (top / "line\nend").write_text("x")
    (top / "-n 'quoted\" $HOME").write_text("y")
    (top / "run").write_text("#!/bin/sh\n")
    (top / "run").chmod(0o751)
    (top / "outside").symlink_to("/etc/passwd")
    (top / "dangling").symlink_to("../no\nwhere")
    for path in sorted(top.rglob("*"), reverse=True):
        if not path.is_symlink():
            os.utime(path, (LONG_AGO, LONG_AGO))
    return top


def test_a_tree_there_and_back(home: Home, web: str, hard: Path, tmp_path: Path) -> None:
    """A directory copied into a VM and out again is equal: names, modes, times, links."""
    sent = home.banger("vm", "cp", str(hard), f"{web}:")
    assert sent.returncode == 0, sent.stderr
    assert home.banger("vm", "cp", f"{web}:hard tree", str(tmp_path / "back")).returncode == 0
    assert tree(tmp_path / "back") == tree(hard)
    (hard / "new").write_text("added")
    assert home.banger("vm", "cp", str(hard), f"{web}:").returncode == 0
    assert home.banger("vm", "cp", f"{web}:hard tree/.", str(tmp_path / "again")).returncode == 0
    assert set(tree(tmp_path / "again")) == set(tree(hard))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_there_and_back(home: Home, web: str, tmp_path: Path) -> None:
    """A file keeps content, mode and time both ways, and `-` is standard input and output."""
    source = tmp_path / "it's a file"
    source.write_bytes(b"\0content\xff")
    source.chmod(0o640)
    os.utime(source, (LONG_AGO, LONG_AGO))
    assert home.banger("vm", "cp", str(source), f"{web}:/srv/other").returncode == 0
    assert home.banger("vm", "cp", f"{web}:/srv/other", str(tmp_path / "back")).returncode == 0
    back = tmp_path / "back"
    assert back.read_bytes() == source.read_bytes()
    assert (stat.S_IMODE(back.stat().st_mode), int(back.stat().st_mtime)) == (0o640, LONG_AGO)
    assert home.banger("vm", "cp", "-", f"{web}:in", input="by pipe").returncode == 0
    assert home.banger("vm", "cp", f"{web}:in", "-").stdout == "by pipe"


PARTS = "find /root -maxdepth 1 -name '.banger-*' -type f -size +4096k"
"""Of large files: nothing else that is on its way is that large."""


def cut(client: subprocess.Popen[bytes], has_come: Callable[[], bool]) -> None:
    """Kill who sends a large file when a part of it has come; it stands still while that is looked at."""
    while True:
        client.send_signal(signal.SIGCONT)
        time.sleep(0.03)
        client.send_signal(signal.SIGSTOP)
        if has_come():
            break
        assert client.poll() is None, "it was too fast to be cut"
    client.kill()


def test_a_cut_copy_goes_on(home: Home, web: str, tmp_path: Path) -> None:
    """A large file that is cut half-way stands nowhere; the same command goes on, both ways."""
    source = tmp_path / "large"
    source.write_bytes(random.Random(5).randbytes(40 * MIB))
    listing = ("vm", "exec", web, "--", "sh", "-c", f"{PARTS} | xargs -r stat -c %s; cd; ls large")
    with home.start("vm", "cp", str(source), f"{web}:") as client:
        cut(client, lambda: bool(home.banger(*listing).stdout.strip()))
    left = home.banger(*listing)
    assert 0 < int(left.stdout) < 40 * MIB, "a part, and no file named large"
    done = home.banger("vm", "cp", str(source), f"{web}:")
    assert done.returncode == 0, done.stderr
    assert home.banger(*listing).stdout == "large\n"
    with home.start("vm", "cp", f"{web}:large", str(tmp_path / "back")) as client:
        while not (parts := list(tmp_path.glob(".banger-*"))) or parts[0].stat().st_size < 4 * MIB:
            assert client.poll() is None, "it was too fast to be cut"
        client.kill()
    assert not (tmp_path / "back").exists()
    assert home.banger("vm", "cp", f"{web}:large", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert list(tmp_path.glob(".banger-*")) == []


def test_a_part_that_is_not_ours_is_not_continued(home: Home, web: str, tmp_path: Path) -> None:
    """A part whose end differs from the file is begun anew, so what arrives is the file."""
    source = tmp_path / "other"
    source.write_bytes(random.Random(6).randbytes(20 * MIB))
    find = ("vm", "exec", web, "--", "sh", "-c", f"{PARTS} | grep .")
    with home.start("vm", "cp", str(source), f"{web}:") as client:
        cut(client, lambda: home.banger(*find).returncode == 0)
    part = home.banger(*find).stdout.strip()
    assert part
    spoil = f"head -c 3000000 /dev/zero > {part}"
    assert home.banger("vm", "exec", web, "--", "sh", "-c", spoil).returncode == 0
    assert home.banger("vm", "cp", str(source), f"{web}:").returncode == 0
    assert home.banger("vm", "cp", f"{web}:other", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_full_disk_leaves_nothing(home: Home, web: str, tmp_path: Path) -> None:
    """When the guest's disk is full half-way, the copy fails with its word for it and leaves nothing."""
    small = "mkdir -p /mnt/small; mount -t tmpfs -o size=4m small /mnt/small"
    assert home.banger("vm", "exec", web, "--", "sh", "-c", small).returncode == 0
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "big").write_bytes(bytes(8 * MIB))
    for source in ("in", "in/big"):
        done = home.banger("vm", "cp", str(tmp_path / source), f"{web}:/mnt/small")
        assert (done.returncode, "No space left on device" in done.stderr) == (1, True), done.stderr
    assert home.banger("vm", "exec", web, "--", "ls", "-A", "/mnt/small").stdout == ""


def test_nonsense_is_refused(home: Home, web: str, tmp_path: Path) -> None:
    """Two VMs, no VM, and paths that are not there are refused in a sentence with a hint or a name."""
    for words, code, said in (
        ((f"{web}:a", f"{web}:b"), 2, "Both sides are in VMs"),
        (("a", "b"), 2, "Neither side is in a VM"),
        ((f"{web}:nothing", str(tmp_path)), 3, "There is no nothing in the guest"),
        ((str(tmp_path / "nothing"), f"{web}:"), 3, "There is no "),
        ((str(tmp_path), f"{web}:/no/where/"), 1, "/no/where/ is no directory"),
        ((f"{web}:/dev/null", str(tmp_path)), 2, "neither a file nor a directory"),
    ):
        done = home.banger("vm", "cp", *words)
        assert (done.returncode, done.stdout) == (code, "")
        assert said in done.stderr


def test_a_hostile_guest_writes_nowhere_else(home: Home, web: str, tmp_path: Path) -> None:
    """Names that lead out, and links to write through, are refused: nothing lies anywhere."""
    evil = """
import io, sys, tarfile
out = tarfile.open(fileobj=sys.stdout.buffer, mode="w|")
def add(name, **more):
    member = tarfile.TarInfo(name)
    for key, value in more.items(): setattr(member, key, value)
    member.size = 4 if member.isreg() else 0
    out.addfile(member, io.BytesIO(b"evil") if member.isreg() else None)
"""
    outside = tmp_path / "outside"
    outside.mkdir()
    for number, members in enumerate(
        (
            'add("../outside/evil")',
            f'add("link", type=tarfile.SYMTYPE, linkname={str(outside)!r}); add("link/evil")',
            'add("hard", type=tarfile.LNKTYPE, linkname="../outside/evil")',
            f'add("a", type=tarfile.SYMTYPE, linkname={str(outside / "evil")!r}); add("a")',
        )
    ):
        archive = tmp_path / f"evil{number}.tar"
        with archive.open("wb") as file:
            subprocess.run([sys.executable, "-c", evil + members + "\nout.close()"], stdout=file, check=True)
        assert home.banger("vm", "cp", str(archive), f"{web}:/tmp/evil.tar").returncode == 0
        # The guest's own tar, as `vm cp` calls it, is replaced by one that gives this archive.
        assert home.banger("vm", "exec", web, "--", "sh", "-c", REPLACE).returncode == 0
        copied = home.banger("vm", "cp", f"{web}:/srv", str(tmp_path / "into"))
        assert home.banger("vm", "exec", web, "--", "sh", "-c", RESTORE).returncode == 0
        assert copied.returncode in (1, 6), copied.stderr
        assert any(said in copied.stderr for said in REFUSED), copied.stderr
        assert not (tmp_path / "into").exists()
        assert list(outside.iterdir()) == []


REFUSED = ("leads upwards", "Not a directory", "Too many levels of symbolic links", "File exists")

# What a busybox does depends on its name, so the one that is kept has the same.
REPLACE = """
mkdir -p /run/kept; cp /run/banger/bin/busybox /run/kept/busybox; cd /run/banger/bin
cat > busybox.new <<'END'
#!/run/kept/busybox sh
case "$*" in *"copy give-tree /srv") exec cat /tmp/evil.tar ;; esac
exec /run/kept/busybox "$@"
END
chmod 755 busybox.new; mv busybox.new busybox
"""
RESTORE = (
    "cp /run/kept/busybox /run/banger/bin/busybox.new; mv /run/banger/bin/busybox.new /run/banger/bin/busybox"
)
