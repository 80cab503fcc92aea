from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from banger import proc
from banger.errors import Cancelled, HostLacks, ProgramFailed, TimedOut
from banger.model import Process

# Starts a child of its own, writes its pid to a file, and waits.
FAMILY = """
import pathlib, subprocess, sys
child = subprocess.Popen(["sleep", "60"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
child.wait()
"""


def test_run_gives_the_output() -> None:
    """Standard input goes in and standard output comes back, whatever their size."""
    text = "grüße\n" * 100_000
    assert proc.run(["cat"], stdin=text.encode()) == text


def test_run_survives_a_program_that_does_not_read() -> None:
    """A program that ends without reading its input is judged by its exit code alone."""
    assert proc.run(["true"], stdin=b"x" * (1 << 20)) == ""


def test_a_failure_quotes_the_end_of_the_errors() -> None:
    """The sentence has the exit code and the last words, not all of them."""
    with pytest.raises(ProgramFailed, match=r"(?s)exited with 3: .*the reason$") as caught:
        proc.run(["sh", "-c", "yes | head -c 100000 >&2; echo the reason >&2; exit 3"])
    assert len(caught.value.message) < 1000


def test_a_missing_program_names_its_package() -> None:
    """What is not installed is told with the command that installs it."""
    with pytest.raises(HostLacks) as caught:
        proc.which("no-such-program-at-all", "its-package")
    assert caught.value.hint == "apt-get install its-package"


def test_the_current_directory_is_not_searched(tmp_path: Path) -> None:
    """With an empty or missing PATH a program beside us is not run."""
    planted = tmp_path / "mkfs.planted"
    planted.write_text("#!/bin/sh\n")
    planted.chmod(0o755)
    look = "from banger import proc; proc.which('mkfs.planted')"
    roots = os.pathsep.join(path for path in sys.path if path)
    for environ in ({"PATH": ""}, {}):
        env = {**environ, "PYTHONPATH": roots}
        found = subprocess.run(
            [sys.executable, "-c", look], cwd=tmp_path, env=env, check=False, capture_output=True, text=True
        )
        assert "HostLacks: mkfs.planted is not installed" in found.stderr


@pytest.mark.parametrize("error", [TimedOut, Cancelled])
def test_ending_a_program_ends_its_family(tmp_path: Path, error: type[Exception]) -> None:
    """After a timeout or a cancellation neither the program nor its children run."""
    note = tmp_path / "pid"
    cancelled = note.exists if error is Cancelled else None
    start = time.monotonic()
    with pytest.raises(error):
        proc.run(
            [sys.executable, "-c", FAMILY, note],
            timeout_s=1.0 if cancelled is None else 30.0,
            cancelled=cancelled,
        )
    assert time.monotonic() - start < 10
    grandchild = int(note.read_text())
    deadline = time.monotonic() + 5
    while proc.identify(grandchild) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert proc.identify(grandchild) is None


def test_an_interrupted_run_leaves_no_child() -> None:
    """An exception that is raised while the program runs, as Ctrl-C does, ends the program."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            proc.run(["sleep", "60"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert Path(f"/proc/self/task/{os.getpid()}/children").read_text() == ""


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -TERM $$", 128 + 15), ("true", 0)])
def test_attach_passes_the_exit_code(script: str, code: int) -> None:
    """A program's exit code is given as a shell gives it, 128+n for a signal."""
    assert proc.attach(["sh", "-c", script]) == code


