"""Compare the ledger with the host: what nobody owns, what is owned and not there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from banger.config import Dirs
from banger.errors import HelperDown
from banger.events import queries
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.helper.requests import JailRemove, NatDisable, SnapshotRemove, TapRemove
from banger.model import Resource, Value
from banger.tasks import lost, root
from banger.tasks.context import Ctx
from banger.tasks.pipeline import Pipeline, Step
from banger.tasks.root import Root
from banger.vmm import qemu
from banger.vmm.driver import Running

_SOCKETS = (".qmp", ".agent")
_VM = re.compile(r"vm-[0-9a-z]{8}")


class Finding(Value):
    """A resource that is on one side only, and who acquired it last, if the log knows."""

    kind: str
    id: str
    vm: str | None
    op: str | None
    time_us: int | None


class Audit(Value):
    """How often something was acquired and released since the log began, and what does not add up.

    `leaked` is on the host and in nobody's ledger; `missing` is in the ledger and not on the host.
    What an operation works on at this moment is left out: it may be on either side. `unseen` tells
    why what root makes was not looked at, if it was not.
    """

    acquired: int
    released: int
    held: int
    leaked: tuple[Finding, ...]
    missing: tuple[Finding, ...]
    unseen: str | None = None


def audit(
    log: EventLog, dirs: Dirs, root: Root, running: Callable[[Path], Iterable[Running]] = qemu.running
) -> Audit:
    """Look at the host and at the ledger. Images and kernels are the cache's affair and left out."""
    look = Look(log, dirs, root, running)
    leaked, missing = look.compare()
    if leaked or missing:
        # An operation may have ended between the look at the host and the look at the ledger.
        again = look.compare()
        leaked, missing = _both(leaked, again[0]), _both(missing, again[1])
    acquired, released, held = queries.ledger_counts(log)
    return Audit(
        acquired=acquired,
        released=released,
        held=held,
        leaked=_findings(log, leaked),
        missing=_findings(log, missing),
        unseen=look.unseen,
    )


Owned = dict[Resource, str]
"""Resources, and the id of the VM of each."""


ROOTS = ("tap", "nat", "bridge", "jail", "snapshot", "loop")
"""The kinds that only root can make, and list."""


class Look:
    """One look, or a second one, at both sides; what root has made is left out where it does not answer."""

    def __init__(self, log: EventLog, dirs: Dirs, root: Root, running: Callable[[Path], Iterable[Running]]):
        self.unseen: str | None = None
        self._log = log
        self._dirs = dirs
        self._root = root
        self._running = running

    def compare(self) -> tuple[Owned, Owned]:
        """Give what is on the host only, and what is in the ledger only."""
        # What is on the disk of a VM that the log has lost is that VM's.
        busy = {*queries.active_ops(self._log), *(each.vm for each in lost.find(self._log, self._dirs))}
        found = [*on_host(self._log, self._dirs, self._running), *self._made_by_root()]
        real = {each: vm for each, vm in found if vm not in busy}
        ours = {each: vm for each, vm in _in_ledger(self._log) if vm not in busy and self._seen(each, vm)}
        return _without(real, ours), _without(ours, real)

    def _made_by_root(self) -> Iterable[tuple[Resource, str]]:
        """List root's part. Where no VM of ours is on a bridge, there may be no root's pool either."""
        try:
            made = list(root.made(self._root))
        except HelperDown as error:
            if any(held.kind in ROOTS for held in queries.resources(self._log)):
                self.unseen = error.message
            return []
        has_taps = any(each.kind == "tap" for each in made)
        on_loops = {each.vm for each in made if each.kind in ("snapshot", "jail")}
        found = [
            (Resource(kind=each.kind, id=each.id), each.vm)  # type: ignore[arg-type]  # one of ROOTS
            for each in made
            if each.kind in ROOTS
            and not (each.kind == "bridge" and has_taps)
            and not (each.kind == "loop" and each.vm in on_loops)
        ]
        return found + [(Resource(kind="address", id=each.address), each.vm) for each in made if each.address]

    def _seen(self, resource: Resource, vm: str) -> bool:
        """Tell whether it was looked for; the address of a VM in a jail is known to root."""
        if self.unseen is None:
            return True
        in_jail = {held.vm for held in queries.resources(self._log) if held.kind == "jail"}
        return resource.kind not in ROOTS and not (resource.kind == "address" and vm in in_jail)


def _without(some: Owned, others: Owned) -> Owned:
    return {each: vm for each, vm in some.items() if each not in others}


def _both(some: Owned, others: Owned) -> Owned:
    return {each: vm for each, vm in some.items() if each in others}


