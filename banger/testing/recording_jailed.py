"""Firecracker on a host that is a record: the real driver and launcher, the real verbs, recorded jails.

What its API was told, and whether its guest is ready, is in a file beside the record of jails; each is true
as long as the process is there whose pid it begins with.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from banger.config import VmPaths
from banger.errors import WrongState
from banger.helper import names
from banger.helper.jails import Inmate
from banger.model import Process
from banger.tasks.context import Ask
from banger.tasks.jail import Jailed
from banger.tasks.root import Root
from banger.testing.root_jails import RecordingJails
from banger.vmm.firecracker import Firecracker
from banger.vmm.firecracker_api import Api, Body, Instance, Version

SIGKILL = 9
VERSION = (1, 13, 2)
Write = Callable[[Path, bytes], None]


class Inmates:
    """What runs in the recorded jails below a directory."""

    def __init__(self, place: Path):
        self._place = place / "root"

    def alive(self, process: Process) -> bool:
        """Tell whether this process is in a jail."""
        return any(_is(inmate, process) for _, inmate in self._all())

    def kill(self, process: Process) -> None:
        """End it as SIGKILL does: its jail stays."""
        for jail, inmate in self._all():
            if _is(inmate, process):
                RecordingJails(self._place).signal(jail, inmate, SIGKILL)

    def of(self, vm: str) -> list[Process]:
        """List what runs in a VM's jail."""
        jail = names.jail(os.getuid(), vm)
        return [
            Process(pid=inmate.pid, start_ticks=inmate.start_ticks, boot_id=inmate.boot_id)
            for name, inmate in self._all()
            if name == jail
        ]

    def said(self, vm: str, what: str) -> Path:
        """Give the file about one side of a VM."""
        return self._place / f"{vm}.{what}"

    def is_so(self, vm: str, what: str, process: Process) -> bool:
        """Tell whether something was written down of this very process."""
        path = self.said(vm, what)
        return path.exists() and path.read_bytes() == line(process)

    def _all(self) -> Sequence[tuple[str, Inmate]]:
        jails = RecordingJails(self._place)
        return [(jail.name, inmate) for jail in jails.jails() for inmate in jails.inmates(jail.name)]


def line(process: Process) -> bytes:
    """Give what a file about a process holds."""
    return b"%d\n" % process.pid


def _is(inmate: Inmate, process: Process) -> bool:
    return (inmate.pid, inmate.start_ticks) == (process.pid, process.start_ticks)


class RecordedApi(Api):
    """The API of a Firecracker that is a record: it takes everything, and remembers that it was started."""

    def __init__(self, started: Path, process: Process, write: Write):
        self._started = started
        self._process = process
        self._write = write

    def close(self) -> None:
        """Hang up."""

    def version(self) -> Version:
        """Tell its version."""
        return VERSION

    def instance(self) -> Instance:
        """Tell whether it was started."""
        started = self._started.exists() and self._started.read_bytes() == line(self._process)
        return Instance(id="record", state="Running" if started else "Not started", vmm_version="1.13.2")

    def _send(self, method: str, path: str, body: Body) -> None:  # noqa: ARG002  what it is told is not kept
        if path == "/actions":
            self._write(self._started, line(self._process))


class RecordingFirecracker(Firecracker):
    """The real driver over recorded jails."""

    def __init__(self, root: Root, ask: Ask, place: Path, write: Write):
        self._inmates = Inmates(place)
        super().__init__(Jailed(root, ask, alive=self._inmates.alive))
        self._write = write

    def alive(self, process: Process) -> bool:
        """Tell whether exactly this one still runs."""
        return self._inmates.alive(process)

    def wait_gone(self, process: Process, timeout_s: float) -> bool:  # noqa: ARG002  nothing ends by itself
        """Tell whether it has ended."""
        return not self.alive(process)

    @contextlib.contextmanager
    def _api(self, paths: VmPaths, timeout_s: float = 0.0) -> Iterator[Api]:  # noqa: ARG002  nothing takes time
        found = self.find(paths.vm)
        if not found:
            raise WrongState("Nobody listens.")
        yield RecordedApi(self._inmates.said(paths.vm, "started"), found[0], self._write)
