"""A record of jails: what root's handlers ask for is written down, and nothing is run.

It gives the same answers as the real jails. With a directory it outlives whoever uses it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from banger.errors import Refused
from banger.helper.jails import CONSOLE_BYTES, UIDS, Door, Inmate, Jail, Version

BOOT = "00000000"
FIRST_PID = 5_000_000
"""Above what any kernel gives (PID_MAX_LIMIT is 2**22): nobody can be hurt by a mistake."""


class _Record(msgspec.Struct):
    mark: str
    files: dict[str, int] = msgspec.field(default_factory=dict)
    devices: dict[str, str] = msgspec.field(default_factory=dict)
    inmates: list[Inmate] = msgspec.field(default_factory=list)


class _State(msgspec.Struct):
    jails: dict[str, _Record] = msgspec.field(default_factory=dict)
    started: int = 0


class RecordingJails:
    """Jails that exist on paper; a `Jails`. `calls` are what changed something, as words."""

    def __init__(self, directory: Path | None = None, *, others: Sequence[range] = (), uids: range = UIDS):
        self.calls: list[tuple[Any, ...]] = []
        self.uids = uids
        self._others = others
        self._file = directory / "jails.json" if directory else None
        self._state = _State()
        if self._file and self._file.exists():
            self._state = msgspec.json.decode(self._file.read_bytes(), type=_State)

    def version(self) -> Version:
        """See `Jails`."""
        return Version(1, 13, 2)

    def spoken_for(self) -> Sequence[range]:
        """See `Jails`."""
        return self._others

    def is_known(self, uid: int) -> bool:
        """See `Jails`: only what is spoken for."""
        return any(uid in some for some in self.spoken_for())

    def jails(self) -> list[Jail]:
        """See `Jails`."""
        return [Jail(name, record.mark) for name, record in sorted(self._state.jails.items())]

    def inmates(self, jail: str) -> list[Inmate]:
        """See `Jails`."""
        record = self._state.jails.get(jail)
        return list(record.inmates) if record else []

    def make(self, jail: str, mark: str) -> None:
        """See `Jails`."""
        if jail in self._state.jails:
            raise Refused(f"The jail {jail} exists already.")
        self._state.jails[jail] = _Record(mark=mark)
        self._note("make", jail, mark)

    def put_file(self, jail: str, name: str, fd: int, size: int, uid: int) -> None:
        """See `Jails`."""
        if os.fstat(fd).st_size < size:
            raise Refused(f"The {name} became shorter while it was copied.")
        self._new(jail, name)
        self._state.jails[jail].files[name] = uid
        self._note("put_file", jail, name, size, uid)

    def put_device(self, jail: str, name: str, device: str, uid: int, read_only: bool) -> None:
        """See `Jails`."""
        self._new(jail, name)
        self._state.jails[jail].devices[name] = device
        self._note("put_device", jail, name, device, uid, read_only)

    def give_tap(self, tap: str, uid: int) -> None:
        """See `Jails`."""
        self._note("give_tap", tap, uid)

    def start(self, jail: str, uid: int, mark: str) -> None:
        """See `Jails`."""
        self._state.started += 1
        pid = FIRST_PID + self._state.started
        self._state.jails[jail].inmates.append(Inmate(pid=pid, start_ticks=pid, boot_id=BOOT, uid=uid))
        self._note("start", jail, uid, mark)

    def signal(self, jail: str, inmate: Inmate, number: int) -> None:
        """See `Jails`; it ends at once."""
        if inmate in self.inmates(jail):
            self._state.jails[jail].inmates.remove(inmate)
            self._note("signal", jail, inmate.pid, number)

    def ended(self, inmate: Inmate, timeout_s: float) -> bool:  # noqa: ARG002  nothing here takes time
        """See `Jails`."""
        return not any(inmate in record.inmates for record in self._state.jails.values())

    def connect(self, jail: str, door: Door) -> int:
        """See `Jails`; whoever listens hangs up at once."""
        if not self.inmates(jail) or door == "vsock":
            raise Refused("Nobody listens there.")
        here, there = socket.socketpair()
        there.close()
        return here.detach()

    def console(self, jail: str) -> int | None:
        """See `Jails`."""
        if not self.inmates(jail):
            return None
        fd = os.memfd_create("console")
        os.ftruncate(fd, CONSOLE_BYTES)
        return fd

    def remove(self, jail: str) -> None:
        """See `Jails`."""
        assert not self.inmates(jail), "something runs in it"
        if self._state.jails.pop(jail, None):
            self._note("remove", jail)

    def _new(self, jail: str, name: str) -> None:
        record = self._state.jails[jail]
        if name in record.files or name in record.devices:
            raise FileExistsError(name)

    def _note(self, *words: Any) -> None:
        self.calls.append(words)
        if self._file:
            self._file.write_bytes(msgspec.json.encode(self._state))