def test_a_detached_program_has_its_own_session_and_errors(tmp_path: Path) -> None:
    """It leads a session, hears of `env`, has no other descriptors, and its complaints are kept private."""
    errors = tmp_path / "errors"
    held = os.open(tmp_path, os.O_RDONLY)
    kept = os.open(tmp_path, os.O_RDONLY)
    script = "echo $MARK >&2; pwd >&2; cut -d' ' -f6 /proc/$$/stat >&2; ls /proc/$$/fd >&2; echo $$ >&2"
    try:
        child = proc.start_detached(["sh", "-c", script], errors=errors, keep=(kept,), env={"MARK": "seen"})
        assert child.wait(10) == 0
    finally:
        os.close(held)
        os.close(kept)
    mark, directory, session, *descriptors, pid = errors.read_text().split()
    assert (mark, directory, session) == ("seen", "/", pid)
    assert str(kept) in descriptors
    assert str(held) not in descriptors
    assert errors.stat().st_mode & 0o777 == 0o600


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"], env={"SLEEPER": "7", "PATH": "/bin:/usr/bin"}) as child:
        yield child
        child.kill()


def identity(child: subprocess.Popen[bytes]) -> Process:
    process = proc.identify(child.pid)
    assert process is not None
    return process


def test_a_process_is_more_than_its_pid(sleeper: subprocess.Popen[bytes]) -> None:
    """A process is itself, and not another one that has its pid."""
    process = identity(sleeper)
    later = msgspec.structs.replace(process, start_ticks=process.start_ticks + 1)
    assert proc.alive(process)
    assert not proc.alive(later)
    proc.kill(later)
    assert proc.wait_gone(later, 0)
    assert proc.alive(process)


def test_kill_waits(sleeper: subprocess.Popen[bytes]) -> None:
    """After kill the process has ended, though its parent has not reaped it; killing again is nothing."""
    process = identity(sleeper)
    assert not proc.wait_gone(process, 0.05)
    proc.kill(process)
    assert not proc.alive(process)
    assert proc.wait_gone(process, 0)
    proc.kill(process)


def test_waiting_works_with_many_descriptors(sleeper: subprocess.Popen[bytes]) -> None:
    """A daemon with more than a thousand open descriptors can still wait for a process."""
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1030)] if _may_open(1100) else []
    try:
        assert not proc.wait_gone(identity(sleeper), 0.01)
    finally:
        for fd in held:
            os.close(fd)


def _may_open(count: int) -> bool:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft > count


def test_a_command_name_cannot_forge_an_identity(tmp_path: Path) -> None:
    """A program whose name looks like the end of a stat line is identified all the same."""
    odd = tmp_path / "a) Z 1 2 3 ("
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([odd, "60"]) as child:
        try:
            assert proc.identify(child.pid) is not None
        finally:
            child.kill()


def test_processes_are_found_by_their_mark(sleeper: subprocess.Popen[bytes]) -> None:
    """The whole value must agree, and what has ended is not found."""
    assert identity(sleeper) in proc.find_by_environ("SLEEPER", "7")
    assert proc.find_by_environ("SLEEPER", "77") == []
    assert proc.find_by_environ("LEEPER", "7") == []
    sleeper.kill()
    sleeper.wait()
    assert proc.find_by_environ("SLEEPER", "7") == []


def test_a_program_ends_with_whoever_ran_it(tmp_path: Path) -> None:
    """Kill -9 of a process inside `run` ends the program too: the next attempt is alone."""
    pid_file = tmp_path / "pid"
    tell = 'echo $$ > "$1.new"; mv "$1.new" "$1"; exec sleep 60'
    script = f"from banger import proc; proc.run(['sh', '-c', {tell!r}, 'sh', {str(pid_file)!r}])"
    runner = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 10
    while not pid_file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    program = proc.identify(int(pid_file.read_text()))
    assert program is not None
    runner.kill()
    runner.wait()
    try:
        assert proc.wait_gone(program, 5.0)
    finally:
        proc.kill(program)


def test_a_timeout_ends_what_went_to_the_background(tmp_path: Path) -> None:
    """A daemon that the program started in a session of its own ends with it."""
    script = "setsid --fork sleep 60; sleep 60"
    with pytest.raises(TimedOut):
        proc.run(["sh", "-c", script], timeout_s=0.5, mark=str(tmp_path))
    assert proc.find_by_environ(proc.MARK, str(tmp_path)) == []
