"""The one door to other programs and processes."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from banger.errors import Cancelled, HostLacks, ProgramFailed, TimedOut
from banger.model import Process

# Programs that live in sbin are missing from an ordinary user's PATH on Debian.
# An empty PATH falls back to os.defpath: an empty entry would mean the current directory.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH") or os.defpath, "/usr/local/sbin", "/usr/sbin", "/sbin"])
ERROR_TAIL = 600
CANCEL_LOOK_S = 0.5
REAP_S = 5.0
MARK = "BANGER_RUN"


def which(program: str, package: str | None = None) -> str:
    """Find a program's path, also in the sbin directories.

    Raises HostLacks, naming the Debian package that has it.
    """
    found = shutil.which(program, path=SEARCH_PATH)
    if found is None:
        package = package or program
        raise HostLacks(f"{program} is not installed.", hint=f"apt-get install {package}")
    return found


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    timeout_s: float = 60.0,
    env: dict[str, str] | None = None,
    stdin: bytes = b"",
    cancelled: Callable[[], bool] | None = None,
    umask: int = -1,
    mark: str | None = None,
) -> str:
    """Run a program to its end and return its standard output as text; see `output`."""
    out = output(argv, timeout_s=timeout_s, env=env, stdin=stdin, cancelled=cancelled, umask=umask, mark=mark)
    return out.decode("utf-8", "replace")


def output(
    argv: Sequence[str | os.PathLike[str]],
    *,
    timeout_s: float = 60.0,
    env: dict[str, str] | None = None,
    stdin: bytes = b"",
    cancelled: Callable[[], bool] | None = None,
    umask: int = -1,
    mark: str | None = None,
) -> bytes:
    """Run a program to its end and return its standard output.

    The program gets its own session and a mark in its environment, so a timeout or a cancellation
    ends all of it, also what it has put in the background; `end_marked(mark)` does so later, after
    this process was killed.
    Raises HostLacks when it is not installed, ProgramFailed with the tail of its errors when it
    exits non-zero, TimedOut after `timeout_s` seconds, Cancelled when `cancelled()` turns true.
    """
    words = [os.fspath(word) for word in argv]
    mark = mark or secrets.token_hex(8)
    # A worker that is killed must not leave it running beside the next attempt. The kernel ends it
    # with its parent: setpriv asks for that and becomes the program.
    child = subprocess.Popen(
        [which("setpriv", "util-linux"), "--pdeathsig", "KILL", "--", which(words[0]), *words[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C.UTF-8", "PATH": SEARCH_PATH, MARK: mark, **(env or {})},
        start_new_session=True,
        umask=umask,
    )
    try:
        out, err = _converse(child, words[0], stdin, timeout_s, cancelled)
    except BaseException:
        _end_session(child)
        end_marked(mark)
        raise
    finally:
        for pipe in (child.stdin, child.stdout, child.stderr):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
    if child.returncode != 0:
        tail = err.decode("utf-8", "replace").strip()[-ERROR_TAIL:]
        raise ProgramFailed(f"{words[0]} exited with {child.returncode}: {tail}", status=child.returncode)
    return out


def _converse(
    child: subprocess.Popen[bytes],
    name: str,
    stdin: bytes,
    timeout_s: float,
    cancelled: Callable[[], bool] | None,
) -> tuple[bytes, bytes]:
    """Feed the program and read its output until it has ended; raise TimedOut or Cancelled."""
    deadline = time.monotonic() + timeout_s
    feed: bytes | None = stdin
    while True:
        wait = deadline - time.monotonic()
        if cancelled is not None:
            wait = min(wait, CANCEL_LOOK_S)
        try:
            return child.communicate(feed, timeout=max(wait, 0.001))
        except subprocess.TimeoutExpired:
            feed = None  # communicate() goes on with what it was given first
        if cancelled is not None and cancelled():
            raise Cancelled(f"{name} was ended.")
        if time.monotonic() >= deadline:
            raise TimedOut(f"{name} did not end within {timeout_s:g} s.")


def _end_session(child: subprocess.Popen[bytes]) -> None:
    """SIGKILL the program and its session, and reap it.

    The wait is bounded: a process in an uninterruptible system call outlives SIGKILL for a while.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(REAP_S)


