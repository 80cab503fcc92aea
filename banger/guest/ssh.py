"""Reach a guest over SSH with the ssh program: no trust on first use, no user configuration."""

from __future__ import annotations

from pathlib import Path

from banger import proc
from banger.config import VmPaths
from banger.errors import ProgramFailed
from banger.model import Value

DIAL_S = 5
# A systemd that is still starting has no bus to take the order: then it is switched off by force.
_POWER_OFF = (
    "sync; if [ -d /run/systemd/system ]; then systemctl poweroff || systemctl poweroff -ff;"
    " else /run/banger/bin/poweroff; fi"
)


class Target(Value):
    """Where a guest's SSH server is and how both sides know each other.

    `port` is on 127.0.0.1; the host key is pinned in `paths.known_hosts` under the VM's id.
    """

    vm: str
    port: int
    paths: VmPaths
    key: Path


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
        "root@127.0.0.1",
    ]  # fmt: skip


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
