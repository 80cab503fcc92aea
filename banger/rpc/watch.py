"""Notice what nobody reports: a VMM that died, a client that went away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from banger import log as logging
from banger import proc
from banger.errors import BangerError
from banger.events import queries
from banger.events import vocabulary as ev
from banger.events.fold import Vm
from banger.events.vocabulary import Recorded
from banger.guest.connections import Connections
from banger.model import Process
from banger.rpc.service import Service

CONSOLE_LIMIT = 16 << 20
"""Bytes that a guest's console may take on the host's disk."""

GRACE_S = 10.0
"""How long an ephemeral VM outlives its client's connection, so that the client may come back."""


class VmmWatch:
    """Holds a pidfd of every running VMM and asks for the burial of one that ends by itself."""

    def __init__(self, service: Service, connections: Connections):
        self._service = service
        self._connections = connections
        self._fds: dict[str, tuple[int, Process]] = {}

    def adopt(self) -> None:
        """Watch the VMs that were left running, and bury those whose VMM is gone."""
        for vm in queries.vms(self._service.log):
            if vm.process is not None:
                self._watch(vm.id, vm.process)

    def heard(self, row: Recorded) -> None:
        """Follow the log: a started VMM is watched, a stopped one is not."""
        match row.event:
            case ev.VmStarted(process=process):
                self._watch(row.stream, process)
            case ev.VmStopped() | ev.VmDeleted():
                self._forget(row.stream)
                self._connections.drop(row.stream)

    def _watch(self, vm: str, process: Process) -> None:
        self._forget(vm)
        with proc.pidfd(process) as fd:
            if fd is None:
                self._died(vm, process)
                return
            kept = os.dup(fd)
        self._fds[vm] = (kept, process)
        asyncio.get_running_loop().add_reader(kept, self._died, vm, process)

    def _forget(self, vm: str) -> None:
        fd, _ = self._fds.pop(vm, (-1, None))
        if fd >= 0:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)

    def _died(self, vm_id: str, process: Process) -> None:
        self._forget(vm_id)
        vm = queries.vm(self._service.log, vm_id)
        if vm is not None and vm.process == process:  # else it was started anew meanwhile
            logging.get(vm=vm_id).info("vmm ended", pid=process.pid)
            self._bury(vm)

    def _bury(self, vm: Vm) -> None:
        """Ask for its burial; if that cannot be recorded now (a full disk), the next look asks again."""
        try:
            self._service.bury(vm)
        except BangerError as error:
            logging.get(vm=vm.id).error("cannot bury", error=error.message)

    def look_again(self) -> None:
        """Bury VMs whose VMM died while an operation was at work on them; bound their consoles."""
        active = queries.active_ops(self._service.log)
        # A burial that is stuck waits for a person; another would be stuck as well.
        stuck = {op.vm for op in queries.stuck(self._service.log) if op.kind == "vm.bury"}
        for vm in queries.vms(self._service.log):
            if vm.process is None:
                continue
            _bound(self._service.dirs.vm(vm.id).console)
            if vm.id not in active and vm.id not in stuck and not proc.alive(vm.process):
                self._bury(vm)


def _bound(console: Path) -> None:
    """Cut a console's file when its guest has written too much: QEMU appends, so it goes on at the start."""
    with contextlib.suppress(FileNotFoundError):
        if console.stat().st_size > CONSOLE_LIMIT:
            os.truncate(console, 0)
            logging.get().warning("console cut", file=str(console))


class Tethers:
    """Deletes an ephemeral VM when the connection it is tied to ends."""

    def __init__(self, service: Service):
        self._service = service
        self._tied: dict[str, int] = {}
        self._lost_at: dict[str, float] = {}
        self.stopping = False
        """The daemon stops: connections end for its sake, not for their clients'."""

    def adopt(self) -> None:
        """Give the clients of ephemeral VMs a while to come back after the daemon's restart."""
        for vm in queries.vms(self._service.log):
            if vm.spec.ephemeral:
                self._lost_at[vm.id] = time.monotonic() + GRACE_S

    @contextlib.asynccontextmanager
    async def tied(self, vm: Vm) -> AsyncIterator[None]:
        """Keep a VM for the length of the block; delete it afterwards if it is ephemeral."""
        self._tied[vm.id] = self._tied.get(vm.id, 0) + 1
        self._lost_at.pop(vm.id, None)
        try:
            yield
        finally:
            self._tied[vm.id] -= 1
            if not self._tied[vm.id]:
                del self._tied[vm.id]
                if vm.spec.ephemeral and not self.stopping:
                    self._lost_at[vm.id] = 0.0
                    self.look_again()

    def look_again(self) -> None:
        """Delete the VMs whose client is gone; one that cannot be now is tried at the next look."""
        for vm_id, when in list(self._lost_at.items()):
            if time.monotonic() < when:
                continue
            vm = queries.vm(self._service.log, vm_id)
            try:
                if vm is not None:
                    self._service.delete(vm)
                del self._lost_at[vm_id]
            except BangerError as error:
                logging.get(vm=vm_id).error("cannot delete", error=error.message)
