"""Start the daemon, once, however many ask for it at the same moment."""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

from banger.errors import DaemonDown, from_dict
from banger.proc import start_detached
from banger_cli import place, wire

DEADLINE_S = 20.0
ERROR_TAIL = 600
MAX_ANSWER = 65536


def start(*, read_only: bool = False) -> socket.socket | None:
    """Start the daemon unless another has done so meanwhile, and connect to it.

    Raises what the daemon says is wrong (its settings, say), or DaemonDown with its last words when
    it does not become ready in time.
    """
    state = Path(place.state())
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state / "daemon.start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sock = wire.dial()
        if sock is None:
            _spawn(state / "daemon.err", ["--read-only"] if read_only else [])
            sock = wire.dial()
    return sock


def _spawn(errors: Path, words: list[str]) -> None:
    said_before = errors.stat().st_size if errors.exists() else 0
    ready, ready_end = os.pipe()
    try:
        # -P, and / as its directory: `-m` would otherwise import from wherever the user stands.
        argv = [sys.executable, "-P", "-m", "banger.rpc.daemon", "--ready-fd", str(ready_end), *words]
        child = start_detached(argv, errors=errors, keep=(ready_end,))
    finally:
        os.close(ready_end)
    try:
        _await_ready(ready, child, errors, said_before)
    finally:
        os.close(ready)


def _await_ready(ready: int, child: subprocess.Popen[bytes], errors: Path, said_before: int) -> None:
    readable, _, _ = select.select([ready], [], [], DEADLINE_S)
    if not readable:
        child.kill()
        raise DaemonDown(f"The daemon was not ready within {DEADLINE_S:g} s.", hint=f"See {errors}.")
    said = os.read(ready, MAX_ANSWER)
    if said.startswith(b"{"):
        child.wait()
        raise from_dict(json.loads(said))
    if not said:
        with errors.open("rb") as file:
            file.seek(said_before)
            words = file.read().decode("utf-8", "replace").strip()[-ERROR_TAIL:]
        raise DaemonDown(
            f"The daemon ended while starting: {words or 'it said nothing'}", hint=f"See {errors}."
        )
