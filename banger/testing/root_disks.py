"""A record of loop and dm devices instead of the kernel's, and a way to be killed between two calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from banger.helper.disks import MAX_MARK, Backing, Device, Loop, Snapshot
from banger.helper.names import UUID_PREFIX

KILLED = 137


class _State(msgspec.Struct):
    """What a kernel would hold: loops by number, devices by uuid, nodes' owners by name."""

    loops: dict[int, Loop] = {}
    devices: dict[str, Device] = {}
    nodes: dict[str, tuple[int, int]] = {}
    status: dict[str, str] = {}


class RecordingDisks:
    """A `Disks` that keeps what is asked of it; with a directory, also for the process after this one.

    `calls` are the effects that were asked for. A device whose name is in `in_use` cannot be removed.
    """

    def __init__(self, directory: Path | None = None):
        self._file = directory and directory / "disks.json"
        self._state = _State()
        if self._file and self._file.exists():
            self._state = msgspec.json.decode(self._file.read_bytes(), type=_State)
        self.calls: list[tuple[Any, ...]] = []
        self.in_use: set[str] = set()

    def attach(self, fd: int, mark: str, read_only: bool) -> int:
        """Attach the lowest number that is free."""
        if len(mark.encode("ascii")) > MAX_MARK:
            raise ValueError("mark")
        found = os.fstat(fd)
        number = next(number for number in range(1 << 20) if number not in self._state.loops)
        self._note("attach", mark, read_only)
        self._state.loops[number] = Loop(
            number=number,
            backing=Backing(found.st_dev, found.st_ino),
            mark=mark,
            read_only=read_only,
            leaving=False,
        )
        self._keep()
        return number

    def loops(self) -> list[Loop]:
        """List those that are attached."""
        return [loop for _, loop in sorted(self._state.loops.items())]

    def detach(self, loop: Loop) -> None:
        """Detach it, or let it leave with the device that holds it."""
        found = self._state.loops.get(loop.number)
        if found is None or (found.backing, found.mark) != (loop.backing, loop.mark):
            return
        self._note("detach", loop.mark)
        if any(loop.number in device.loops for device in self._state.devices.values()):
            self._state.loops[loop.number] = replace(found, leaving=True)
        else:
            del self._state.loops[loop.number]
        self._keep()

    def can_snapshot(self) -> bool:
        """Tell that it can."""
        return True

    def devices(self) -> list[Device]:
        """List them all."""
        return list(self._state.devices.values())

    def create(self, snapshot: Snapshot) -> None:
        """Make a device over loops that are there."""
        self._note("create", snapshot.name, snapshot.uuid, snapshot.sectors)
        for loop in (snapshot.origin, snapshot.cow):
            assert loop in self._state.loops, f"loop{loop} is not attached"
        assert snapshot.uuid not in self._state.devices, f"{snapshot.uuid} is there"
        self.plant(
            Device(
                name=snapshot.name,
                uuid=snapshot.uuid,
                live=True,
                loops=tuple(sorted((snapshot.origin, snapshot.cow))),
            )
        )

    def node(self, snapshot: Snapshot) -> None:
        """Give a device that is there its node."""
        self._note("node", snapshot.name, snapshot.uid, snapshot.gid)
        assert snapshot.uuid in self._state.devices, f"{snapshot.uuid} is not there"
        self._state.nodes[snapshot.name] = (snapshot.uid, snapshot.gid)
        self._keep()

    def remove(self, name: str, uuid: str) -> bool:
        """Remove a device and its node, with the loops that it held up."""
        assert uuid.startswith(UUID_PREFIX), uuid
        self._note("remove", name, uuid)
        if name in self.in_use:
            return False
        gone = self._state.devices.pop(uuid, None)
        for number in gone.loops if gone else ():
            if self._state.loops[number].leaving:
                del self._state.loops[number]
        if all(device.name != name for device in self._state.devices.values()):
            self._state.nodes.pop(name, None)
        self._keep()
        return True

    def status(self, name: str) -> str:
        """Give what `fill` has set, else that of a new one."""
        return self._state.status.get(name, "16/2048 16")

    def nodes(self) -> dict[str, tuple[int, int]]:
        """Give uid and gid of each node below /dev/mapper."""
        return dict(self._state.nodes)

    def plant(self, thing: Loop | Device) -> None:
        """Put something there that was made elsewhere, or by halves."""
        if isinstance(thing, Loop):
            self._state.loops[thing.number] = thing
        else:
            self._state.devices[thing.uuid] = thing
        self._keep()

    def fill(self, name: str, status: str) -> None:
        """Set a snapshot's status."""
        self._state.status[name] = status
        self._keep()

    def _note(self, *words: Any) -> None:
        self.calls.append(words)

    def _keep(self) -> None:
        if self._file:
            beside = self._file.with_suffix(".new")
            beside.write_bytes(msgspec.json.encode(self._state))
            beside.rename(self._file)


class Mortal:
    """Any seam, of which the process dies at the n-th boundary: before a call of `kills`, or after it."""

    def __init__(self, seam: object, boundary: int, *kills: str):
        self._seam, self._left, self._kills = seam, boundary, kills

    def __getattr__(self, name: str) -> Any:
        method: Callable[..., Any] = getattr(self._seam, name)
        if name not in self._kills:
            return method

        def call(*words: Any) -> Any:
            self._pass()
            result = method(*words)
            self._pass()
            return result

        return call

    def _pass(self) -> None:
        self._left -= 1
        if self._left == 0:
            os._exit(KILLED)


EFFECTS = ("attach", "detach", "create", "node", "remove")
"""The calls of a `Disks` that change something."""


def dies(run: Callable[[Any], object], seam: object, boundary: int) -> bool:
    """Run something with a seam in a process of its own, killed at a boundary; tell whether it was.

    False means that it came to its end before: there are no more boundaries.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(Mortal(seam, boundary, *EFFECTS))
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), status
    return status == KILLED
