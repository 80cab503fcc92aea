"""The one door from root to other programs."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import IO

from banger.errors import HostLacks, ProgramFailed, TimedOut
from banger.helper.trusted import check_trusted

PROGRAMS: Mapping[str, str] = MappingProxyType(
    {
        "dmsetup": "/usr/sbin/dmsetup",
        "resolvectl": "/usr/bin/resolvectl",
        "setpriv": "/usr/bin/setpriv",
    }
)
"""Every program that root may run, and where it is: Debian's paths; PATH is not looked at."""

ENVIRONMENT: Mapping[str, str] = MappingProxyType({"LANG": "C", "PATH": "/usr/sbin:/usr/bin"})
"""All that a program is told by its environment."""

MAX_OUTPUT = 1 << 20
"""Bytes of standard output and of standard error, each; a program that writes more is ended."""

ERROR_TAIL = 500
REAP_S = 5.0


def run(words: Sequence[str], *, timeout_s: float = 10.0, keep: Sequence[int] = ()) -> str:
    """Run a program to its end and give its standard output; `words[0]` is a name in PROGRAMS.

    It is run by its path, which only root can have put there, without a shell, in `/`, with an
    environment of two words, no input and no descriptors of ours but `keep`.
    Raises HostLacks when it is not installed or not root's own, ProgramFailed with the tail of its
    errors when it exits non-zero or writes more than MAX_OUTPUT bytes, TimedOut after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    child = _start(words, keep)
    try:
        out, err = _read(child, words[0], deadline)
        status = child.wait(max(deadline - time.monotonic(), 0.001))
    except BaseException as error:
        _end(child)
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimedOut(f"{words[0]} did not end within {timeout_s:g} s.") from None
        raise
    finally:
        for pipe in _pipes(child):
            pipe.close()
    if status != 0:
        tail = err.decode("utf-8", "replace").strip()[-ERROR_TAIL:]
        raise ProgramFailed(f"{words[0]} exited with {status}: {tail}", status=status)
    return out.decode("utf-8", "replace")


def path_of(name: str) -> str:
    """Find a program of PROGRAMS; raise HostLacks when it is not there or not root's own."""
    check_trusted(PROGRAMS[name])
    return PROGRAMS[name]


def _start(words: Sequence[str], keep: Sequence[int]) -> subprocess.Popen[bytes]:
    # A helper that is killed must not leave the program running beside the next attempt. The kernel
    # ends it with its parent: setpriv asks for that and becomes the program.
    argv = [path_of("setpriv"), "--pdeathsig", "KILL", "--", path_of(words[0]), *words[1:]]
    if any("\0" in word for word in argv):
        raise ProgramFailed(f"{words[0]} cannot be given a word with a NUL.")
    try:
        return subprocess.Popen(
            argv,
            bufsize=0,
            close_fds=True,
            cwd="/",
            env=dict(ENVIRONMENT),
            pass_fds=tuple(keep),
            shell=False,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            umask=0o077,
        )
    except OSError as error:
        raise HostLacks(f"{words[0]} cannot be run: {error.strerror}.") from None


def _read(child: subprocess.Popen[bytes], name: str, deadline: float) -> tuple[bytes, bytes]:
    """Read both of its outputs until they end; raise TimedOut at the deadline."""
    read = [bytearray(), bytearray()]
    with selectors.DefaultSelector() as open_pipes:
        for pipe, data in zip(_pipes(child), read, strict=True):
            open_pipes.register(pipe, selectors.EVENT_READ, data)
        while open_pipes.get_map():
            ready = open_pipes.select(max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimedOut(f"{name} did not end in time.")
            for key, _ in ready:
                if not (chunk := os.read(key.fd, 65536)):
                    open_pipes.unregister(key.fileobj)
                key.data.extend(chunk)
                if len(key.data) > MAX_OUTPUT:
                    raise ProgramFailed(f"{name} wrote more than {MAX_OUTPUT} bytes.")
    return bytes(read[0]), bytes(read[1])


def _pipes(child: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert child.stdout is not None
    assert child.stderr is not None
    return child.stdout, child.stderr


def _end(child: subprocess.Popen[bytes]) -> None:
    """SIGKILL it and reap it; the wait is bounded, as one in an uninterruptible call outlives SIGKILL."""
    child.kill()  # our own unreaped child: its pid cannot be another's
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(REAP_S)
