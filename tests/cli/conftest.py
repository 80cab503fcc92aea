from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.fake_daemon import FakeDaemon

Banger = Callable[..., "subprocess.CompletedProcess[str]"]
ARGV = [sys.executable, "-m", "banger_cli.main"]


class Terminal:
    """A terminal with a command on it, as a person would have."""

    def __init__(self, argv: list[str]):
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (33, 99))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.unread = b""
        self.child = subprocess.Popen(["setsid", "--ctty", *argv], stdin=slave, stdout=slave, stderr=slave)

    def expect(self, text: str) -> str:
        """Read until `text` has been shown; what comes after it is left for the next time."""
        deadline = time.monotonic() + 20
        while (found := self.unread.find(text.encode())) < 0:
            ready, _, _ = select.select([self.master], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} is not in {self.unread!r}"
            self.unread += os.read(self.master, 4096)
        end = found + len(text.encode())
        shown, self.unread = self.unread[:end], self.unread[end:]
        return shown.decode()

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        """Wait for the command's end; the terminal must be as it was before."""
        code = self.child.wait(20)
        assert termios.tcgetattr(self.slave) == self.before
        return code


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a home of our own, with a path short enough for sockets; gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="cli-"))
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path / "run"))
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(root / "cli")]))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def daemon(home: Path) -> Iterator[FakeDaemon]:
    fake = FakeDaemon(home / "run" / "banger" / "daemon.sock")
    yield fake
    fake.close()


@pytest.fixture
def banger(home: Path) -> Banger:
    """Run the real command line as a process, no terminal; standard input is empty by default."""

    def run(*words: str, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*ARGV, *words], input=stdin, capture_output=True, text=True, timeout=60, check=False, cwd=cwd
        )

    return run


@pytest.fixture
def terminals(daemon: FakeDaemon) -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for each in opened:
        if each.child.poll() is None:
            each.child.kill()
            each.child.wait()
        os.close(each.master)
        os.close(each.slave)
