"""`ssh NAME.vm` with the real ssh client, and ~/.ssh/config as it was after it all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.network import user
from banger.testing.home import Home

BUSYBOX = "/run/banger/bin/busybox"
USERS = b"# mine\n\nHost *\n    ServerAliveInterval 7\r\n    IdentityFile ~/.ssh/other\xff"
"""A user's file: a carriage return, a byte that is not UTF-8, no newline at its end."""


class Person:
    """A user with a home directory of their own, and the ssh client reading its configuration."""

    def __init__(self, home: Home):
        self.home = home
        self.directory = home.path / "person"
        self.directory.mkdir()
        # Images and kernels stay where they are.
        home.environ |= {"HOME": str(self.directory), "XDG_CACHE_HOME": str(home.dirs.cache.parent)}

    @property
    def config(self) -> Path:
        return self.directory / ".ssh" / "config"

    def write(self, content: bytes, mode: int = 0o640) -> None:
        self.config.parent.mkdir(mode=0o700, exist_ok=True)
        self.config.write_bytes(content)
        self.config.chmod(mode)

    def argv(self, *words: str, program: str = "ssh") -> list[str]:
        """Give the command; ssh itself looks for the home directory in passwd(5), so it is told."""
        return [program, "-F", str(self.config), "-o", "BatchMode=yes", *words]

    def run(self, *words: str, program: str = "ssh") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*words, program=program),
            env=self.home.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def person() -> Iterator[Person]:
    with Home() as home:
        yield Person(home)


def test_install_and_uninstall_leave_every_byte(person: Person) -> None:
    """The line comes first, once, however often it is installed; without it the file is what it was."""
    person.write(USERS)
    for _ in range(2):
        assert person.home.banger("ssh-config", "install").returncode == 0
        line, _, rest = person.config.read_bytes().partition(b"\n")
        assert line.startswith(b'Include "')
        assert rest == USERS
        assert person.config.stat().st_mode & 0o777 == 0o640
    assert person.home.json("ssh-config", "show")["installed"] is True
    assert person.home.banger("ssh-config", "uninstall").returncode == 0
    assert person.config.read_bytes() == USERS
    assert person.home.json("ssh-config", "show")["installed"] is False
    assert not (person.home.dirs.state / "ssh_config").exists()


@pytest.mark.parametrize("existing", [None, "directory", "empty"])
def test_uninstall_leaves_nothing_that_was_not_there(person: Person, existing: str | None) -> None:
    """A file or directory that was made for the line goes with it; an empty one that was there stays."""
    if existing == "empty":
        person.write(b"")
    elif existing == "directory":
        person.config.parent.mkdir(mode=0o700)
    before = sorted(path.name for path in person.directory.rglob("*"))
    for _ in range(2):
        assert person.home.banger("ssh-config", "install").returncode == 0
    assert person.home.banger("ssh-config", "uninstall").returncode == 0
    assert sorted(path.name for path in person.directory.rglob("*")) == before


def test_what_others_wrote_meanwhile_stays(person: Person) -> None:
    """Lines that were added around ours after it was installed are there after it is gone."""
    assert person.home.banger("ssh-config", "install").returncode == 0
    person.config.write_bytes(b"# before\n" + person.config.read_bytes() + b"# after\n")
    assert person.home.banger("ssh-config", "uninstall").returncode == 0
    assert person.config.read_bytes() == b"# before\n# after\n"


@pytest.mark.parametrize("kind", ["link", "read-only", "directory", "two names"])
def test_files_of_another_kind_are_left_alone(person: Person, kind: str) -> None:
    """A link, a read-only file, a directory or a file with two names is refused, and what to do is said."""
    person.write(USERS, 0o400 if kind == "read-only" else 0o600)
    other = person.directory / "dotfiles"
    if kind == "link":
        person.config.rename(other)
        person.config.symlink_to(other)
    elif kind == "two names":
        other.hardlink_to(person.config)
    elif kind == "directory":
        person.config.unlink()
        person.config.mkdir()
    before = person.config.lstat()
    done = person.home.banger("ssh-config", "install")
    assert done.returncode == 4
    assert "hint: Put this at its top yourself: Include " in done.stderr
    after = person.config.lstat()
    assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (
        before.st_ino,
        before.st_mtime_ns,
        before.st_mode,
    )


def test_names_never_reach_a_shell(person: Person) -> None:
    """A host name with a quote or a command in it runs nothing and starts nothing."""
    assert person.home.banger("ssh-config", "install").returncode == 0
    for name in ("$(touch pwned).vm", "'; touch pwned; '.vm", "`touch pwned`.vm"):
        assert person.run(name, "true").returncode == 255
    assert not Path("pwned").exists()
    assert person.run("web.vm", "true").returncode == 255
    assert person.home.daemon() is None


@pytest.mark.guest
def test_ssh_scp_and_forwards(person: Person, tmp_path: Path) -> None:
    """`ssh NAME.vm`, scp both ways, -T with a script, -L and -D work with the real client, keys apart."""
    home = person.home
    home.configure("memory_mib = 256\n")
    person.write(USERS.rstrip(b"\xff"))
    assert home.banger("vm", "create", "web", "--wait").returncode == 0
    assert home.banger("ssh-config", "install").returncode == 0
    # -T with a script on standard input is what an editor's remote mode begins with.
    done = subprocess.run(
        person.argv("-T", "web.vm", "sh"),
        env=home.environ,
        input="hostname; exit 42\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("web\n", 42), done.stderr

    sent, back = tmp_path / "sent", tmp_path / "back"
    sent.write_bytes(os.urandom(100_000))
    assert "scp" in person.run("web.vm", "command -v scp").stdout, "the image's own scp"
    for source, target in ((str(sent), "web.vm:over"), ("web.vm:over", str(back))):
        copied = person.run("-O", source, target, program="scp")
        assert copied.returncode == 0, copied.stderr
    assert back.read_bytes() == sent.read_bytes()

    assert not (person.config.parent / "known_hosts").exists(), "the user's file is not touched"
    served = f"mkdir -p /srv/www; echo inside > /srv/www/page; {BUSYBOX} httpd -p 8000 -h /srv/www"
    assert person.run("web.vm", served).returncode == 0
    forwards(person)
    for again in ("delete", "create"):
        assert home.banger("vm", again, "web").returncode == 0
    assert home.banger("vm", "start", "web").returncode == 0
    assert person.run("web.vm", "hostname").stdout == "web\n", "another VM of that name has another key"


def forwards(person: Person) -> None:
    local, socks = (user.pick_port(set()) for _ in range(2))
    words = person.argv("-N", "-L", f"{local}:127.0.0.1:8000", "-D", str(socks), "web.vm")
    with subprocess.Popen(words, env=person.home.environ, stdin=subprocess.DEVNULL) as tunnel:
        try:
            assert fetched(local) == b"inside\n"
            through = ["curl", "-sS", "--socks5", f"127.0.0.1:{socks}", "http://127.0.0.1:8000/page"]
            assert subprocess.run(through, capture_output=True, timeout=20, check=True).stdout == b"inside\n"
        finally:
            tunnel.terminate()


def fetched(port: int) -> bytes:
    """Fetch a page as soon as the tunnel is there."""
    words = ["curl", "-sS", "--retry", "100", "--retry-connrefused", "--retry-delay", "1", "--max-time", "20"]
    url = f"http://127.0.0.1:{port}/page"
    return subprocess.run([*words, url], capture_output=True, timeout=30, check=True).stdout
