"""How VMs, operations and artifacts are shown to clients."""

from __future__ import annotations

from typing import Any

import msgspec

from banger import layout
from banger.events.fold import Op, Step, Vm
from banger.events.queries import ArtifactSummary, OpSummary
from banger.events.vocabulary import Recorded

# While an operation works on a VM, its state is what that operation is doing to it.
_DOING = {
    "vm.start": "starting",
    "vm.restart": "starting",
    "vm.stop": "stopping",
    "vm.kill": "stopping",
    "vm.bury": "stopping",
    "vm.delete": "deleting",
}


def vm(vm: Vm, active: OpSummary | None, *, stuck: bool = False, then: bool = False) -> dict[str, Any]:
    """Show a VM: asked-for and actual state side by side.

    `stuck`: its last operation is; `then`: as the log told it at the time.
    """
    return {
        "id": vm.id,
        "name": vm.spec.name,
        "state": vm.state if then else _state(vm, active, stuck=stuck),
        "desired": vm.desired,
        "image": vm.spec.image,
        "kernel": vm.spec.kernel,
        "vcpu": vm.spec.vcpu,
        "memory_mib": vm.spec.memory_mib,
        "disk_mib": vm.spec.disk_mib,
        "nat": vm.spec.nat,
        "ephemeral": vm.spec.ephemeral,
        "created_us": vm.created_us,
        "started_us": vm.started_us,
        "network": vm.spec.network,
        "root_disk": vm.spec.root_disk,
        "address": vm.address,
        "ssh_port": vm.ssh_port,
        "pid": vm.process.pid if vm.process else None,
        "accelerator": vm.accelerator,
        "reason": vm.reason,
        "workspace": None if vm.workspace is None else msgspec.to_builtins(vm.workspace),
        "op": active.id if active else None,
        "waits_for": active.reason if active else None,
    }


def _state(vm: Vm, active: OpSummary | None, *, stuck: bool) -> str:
    if active is None and stuck:
        return "stuck"
    if active is not None and active.kind in _DOING:
        return _DOING[active.kind]
    if active is not None and active.kind == "vm.create" and vm.state == "stopped":
        return "creating"  # its disks are there, and it is about to start
    if active is None and vm.state in ("creating", "starting"):
        return "failed"  # nothing works on it and it is not whole
    return vm.state


def vm_table(rows: list[dict[str, Any]]) -> str:
    """Lay out VMs as `banger ps` shows them."""
    header = ("NAME", "STATE", "IMAGE", "CPU", "MEMORY", "UP", "SSH", "WORKSPACE")
    return "".join(
        line + "\n"
        for line in layout.table(
            header,
            [
                (
                    row["name"],
                    row["state"] + (" (waits)" if row["waits_for"] else ""),
                    row["image"],
                    row["vcpu"],
                    layout.size(row["memory_mib"] << 20),
                    layout.ago(row["started_us"]),
                    f"{row['address'] or '127.0.0.1'}:{row['ssh_port']}" if row["ssh_port"] else None,
                    row["workspace"]["path"] if row["workspace"] else None,
                )
                for row in rows
            ],
        )
    )


def stuck_lines(ops: list[OpSummary]) -> str:
    """Name the operations that could be neither finished nor undone, one line each."""
    return "".join(
        f"{op.id} ({op.kind}{f' {op.name}' if op.name else ''}) is stuck: `banger ops show {op.id}`\n"
        for op in ops
    )


def op_summary(op: OpSummary) -> dict[str, Any]:
    """Show an operation in one line."""
    view: dict[str, Any] = msgspec.to_builtins(op)
    return view


def op(summary: OpSummary, op: Op, ahead: OpSummary | None = None) -> dict[str, Any]:
    """Show an operation whole: its steps, what they acquired, and the one `ahead` of it in its lane."""
    return op_summary(summary) | {
        "reason": summary.reason or (f"waits for {ahead.id} ({ahead.kind})" if ahead else None),
        "args": op.args,
        "epoch": op.epoch,
        "steps": [_step(step, op) for step in op.steps],
        "resources": [
            {"kind": resource.kind, "id": resource.id, "state": state, "step": step}
            for resource, state, step in op.resources.values()
        ],
        "undo_errors": list(op.undo_errors),
    }


def _step(step: Step, op: Op) -> dict[str, Any]:
    after_us = None if step.started_us is None else step.started_us - op.started_boot_us
    return {
        "name": step.name,
        "title": step.title,
        "state": step.state,
        "attempts": step.attempts,
        "started_us": None if after_us is None else op.requested_us + after_us,
        "seconds": step.seconds,
        "undone": step.state == "undone",
        "undo_seconds": step.undo_seconds,
        "error": step.error,
        "facts": step.facts,
    }


def event(row: Recorded) -> dict[str, Any]:
    """Show an event: its type beside its data."""
    data = msgspec.to_builtins(row.event)
    kind = data.pop("type")
    return {
        "seq": row.seq,
        "op": row.op,
        "stream": row.stream,
        "type": kind,
        "time_us": row.time_us,
        "boot_us": row.boot_us,
        "data": data,
    }


def artifact(
    name: str, known: ArtifactSummary | None, *, present: bool, recipe: str | None
) -> dict[str, Any]:
    """Show an image or kernel, also one that could be made from a recipe but is not there yet."""
    return {
        "name": name,
        "present": present,
        "source": recipe,
        "digest": known.digest if known else None,
        "size_bytes": known.size_bytes if known else None,
        "created_us": known.created_us if known else None,
        "details": known.details if known else {},
    }
