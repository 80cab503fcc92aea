"""The program that keeps the last of what another says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from banger.vmm import console

FULL = console.FULL_BYTES


def said(place: Path, script: str) -> tuple[str, str]:
    """Run a shell script under it; give both files."""
    out, errors = place / "out", place / "errors"
    subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            console.__file__,
            out,
            errors,
            "NAME=a b=c",
            "--",
            "/bin/sh",
            "-c",
            script,
        ],
        check=True,
        timeout=60,
    )
    return out.read_text(), errors.read_text()


def test_endless_output_fills_no_disk(tmp_path: Path) -> None:
    """Of 20 MiB at most one is kept: the last, from the beginning of a line."""
    out, _ = said(tmp_path, "seq -w 1 2500000")
    lines = out.splitlines()
    assert FULL // 2 - 8 <= len(out) <= FULL
    assert lines[-1] == "2500000"
    assert lines == [f"{number:07}" for number in range(2500001 - len(lines), 2500001)]


def test_one_line_without_end_fills_no_disk(tmp_path: Path) -> None:
    """A guest that never ends its line is cut as well."""
    out, _ = said(tmp_path, "head -c 5000000 /dev/zero | tr '\\0' x; echo end")
    assert len(out) <= FULL
    assert out.endswith("end\n")


def test_streams_are_kept_apart_and_added_to(tmp_path: Path) -> None:
    """Output and errors have a file each, for the owner alone, and what was in it stays."""
    said(tmp_path, "echo first")
    out, errors = said(tmp_path, 'echo "$NAME"; echo bad >&2; umask')
    assert (out, errors) == ("first\na b=c\n0077\n", "bad\n")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("script", "last"), [("exit 148", "exited with 148."), ("kill -9 $$", "was ended by signal 9.")]
)
def test_how_it_ended_is_the_last_line(tmp_path: Path, script: str, last: str) -> None:
    """An exit status or a signal is written down, because nobody else sees it."""
    _, errors = said(tmp_path, script)
    assert errors.endswith(f"{last}\n")


def test_a_full_disk_loses_lines_only() -> None:
    """Where nothing can be written the program goes on to its end."""
    ring = console.Ring(Path("/dev/full"))
    ring.write(b"x\n")
