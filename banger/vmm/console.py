"""Run a program and keep the last of what it says, in files that do not grow. Run as a program.

    console.py OUT ERRORS NAME=VALUE... -- PROGRAM WORD...

Firecracker's serial console is its standard output, and what a guest writes there is without bounds.
The program is started with these names in its environment and umask 077; its standard output and error
are appended to OUT and ERRORS, each of which is cut to its last half when it is full. How the program
ended is the last line of ERRORS. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from pathlib import Path

FULL_BYTES = 1 << 20
PIECE_BYTES = 1 << 16


class Ring:
    """A file of which the beginning goes when it is full."""

    def __init__(self, path: Path, full_bytes: int = FULL_BYTES):
        """Open the file; what is in it stays."""
        self._full_bytes = full_bytes
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, piece: bytes) -> None:
        """Append; cut the file first when it would be longer than it may be. A full disk loses it."""
        with contextlib.suppress(OSError):
            if os.fstat(self._fd).st_size + len(piece) > self._full_bytes:
                self._cut()
            os.write(self._fd, piece[-self._full_bytes // 2 :])

    def _cut(self) -> None:
        """Keep the file's last half. Who reads it meanwhile sees it shrink."""
        size, half = os.fstat(self._fd).st_size, self._full_bytes // 2
        last = os.pread(self._fd, half, max(0, size - half))
        os.ftruncate(self._fd, 0)
        os.write(self._fd, last.partition(b"\n")[2])


def tail(path: Path, longest: int = 4096) -> str:
    """Give the end of a text that a guest may have written: whole lines, at most `longest` bytes."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - longest))
            data = file.read(longest)
    except FileNotFoundError:
        return ""
    if size > longest:
        data = data.partition(b"\n")[2]
    return data.decode("utf-8", "replace").strip()


def start(argv: list[str], environ: dict[str, str]) -> tuple[int, dict[int, str]]:
    """Fork and become the program; give its pid, and which of its streams each pipe carries."""
    pipes = {name: os.pipe() for name in ("out", "errors")}
    pid = os.fork()
    if pid == 0:
        for target, name in ((1, "out"), (2, "errors")):
            os.dup2(pipes[name][1], target)
        os.umask(0o077)
        try:
            os.execve(argv[0], argv, environ)  # noqa: S606  it takes no shell to run one program
        except OSError as error:
            os.write(2, f"{argv[0]} cannot be run: {error.strerror}\n".encode())
        os._exit(127)
    for _, into in pipes.values():
        os.close(into)
    return pid, {pipes[name][0]: name for name in pipes}


def keep(streams: dict[int, str], rings: dict[str, Ring]) -> None:
    """Write down what is said until everybody who could say something has gone."""
    poll = select.poll()
    for fd in streams:
        poll.register(fd, select.POLLIN)
    while streams:
        for fd, _ in poll.poll():
            if piece := os.read(fd, PIECE_BYTES):
                rings[streams[fd]].write(piece)
            else:
                poll.unregister(fd)
                del streams[fd]


def main(words: list[str]) -> None:
    """Run the program of this command line to its end."""
    split = words.index("--")
    out, errors, *marks = words[:split]
    rings = {"out": Ring(Path(out)), "errors": Ring(Path(errors))}
    named = dict(mark.split("=", 1) for mark in marks)
    pid, streams = start(words[split + 1 :], {**os.environ, **named})
    keep(streams, rings)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        how = f"was ended by signal {-code}" if code < 0 else f"exited with {code}"
        rings["errors"].write(f"Firecracker {how}.\n".encode())


if __name__ == "__main__":
    main(sys.argv[1:])