def _in_ledger(log: EventLog) -> Iterator[tuple[Resource, str]]:
    for held in queries.resources(log):
        if held.kind != "artifact":
            yield Resource(kind=held.kind, id=held.id), held.vm or ""  # type: ignore[arg-type]  # as in Resource


def on_host(
    log: EventLog, dirs: Dirs, running: Callable[[Path], Iterable[Running]]
) -> Iterator[tuple[Resource, str]]:
    """List what there is on the host that only banger makes, for this owner, and whose VM's it is.

    A name is taken by its VM's row, wherever the log is.
    """
    for vm in queries.vms(log):
        yield Resource(kind="name", id=vm.spec.name), vm.id
    for directory in (dirs.state / "vms").iterdir():
        if not _VM.fullmatch(directory.name) or directory.is_symlink() or not directory.is_dir():
            continue  # not made by banger
        yield Resource(kind="directory", id=str(directory)), directory.name
        paths = dirs.vm(directory.name)
        for file in (paths.overlay, paths.cow, paths.work, paths.initrd):
            if file.exists():
                yield Resource(kind="file", id=str(file)), directory.name
    for path in dirs.runtime.iterdir():
        if path.suffix in _SOCKETS and _VM.fullmatch(path.stem):
            yield Resource(kind="socket", id=str(path)), path.stem
    for vmm in running(dirs.runtime):
        yield Resource(kind="process", id=vmm.vm), vmm.vm
        if vmm.ssh_port is not None:
            yield Resource(kind="port", id=str(vmm.ssh_port)), vmm.vm
        if vmm.address is not None:
            yield Resource(kind="address", id=vmm.address), vmm.vm


def _findings(log: EventLog, found: Owned) -> tuple[Finding, ...]:
    ordered = sorted(found.items(), key=lambda item: (item[0].kind, item[0].id))
    return tuple(_finding(log, each, vm) for each, vm in ordered)


def _finding(log: EventLog, resource: Resource, vm: str) -> Finding:
    op, time_us = queries.last_acquired(log, resource) or (None, None)
    return Finding(kind=resource.kind, id=resource.id, vm=vm, op=op, time_us=time_us)


def _sweep(ctx: Ctx) -> dict[str, Any]:
    """Remove what the audit finds to be nobody's, and nothing else of a VM that is somebody's."""
    found = audit(ctx.log, ctx.dirs, ctx.world.root, ctx.world.running).leaked
    # A VMM before its sockets and files, a file before its directory.
    for each in sorted(found, key=lambda finding: _ORDER.index(finding.kind)):
        _remove(ctx, each)
    return {"removed": [f"{each.kind} {each.id}" for each in found]}


_ORDER = (
    *("process", "jail", "snapshot", "loop"),
    *("port", "address", "socket", "nat", "tap", "bridge"),
    *("file", "directory", "name"),
)
NO_VM = "vm-00000000"


def _remove(ctx: Ctx, stray: Finding) -> None:
    match stray.kind:
        case "process":
            ctx.world.vmm.destroy(stray.id, ctx.dirs.vm(stray.id))
        case "port" | "address":
            pass  # it goes with the VMM that has it; that of a VMM that is somebody's stays
        case "jail":
            ctx.ask_root(JailRemove(vm=str(stray.vm)))
        case "snapshot":
            ctx.ask_root(SnapshotRemove(vm=str(stray.vm)))
        case "loop":  # of a snapshot or of a jail that is not there
            ctx.ask_root(SnapshotRemove(vm=stray.vm or NO_VM))
            ctx.ask_root(JailRemove(vm=stray.vm or NO_VM))
        case "nat":
            ctx.ask_root(NatDisable(vm=str(stray.vm)))
        case "tap" | "bridge":
            ctx.ask_root(TapRemove(vm=stray.vm or NO_VM))  # a bridge without taps goes with any
        case "directory":
            shutil.rmtree(stray.id, ignore_errors=True)
        case "name":
            _free_name(ctx, str(stray.vm))
        case _:
            Path(stray.id).unlink(missing_ok=True)


def _free_name(ctx: Ctx, vm: str) -> None:
    """Free the name of a VM that has nothing else; one that has is somebody's."""
    if not any(queries.resources_of_vm(ctx.log, vm)):
        ctx.emit(vm, ev.VmDeleted())


SWEEP = Pipeline(
    "host.sweep",
    (
        Step(
            name="sweep",
            title="remove what is nobody's",
            run=_sweep,
            why_no_undo="what belongs to nobody is missed by nobody",
            forward_only=True,
        ),
    ),
)
PIPELINES = (SWEEP,)
