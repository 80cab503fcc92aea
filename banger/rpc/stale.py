"""Stop VMs that nobody has used for as long as `auto_stop_stale_after` says."""

from __future__ import annotations

import re
from pathlib import Path

from banger import config, layout
from banger import log as logging
from banger.errors import BangerError
from banger.events import queries
from banger.events.fold import Vm
from banger.guest.connections import Connections
from banger.network import user
from banger.rpc import protocol as p
from banger.rpc.service import Service

_ESTABLISHED = "01"
_END = re.compile(r"([0-9A-F]{8}):([0-9A-F]{4})", re.ASCII)


class Stale:
    """Looks for VMs that are not used any more. Inside one who has an SSH session, it is used."""

    def __init__(self, service: Service, connections: Connections):
        self._service = service
        self._connections = connections
        self._after_s = config.stale_after_s(service.config)

    def look(self) -> None:
        """Ask for the stop of every VM that is stale now; one that is in use now is not."""
        if self._after_s is None:
            return
        active, sessions = queries.active_ops(self._service.log), established()
        for vm in queries.vms(self._service.log):
            if vm.process is None:
                continue
            if self._in_use(vm, sessions):
                self._service.uses.touch(vm.id)
            elif vm.id not in active and self._service.uses.idle_s(vm.id) >= self._after_s:
                self._stop(vm)

    def _in_use(self, vm: Vm, sessions: list[tuple[str, int]]) -> bool:
        """Tell whether someone is inside: through the daemon, or with an ssh of their own."""
        busy, ours = self._connections.counts(vm.id)
        theirs = sessions.count((vm.address or user.HOST_ADDRESS, vm.ssh_port or 0)) - ours
        return busy - self._service.uses.looking[vm.id] > 0 or theirs > 0

    def _stop(self, vm: Vm) -> None:
        idle = layout.seconds(self._service.uses.idle_s(vm.id))
        try:
            asked = self._service.answer(p.VmStop(vm=vm.id))
            logging.get(vm=vm.id, op=asked["op"]).info("stopped: nobody has used it", idle=idle)
        except BangerError as error:  # a full disk: the next look asks again
            logging.get(vm=vm.id).error("cannot stop", error=error.message)


def established() -> list[tuple[str, int]]:
    """List the far ends of this host's TCP connections, as /proc/net/tcp has them (proc_pid_net(5))."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]]
    return [_end(row[2]) for row in rows if row[3] == _ESTABLISHED]


def _end(text: str) -> tuple[str, int]:
    match = _END.fullmatch(text)
    assert match is not None, text
    return ".".join(str(byte) for byte in bytes.fromhex(match[1])[::-1]), int(match[2], 16)
