"""Operations as the daemon tells of them."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
SPEC = {
    "name": "web",
    "image": "debian-12",
    "kernel": "debian-12",
    "vcpu": 1,
    "memory_mib": 3007,
    "disk_mib": 8192,
    "nat": False,
    "network": "user",
    "ephemeral": False,
}
MADE = {"op": "op-1", "vm": "vm-1", "name": "web", "spec": SPEC}
FIRE = {"code": "program", "message": "mkfs is on fire", "hint": "Put it out.", "op": None}


def event(seq: int, type_: str, op: str = "op-1", /, **data: Any) -> Json:
    return {"event": {"seq": seq, "op": op, "type": type_, "time_us": 0, "boot_us": 0, "data": data}}


def ended(fate: str = "done", error: Json | None = None, op: str = "op-1") -> Json:
    result = {"op": op, "fate": fate, "error": error, "seconds": 4.7, "vm": "vm-1", "name": "web"}
    return {"result": result}


def started(seq: int, step: int, name: str, op: str = "op-1") -> Json:
    return event(seq, "step.started", op, step=step, name=name, title=name, attempt=1)


def done(seq: int, step: int, name: str, seconds: float = 0.02, op: str = "op-1") -> Json:
    return event(seq, "step.done", op, step=step, name=name, seconds=seconds, facts={})


def requested(*steps: str, op: str = "op-1", kind: str = "vm.create", **args: Any) -> Json:
    return event(1, "op.requested", op, kind=kind, args=args, steps=list(steps), titles=list(steps))


CREATED = [requested("disks", "boot"), started(2, 0, "disks"), done(3, 0, "disks"), ended()]
UNDONE = [
    requested("disks", "boot"),
    done(2, 0, "disks"),
    event(3, "step.failed", step=1, name="boot", error=FIRE, retry_in_s=None),
    event(4, "op.undoing", error=FIRE),
    event(5, "undo.done", step=0, name="disks", seconds=0.01),
    event(6, "op.ended", fate="undone", error=FIRE),
    ended("undone", FIRE),
]
