"""Reach a guest over SSH with the ssh program: no trust on first use, no user configuration."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

from banger import proc
from banger.config import VmPaths
from banger.errors import Cancelled, ProgramFailed
from banger.guest import agent
from banger.model import Value

DIAL_S = 5
# A systemd that is still starting has no bus to take the order: then it is switched off by force.
# Firecracker ends when its guest resets the CPU (`reboot=k`), and not when it powers off.
_POWER_OFF = (
    "sync; how=poweroff; read -r words < /proc/cmdline;"
    " case $words in *reboot=k*) how=reboot ;; esac;"
    " if [ -d /run/systemd/system ]; then systemctl $how || systemctl $how -ff; else /run/banger/bin/$how; fi"
)
GREETING = b"SSH-"
"""What an SSH server says first (RFC 4253, section 4.2)."""

DIAL_AGAIN_S = 0.25
"""A booting guest does not answer for its address yet, and the kernel takes seconds to give up."""


class Target(Value):
    """Where a guest's SSH server is and how both sides know each other.

    The host key is pinned in `paths.known_hosts` under the VM's id.
    """

    vm: str
    port: int
    paths: VmPaths
    key: Path
    host: str = "127.0.0.1"


def argv(target: Target) -> list[str]:
    """Give the ssh command up to the host; options and the remote command may follow."""
    return [
        "ssh",
        "-F", "none",
        "-i", str(target.key),
        "-p", str(target.port),
        "-o", "IdentitiesOnly=yes",
        "-o", "BatchMode=yes",
        "-o", f"HostKeyAlias={target.vm}",
        "-o", f"UserKnownHostsFile={target.paths.known_hosts}",
        "-o", "GlobalKnownHostsFile=none",
        "-o", "StrictHostKeyChecking=yes",
        "-o", "LogLevel=ERROR",
        "-o", f"ConnectTimeout={DIAL_S}",
        f"root@{target.host}",
    ]  # fmt: skip


def wait_ready(
    target: Target,
    timeout_s: float,
    *,
    cancelled: Callable[[], bool],
    alive: Callable[[], bool],
    report: Callable[[], str],
) -> None:
    """Wait until the guest's SSH server greets; raises as `banger.guest.agent.wait_ready`."""
    deadline = time.monotonic() + timeout_s
    while not _greets(target):
        if not alive():
            raise agent.ended(report())
        if cancelled():
            raise Cancelled
        if time.monotonic() >= deadline:
            raise agent.silent(timeout_s, report())


def _greets(target: Target) -> bool:
    began = time.monotonic()
    with (
        contextlib.suppress(OSError),
        socket.create_connection((target.host, target.port), DIAL_AGAIN_S) as connection,
    ):
        connection.settimeout(DIAL_S)
        return connection.recv(len(GREETING)) == GREETING
    time.sleep(max(0.0, began + DIAL_AGAIN_S - time.monotonic()))  # one that is refused, is so at once
    return False


def power_off(target: Target) -> None:
    """Flush the guest's disks and switch it off.

    Raises ProgramFailed when the guest does not answer within DIAL_S seconds. A connection that
    the power-off itself cuts is a success.
    """
    try:
        proc.run([*argv(target), _POWER_OFF], timeout_s=DIAL_S * 2)
    except ProgramFailed as error:
        if "Connection refused" in error.message or "timed out" in error.message:
            raise
