"""What the process that reads images can still do: nothing but use what it has open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from banger.images.layers import sandbox

needs_landlock = pytest.mark.skipif(not sandbox.landlock_version(), reason="The kernel has no Landlock.")


def run(code: str, held: Path) -> list[str]:
    """Run lines in a confined process; each is tried, and answers with its error's name or `done`."""
    program = (
        "import os, resource, socket, sys; from banger.images.layers import sandbox\n"
        "held = os.open(sys.argv[1], os.O_RDWR)\n"
        "sandbox.confine(read=[sys.prefix, sys.base_prefix])\n"
        "def attempt(line):\n"
        "    try: exec(line)\n"
        "    except BaseException as error: return type(error).__name__\n"
        "    return 'done'\n"
        "print(*[attempt(line) for line in sys.argv[2].splitlines()])\n"
    )
    words = [sys.executable, "-c", program, str(held), code]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()


@needs_landlock
def test_no_file_is_opened_or_made(tmp_path: Path) -> None:
    """Once confined it can neither read nor write, make nor remove any file but those it has open."""
    (tmp_path / "held").write_text("before")
    (tmp_path / "other").write_text("secret")
    attempts = "\n".join([
        f"open({str(tmp_path / 'other')!r})",
        f"open({str(tmp_path / 'other')!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"os.unlink({str(tmp_path / 'other')!r})",
        f"os.rename({str(tmp_path / 'other')!r}, {str(tmp_path / 'x')!r})",
        f"os.symlink('a', {str(tmp_path / 'x')!r})",
        f"os.mkdir({str(tmp_path / 'x')!r})",
        f"os.mkfifo({str(tmp_path / 'x')!r})",
        f"os.listdir({str(tmp_path)!r})",
        "open('/etc/passwd')",
        "open('/proc/self/environ')",
        "os.execv('/bin/true', ['true'])",
    ])  # fmt: skip
    assert run(attempts, tmp_path / "held") == ["PermissionError"] * 12
    assert run("os.write(held, b'after ')\nimport wave", tmp_path / "held") == ["done", "done"]
    assert (tmp_path / "held").read_text() == "after "
    assert {path.name for path in tmp_path.iterdir()} == {"held", "other"}


@pytest.mark.skipif(sandbox.landlock_version() < 4, reason="The kernel's Landlock knows no network.")
def test_no_network(tmp_path: Path) -> None:
    """It can neither connect nor listen over TCP."""
    (tmp_path / "held").touch()
    attempts = "socket.create_connection(('127.0.0.1', 9))\nsocket.create_server(('127.0.0.1', 0))"
    assert run(attempts, tmp_path / "held") == ["PermissionError"] * 2


def test_limits_hold(tmp_path: Path) -> None:
    """Files and memory have bounds, which cannot be raised again."""
    (tmp_path / "held").touch()
    attempts = "\n".join([
        "sandbox.limit(file_bytes=1000, memory_bytes=1 << 28, cpu_s=5)",
        "os.pwrite(held, b'x', 1000)",
        "bytearray(1 << 29)",
        "[resource.getrlimit(resource.RLIMIT_CPU) == (5, 5)][0] or 1 / 0",
        "resource.getrlimit(resource.RLIMIT_NPROC) == (0, 0) or 1 / 0",
        "sandbox.limit(file_bytes=2000, memory_bytes=1 << 40, cpu_s=9)",
        "resource.getrlimit(resource.RLIMIT_FSIZE) == (1000, 1000) or 1 / 0",
    ])  # fmt: skip
    found = run(attempts, tmp_path / "held")
    assert found == ["done", "OSError", "MemoryError", "done", "done", "done", "done"]
