"""Look inside VMs: whether one is well, what it serves, what all of them use.

None of this counts as using a VM, and none of it waits for a sick one longer than its deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncssh
import msgspec

from banger import layout
from banger.errors import BangerError, GuestUnreachable
from banger.events import queries
from banger.events.fold import Vm
from banger.guest import probe, statistics
from banger.guest.connections import Connections
from banger.guest.statistics import Disk, Statistics
from banger.rpc import protocol as p
from banger.rpc import usage
from banger.rpc.service import Service

DEADLINE_S = 3.0
PORTS_DEADLINE_S = 30.0
MOST_KNOCKS = 32
"""Ports that are asked what they speak; one that is silent takes a second or three."""
SAMPLE_S = 0.3
SKEW_S = 2.0
SSH_PORT = 22

Check = dict[str, Any]


class Inside:
    """The methods that ask guests."""

    def __init__(self, service: Service, connections: Connections):
        self._service = service
        self._connections = connections
        self._answers: dict[type[p.Request], Callable[[Any], Awaitable[dict[str, Any]]]] = {
            p.VmPing: self._ping,
            p.VmHealth: self._health,
            p.VmPorts: self._ports,
            p.VmStats: self._stats,
        }

    async def answer(self, request: p.LooksInside) -> dict[str, Any]:
        """Answer one of these methods. Raises a BangerError."""
        return await self._answers[type(request)](request)

    # -- is it there, is it well? ----------------------------------------------------------------

    async def _ping(self, request: p.VmPing) -> dict[str, Any]:
        vm = self._running(request.vm)
        via, trips = await self._trips(vm)
        return {"vm": vm.id, "name": vm.spec.name, "via": via, "seconds": trips}

    async def _trips(self, vm: Vm) -> tuple[str, list[float]]:
        """Ask the agent; where there is none, as in a jail, a connection."""
        agent = self._service.dirs.vm(vm.id).agent
        if not agent.exists():
            return "ssh", [await self._timed(vm)]
        try:
            async with asyncio.timeout(DEADLINE_S):
                return "agent", await probe.ping(agent)
        except TimeoutError:
            raise _silent(vm, "its agent") from None

    async def _timed(self, vm: Vm) -> float:
        await self._asked(vm, ":")  # the handshake, if there has been none, is no round trip
        began = time.perf_counter()
        await self._asked(vm, ":")
        return time.perf_counter() - began

    async def _health(self, request: p.VmHealth) -> dict[str, Any]:
        vm = self._running(request.vm)
        said = await asyncio.gather(self._agent_check(vm), self._guest_checks(vm))
        checks = [check for some in said for check in some]
        return {"vm": vm.id, "name": vm.spec.name, "checks": checks, "ok": not _failed(checks)}

    async def _agent_check(self, vm: Vm) -> list[Check]:
        if not self._service.dirs.vm(vm.id).agent.exists():
            return []
        try:
            _, trips = await self._trips(vm)
        except BangerError as error:
            return [_check("agent", "fail", error.message, f"`banger vm restart {vm.spec.name}`")]
        return [_check("agent", "pass", f"answers in {min(trips) * 1000:.1f} ms")]

    async def _guest_checks(self, vm: Vm) -> list[Check]:
        began = time.time()
        try:
            said = statistics.parse(await self._asked(vm, statistics.SCRIPT))
        except BangerError as error:
            return [
                _check("ssh", "fail", error.message, f"`banger vm logs {vm.spec.name}` shows its console")
            ]
        took = time.time() - began
        answers = _check("ssh", "pass", f"answers in {layout.seconds(took)}")
        disks = [_disk_check(disk, vm) for disk in said.disks]
        return [answers, *disks, _memory_check(said, vm), _clock_check(said, began, took, vm)]

    # -- what does it serve? ---------------------------------------------------------------------

    async def _ports(self, request: p.VmPorts) -> dict[str, Any]:
        vm = self._running(request.vm)
        try:
            async with asyncio.timeout(PORTS_DEADLINE_S):
                async with self._lease(vm) as connection:
                    found = probe.listeners(await probe.ask(connection, probe.PORTS))
                    ports = [
                        await self._port(connection, vm, each, knock=number < MOST_KNOCKS)
                        for number, each in enumerate(found)
                    ]
        except TimeoutError:
            raise _silent(vm, "it") from None
        return {"vm": vm.id, "name": vm.spec.name, "ports": ports}

    async def _port(
        self, connection: asyncssh.SSHClientConnection, vm: Vm, listener: probe.Listener, *, knock: bool
    ) -> dict[str, Any]:
        if listener.port == SSH_PORT:
            speaks = "ssh"
        else:
            speaks = await probe.speaks(connection, listener.knock_at, listener.port) if knock else "other"
        known = {"speaks": speaks, "only_inside": listener.only_inside, "reach": _reach(vm, listener, speaks)}
        return {**msgspec.to_builtins(listener), **known}

    # -- what does it use? -----------------------------------------------------------------------

    async def _stats(self, request: p.VmStats) -> dict[str, Any]:
        log = self._service.log
        if request.vms:
            vms = [queries.find_vm(log, word) for word in dict.fromkeys(request.vms)]
        else:
            vms = [vm for vm in queries.vms(log) if vm.process is not None]
        return {"stats": await asyncio.gather(*map(self._one, vms))}

    async def _one(self, vm: Vm) -> dict[str, Any]:
        """Look at one VM from both sides at once."""
        host, guest = await asyncio.gather(self._of_host(vm), self._of_guest(vm))
        return {"vm": vm.id, "name": vm.spec.name, "host": host, **guest}

    async def _of_host(self, vm: Vm) -> dict[str, Any]:
        directory = self._service.dirs.vm(vm.id).directory
        disk = await asyncio.to_thread(usage.disk_bytes, directory)
        known = {"disk_bytes": disk, "created_us": vm.created_us, "started_us": vm.started_us}
        before = None if vm.process is None else usage.of(vm.process)
        if vm.process is None or before is None:
            return known
        began = time.monotonic()
        await asyncio.sleep(SAMPLE_S)  # a share of time is of some time
        now = usage.of(vm.process) or before
        share = (now.cpu_s - before.cpu_s) / (time.monotonic() - began)
        return known | {"cpu_percent": round(share * 100, 1), **msgspec.to_builtins(now)}

    async def _of_guest(self, vm: Vm) -> dict[str, Any]:
        if vm.process is None:
            return {"guest": None, "why": "it is not running"}
        try:
            said = statistics.parse(await self._asked(vm, statistics.SCRIPT))
        except BangerError as error:
            return {"guest": None, "why": error.message}
        return {"guest": msgspec.to_builtins(said), "why": None}

    # -- asking ----------------------------------------------------------------------------------

    def _running(self, word: str) -> Vm:
        """Find a VM that runs. Raises NotFound, WrongState."""
        vm = queries.find_vm(self._service.log, word)
        self._service.target(vm.id, looking=True)
        return vm

    @contextlib.asynccontextmanager
    async def _lease(self, vm: Vm) -> AsyncIterator[asyncssh.SSHClientConnection]:
        """Give a connection to a VM that does not count as using it."""
        target = self._service.target(vm.id, looking=True)
        with self._service.uses.only_looked_at(vm.id):
            async with self._connections.lease(target) as connection:
                yield connection

    async def _asked(self, vm: Vm, script: str) -> str:
        """Have a VM's shell run a script, within the deadline."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                async with self._lease(vm) as connection:
                    return await probe.ask(connection, script)
        except TimeoutError:
            raise _silent(vm, "it") from None


