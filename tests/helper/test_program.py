"""Programs run by root: by a path that only root can have made, with nothing of ours but their words."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import pytest

from banger.errors import HostLacks, ProgramFailed, TimedOut
from banger.helper import program
from tests.helper.conftest import NEEDS_ROOT, descriptors

pytestmark = NEEDS_ROOT


@pytest.fixture
def installed(rooted: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`installed(script)`: make `tool` in the table a script below a trusted directory."""
    tool = rooted / "tool"
    table = {"setpriv": program.PROGRAMS["setpriv"], "tool": str(tool)}
    monkeypatch.setattr(program, "PROGRAMS", MappingProxyType(table))

    def install(script: str) -> Path:
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        return tool

    return install


def test_h56_a_program_gets_an_environment_of_two_words(
    installed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, refused: Callable[..., None]
) -> None:
    """Nothing that is in this process's environment reaches a program, whatever its name."""
    hostile = "LD_PRELOAD PYTHONPATH PYTHONSTARTUP BASH_ENV DM_DISABLE_UDEV IFS ENV SHELLOPTS".split()
    for name in hostile:
        monkeypatch.setenv(name, "/tmp/evil")
    monkeypatch.setenv("PATH", "/tmp/evil")
    installed("exec /usr/bin/env")
    seen = dict(line.split("=", 1) for line in program.run(["tool"]).splitlines())
    assert {name: seen[name] for name in seen.keys() - {"PWD", "OLDPWD", "SHLVL", "_"}} == {
        "LANG": "C",
        "PATH": "/usr/sbin:/usr/bin",
    }
    refused("H56 hostile environment", "not passed on")


def test_h56_a_program_gets_no_input_and_no_descriptor_of_ours(installed: Callable[[str], Path]) -> None:
    """It is in /, with umask 077, without input, and has of our descriptors only what it is to keep."""
    installed('pwd; umask; read x && echo input; echo "$1"; ls /proc/self/fd')
    inherited, kept = os.open("/", os.O_RDONLY), os.open("/", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        lines = program.run(["tool", "a b;$(id)"], keep=[kept]).splitlines()
    finally:
        os.close(inherited)
        os.close(kept)
    assert lines[:3] == ["/", "0077", "a b;$(id)"]
    assert set(lines[3:]) >= {"0", "1", "2", str(kept)}
    assert str(inherited) not in lines[3:]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tool: tool.chmod(0o775), "others than root may change tool"),
        (lambda tool: tool.chmod(0o757), "others than root may change tool"),
        (lambda tool: os.chown(tool, 1000, 0), "others than root may change tool"),
        (lambda tool: tool.parent.chmod(0o777), "others than root may change bgr-"),
        (lambda tool: os.chown(tool.parent, 1000, 0), "others than root may change bgr-"),
        (lambda tool: tool.unlink(), "No such file"),
        (lambda tool: (tool.unlink(), tool.symlink_to("/usr/bin/id")), "symbolic link"),
    ],
)
def test_h51_a_program_that_another_could_change_is_not_run(
    installed: Callable[[str], Path],
    spoil: Callable[[Path], object],
    reason: str,
    refused: Callable[..., None],
    tmp_path: Path,
) -> None:
    """File and every directory above it must be root's own and nobody else's to write; else nothing runs."""
    spoil(installed(f"touch {tmp_path}/ran"))
    with pytest.raises(HostLacks, match=reason) as caught:
        program.run(["tool"])
    refused("H51 program not root's own", caught.value, len(list(tmp_path.iterdir())))


def test_a_program_that_is_not_in_the_table_is_not_run() -> None:
    """Only names of the table are known; a path is not a name."""
    for word in ("/usr/bin/id", "id", "../bin/id", ""):
        with pytest.raises(KeyError):
            program.run([word])


def test_a_failed_program_says_why(installed: Callable[[str], Path]) -> None:
    """A non-zero exit raises with the end of what it said."""
    installed("echo reason >&2; exit 3")
    with pytest.raises(ProgramFailed, match="tool exited with 3: reason") as caught:
        program.run(["tool"])
    assert caught.value.status == 3


def test_a_program_that_hangs_is_ended(installed: Callable[[str], Path], rooted: Path) -> None:
    """After the timeout it is gone, also when it has closed its outputs."""
    installed(f"echo $$ >{rooted}/pid; exec >&- 2>&-; exec sleep 60")
    before = time.monotonic()
    with pytest.raises(TimedOut):
        program.run(["tool"], timeout_s=0.5)
    assert time.monotonic() - before < 5
    assert not Path(f"/proc/{(rooted / 'pid').read_text().strip()}").exists()


def test_a_program_that_writes_without_end_is_ended(installed: Callable[[str], Path]) -> None:
    """More than the cap of output is an error, and does not fill memory."""
    installed("exec yes")
    with pytest.raises(ProgramFailed, match="wrote more than"):
        program.run(["tool"])


def test_no_descriptor_is_left(installed: Callable[[str], Path]) -> None:
    """A hundred runs, half of which fail, leave as many descriptors as there were."""
    before = descriptors()
    for number in range(100):
        installed(f"exit {number % 2}")
        with pytest.raises(ProgramFailed) if number % 2 else contextlib.nullcontext():
            program.run(["tool"])
    assert descriptors() == before