def attach(argv: Sequence[str | os.PathLike[str]]) -> int:
    r"""Run a program on this process's own terminal; give its exit code, 128+n for signal n.

    Ctrl-C and Ctrl-\ reach it from the terminal; meanwhile they do not end this process.
    Raises HostLacks when it is not installed.
    """
    words = [os.fspath(word) for word in argv]
    program = which(words[0])
    # Handlers, not SIG_IGN: an ignored signal would stay ignored in the program.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGQUIT)}
    try:
        code = subprocess.call([program, *words[1:]])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def start_detached(
    argv: Sequence[str | os.PathLike[str]],
    *,
    errors: Path,
    keep: tuple[int, ...] = (),
    env: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program that outlives this process: own session, in /, no terminal.

    Its standard error is appended to `errors` (0600); of our other descriptors it gets `keep` only;
    `env` is added to our environment.
    """
    fd = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=fd,
            cwd="/",
            pass_fds=keep,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    finally:
        os.close(fd)


def identify(pid: int) -> Process | None:
    """Read the identity of a live process; None when it is gone or a zombie (proc(5))."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name is in parentheses and may itself hold spaces and parentheses.
    fields = stat[stat.rindex(")") + 2 :].split()
    if fields[0] in "ZX":
        return None
    return Process(pid=pid, start_ticks=int(fields[19]), boot_id=boot_id())


@functools.cache
def boot_id() -> str:
    """Name this boot of the host: the first eight hex digits of its boot id (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii")[:8]


def me() -> Process:
    """Identify this process."""
    process = identify(os.getpid())
    assert process is not None
    return process


def age_s(process: Process) -> float:
    """Tell for how many seconds the process has been running (to 10 ms: clock ticks)."""
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return since_boot - process.start_ticks / os.sysconf("SC_CLK_TCK")


def alive(process: Process) -> bool:
    """Tell whether exactly this process, not a later one with its pid, still runs."""
    found = identify(process.pid)
    return found is not None and same(found, process)


def same(one: Process, other: Process) -> bool:
    """Tell whether two identities name one process; an unrecorded boot (schema 1) fits any."""
    return (one.pid, one.start_ticks) == (other.pid, other.start_ticks) and (
        one.boot_id == other.boot_id or not (one.boot_id and other.boot_id)
    )


@contextlib.contextmanager
def pidfd(process: Process) -> Iterator[int | None]:
    """Open a pidfd of exactly this process; None when it is gone.

    The fd pins the process: checking the identity after opening closes the pid-reuse race.
    """
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield fd if alive(process) else None
    finally:
        os.close(fd)


def _ended(fd: int, timeout_s: float) -> bool:
    """Wait until the process of a pidfd has ended; poll(), as select() refuses descriptors over 1023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def wait_gone(process: Process, timeout_s: float) -> bool:
    """Wait until the process has ended; False when it still runs after `timeout_s` seconds."""
    with pidfd(process) as fd:
        if fd is None:
            return True
        return _ended(fd, timeout_s)


def kill(process: Process, timeout_s: float = 10.0) -> None:
    """SIGKILL exactly this process and wait until it has ended; nothing when it is gone.

    Raises TimedOut when it is still there after `timeout_s` seconds.
    """
    with pidfd(process) as fd:
        if fd is None:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        if not _ended(fd, timeout_s):
            raise TimedOut(f"Process {process.pid} did not end within {timeout_s:g} s of SIGKILL.")


def marked(name: str) -> Iterator[tuple[Process, str]]:
    """Find this user's processes that were started with `name` in their environment, and its value."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        value = _mark(int(entry.name), name)
        if value is not None and (process := identify(int(entry.name))) is not None:
            yield process, value


def mark_of(process: Process, name: str) -> str | None:
    """Give what this user's process was started with as `name` in its environment, if it was."""
    return _mark(process.pid, name)


def _mark(pid: int, name: str) -> str | None:
    wanted = f"{name}=".encode()
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None  # gone meanwhile, or another user's
    value = next((v[len(wanted) :] for v in environ.split(b"\0") if v.startswith(wanted)), None)
    return None if value is None else value.decode("utf-8", "replace")


def words(process: Process) -> str:
    """Give the words a process was started with, with spaces between; empty when it is gone."""
    try:
        return (
            Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        )
    except OSError:
        return ""


def end_marked(mark: str) -> None:
    """SIGKILL every process that is left of a program that was run with this mark."""
    for process in find_by_environ(MARK, mark):
        kill(process)


def find_by_environ(name: str, value: str) -> list[Process]:
    """Find this user's processes that were started with `name=value` in their environment."""
    return [process for process, found in marked(name) if found == value]