def _silent(vm: Vm, who: str) -> GuestUnreachable:
    return GuestUnreachable(
        f"{vm.spec.name} is sick, or very busy: {who} did not answer in time.",
        hint=f"`banger vm logs {vm.spec.name}` shows its console; `banger vm restart {vm.spec.name}`.",
    )


def _reach(vm: Vm, listener: probe.Listener, speaks: str) -> str:
    """Say how a port is reached from the host: at the VM's own address, else through SSH."""
    if speaks == "ssh":
        return f"banger vm ssh {vm.spec.name}"
    scheme = f"{speaks}://" if speaks in ("http", "https") else ""
    if vm.address is not None and not listener.only_inside:
        return f"{scheme}{vm.address}:{listener.port}"
    local = listener.port if listener.port >= 1024 else listener.port + 8000
    inside = f"[{listener.knock_at}]" if ":" in listener.knock_at else listener.knock_at
    return f"ssh -N -L {local}:{inside}:{listener.port} {vm.spec.name}.vm"


# -- judging -------------------------------------------------------------------------------------


def _check(name: str, status: str, detail: str, hint: str | None = None) -> Check:
    return {"name": name, "status": status, "detail": detail, "hint": hint}


def _failed(checks: list[Check]) -> bool:
    return any(check["status"] == "fail" for check in checks)


def _disk_check(disk: Disk, vm: Vm) -> Check:
    detail = f"{disk.used_percent}% full, {layout.size(disk.free_kib << 10)} free"
    status = "fail" if disk.used_percent >= 98 else "warn" if disk.used_percent >= 90 else "pass"
    hint = "Remove something there, or set `overlay_mib` in config.toml for new VMs."
    if disk.mount == "/root":
        name = vm.spec.name
        hint = f"`banger vm stop {name}`, then `banger vm set {name} --disk-size` gives it more."
    return _check(f"disk {disk.mount}", status, detail, None if status == "pass" else hint)


def _memory_check(said: Statistics, vm: Vm) -> Check:
    share = said.memory_available_kib / max(1, said.memory_kib)
    detail = (
        f"{layout.size(said.memory_available_kib << 10)} of {layout.size(said.memory_kib << 10)} available"
    )
    status = "fail" if share < 0.03 else "warn" if share < 0.1 else "pass"
    hint = f"`banger vm set {vm.spec.name} --memory`, then `banger vm restart {vm.spec.name}`."
    return _check("memory", status, detail, None if status == "pass" else hint)


def _clock_check(said: Statistics, began: float, took: float, vm: Vm) -> Check:
    """Compare clocks: the guest's is in whole seconds, and was read at some time since it was asked."""
    late, early = began - (said.time_s + 1), said.time_s - (began + took)
    off = max(late, early, 0.0)
    if off < SKEW_S:
        return _check("clock", "pass", "as the host's")
    detail = f"{layout.seconds(off)} {'behind' if late > early else 'ahead of'} the host's"
    return _check(
        "clock", "warn", detail, f"`banger vm exec {vm.spec.name} -- date -s @$(date +%s)` sets it."
    )
