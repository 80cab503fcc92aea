"""`banger daemon`: is it there, does it answer, away with it."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from typing import Any

import click

from banger import layout
from banger.errors import BangerError, DaemonDown, WrongState
from banger_cli import wire
from banger_cli.commands import Branch, Leaf
from banger_cli.output import Out

Json = dict[str, Any]
STOP_S = 15.0
TERM_S = 5.0

branch = Branch(
    "daemon",
    {"status": "daemon:status", "start": "daemon:start", "stop": "daemon:stop"},
    help="The process that keeps the record. Any command that needs it starts it; VMs outlive it.",
    epilog="Examples:\n  banger daemon status\n  banger daemon stop",
)


@click.command("status", cls=Leaf)
@click.pass_obj
def status(out: Out) -> None:
    """Show whether the daemon answers, and what it is at. Never starts it."""
    with wire.connect(start=False) as daemon:
        found = daemon.request("daemon.status")
    out.show(found, _story(found))


def _story(found: Json) -> Iterator[str]:
    yield from layout.pairs(
        [
            ("pid", found["pid"]),
            ("version", found["version"]),
            ("since", layout.moment(found["since_us"])),
            ("vms running", found["vms_running"]),
            ("ops active", found["ops_active"]),
            ("state", found["state_dir"]),
            ("writes", "no: it was started with --read-only" if found["read_only"] else None),
            ("log", f"damaged: {found['damage']}" if found["damage"] else None),
        ]
    )
    rows = [(each["pid"], each["op"] or "idle") for each in found["workers"]]
    yield from ("", *layout.table(("WORKER", "OP"), rows))


@click.command("start", cls=Leaf, epilog="""\
Examples:
  banger daemon start
  banger daemon start --read-only     to look at a damaged log""")  # fmt: skip
@click.option("--read-only", is_flag=True, help="Only answer: nothing is written, no operation runs.")
@click.pass_obj
def start(out: Out, read_only: bool) -> None:
    """Start the daemon; nothing to do when it runs already."""
    with wire.connect(read_only=read_only) as daemon:
        found = daemon.hello()
    if read_only and not found["read_only"]:
        raise WrongState("A daemon that writes is running.", hint="`banger daemon stop` ends it.")
    only = ", it only reads" if found["read_only"] else ""
    out.show(found, [f"The daemon runs: pid {found['pid']}, version {found['version']}{only}"])


@click.command("stop", cls=Leaf)
@click.pass_obj
def stop(out: Out) -> None:
    """Stop the daemon, a hung one too. VMs keep running; unfinished operations go on at its next start."""
    with wire.connect(start=False) as daemon:
        pid = daemon.daemon_pid()
        # Opened while the connection is: the pid cannot have passed on to another process.
        watch = os.pidfd_open(pid)
        try:
            _end(daemon, watch, pid)
        finally:
            os.close(watch)
    out.show({"pid": pid}, [f"The daemon has stopped: pid {pid}"])


def _end(daemon: wire.Connection, watch: int, pid: int) -> None:
    try:
        daemon.request("daemon.stop")
        patience_s = STOP_S
    except wire.ConnectionLost:
        patience_s = STOP_S
    except BangerError:
        signal.pidfd_send_signal(watch, signal.SIGTERM)
        patience_s = TERM_S
    if _has_ended(watch, patience_s):
        return
    signal.pidfd_send_signal(watch, signal.SIGKILL)
    if not _has_ended(watch, TERM_S):
        raise DaemonDown(f"The daemon (pid {pid}) does not end, not even by SIGKILL.")


def _has_ended(watch: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
