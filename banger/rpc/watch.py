"""Notice what nobody reports: a VMM that died, a client that went away."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from banger import log as logging
from banger import proc
from banger.events import queries
from banger.events import vocabulary as ev
from banger.events.fold import Vm
from banger.events.vocabulary import Recorded
from banger.guest.connections import Connections
from banger.model import Process
from banger.rpc.service import Service

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
                self._died(vm)
                return
            kept = os.dup(fd)
        self._fds[vm] = (kept, process)
        asyncio.get_running_loop().add_reader(kept, self._died, vm)

    def _forget(self, vm: str) -> None:
        fd, _ = self._fds.pop(vm, (-1, None))
        if fd >= 0:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)

    def _died(self, vm_id: str) -> None:
        self._forget(vm_id)
        vm = queries.vm(self._service.log, vm_id)
        if vm is not None and vm.process is not None:
            logging.get(vm=vm_id).info("vmm ended", active=vm_id in queries.active_ops(self._service.log))
            self._service.bury(vm)

    def look_again(self) -> None:
        """Bury VMs whose VMM died while an operation was at work on them, and left them so."""
        active = queries.active_ops(self._service.log)
        for vm in queries.vms(self._service.log):
            if vm.process is not None and vm.id not in active and not proc.alive(vm.process):
                self._service.bury(vm)


class Tethers:
    """Deletes an ephemeral VM when the connection it is tied to ends."""

    def __init__(self, service: Service):
        self._service = service
        self._tied: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def adopt(self) -> None:
        """Give the clients of ephemeral VMs a while to come back after the daemon's restart."""
        for vm in queries.vms(self._service.log):
            if vm.spec.ephemeral:
                self._later(vm)

    @contextlib.asynccontextmanager
    async def tied(self, vm: Vm) -> AsyncIterator[None]:
        """Keep a VM for the length of the block; delete it afterwards if it is ephemeral."""
        self._tied[vm.id] = self._tied.get(vm.id, 0) + 1
        try:
            yield
        finally:
            self._tied[vm.id] -= 1
            if not self._tied[vm.id]:
                del self._tied[vm.id]
                if vm.spec.ephemeral:
                    self._delete(vm)

    def _later(self, vm: Vm) -> None:
        async def wait_then_delete() -> None:
            await asyncio.sleep(GRACE_S)
            if vm.id not in self._tied:
                self._delete(vm)

        task = asyncio.create_task(wait_then_delete())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _delete(self, vm: Vm) -> None:
        if queries.vm(self._service.log, vm.id) is not None:
            self._service.delete(vm)
