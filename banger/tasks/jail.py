"""Firecracker in jails that root makes: launched, found, reached and ended through root's helper."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

from banger import proc
from banger.config import VmPaths
from banger.errors import BangerError, HostLacks, Refused
from banger.helper.requests import JailConnect, JailLaunch, JailRemove
from banger.model import Process
from banger.tasks import root
from banger.tasks.context import Ask
from banger.tasks.root import Root
from banger.vmm import firecracker_api
from banger.vmm.driver import ROOT, Disk, Machine
from banger.vmm.firecracker import End, Firecracker, Seen

LAST_SAID = 4096
"""Characters of what Firecracker and its guest said last."""


def firecracker(root: Root, ask: Ask) -> Firecracker:
    """Give the machine monitor of VMs in jails; `ask` is how a step has root do something."""
    return Firecracker(Jailed(root, ask))


class Jailed:
    """The `Launcher` whose Firecrackers root starts, each in a jail of its own.

    Who runs is told by root's list of jails, never by a pid that somebody remembers.
    """

    def __init__(self, root: Root, ask: Ask, *, alive: Callable[[Process], bool] = proc.alive):
        self._root = root
        self._ask = ask
        self._alive = alive
        self._places: dict[str, Any] = {}

    def start(self, machine: Machine) -> Process:
        """Make it so that a fresh Firecracker runs; see `Launcher.start`. Raises Refused, HelperDown."""
        if self._jails(machine.vm):
            self.end(machine.vm, machine.paths)
        launch = JailLaunch(
            vm=machine.vm,
            disks=len(_files(machine)),
            snapshot=_files(machine) != machine.disks,
            address=machine.address,
        )
        with _opened(machine) as fds:
            self._places = self._ask(launch, fds).facts
        return Process(**{name: self._places[name] for name in Process.__struct_fields__})

    def seen(self, machine: Machine) -> Seen:
        """Give the places in the jail that was just made."""
        places = self._places
        return Seen(
            kernel=places["kernel"],
            initrd=places["initrd"],
            disks=tuple(_disks(machine, places)),
            vsock=places["vsock"],
        )

    def connect(self, paths: VmPaths, end: End) -> socket.socket:
        """Have root connect to one of its sockets; see `Launcher.connect`."""
        try:
            return socket.socket(fileno=self._given(paths.vm, end))
        except Refused:
            raise firecracker_api.gone() from None

    def launched(self, machine: Machine) -> Process | None:
        """Find it by the operation that root has marked its jail with; see `Launcher.launched`."""
        return next(iter(self._running(machine.vm, machine.op)), None)

    def find(self, vm: str) -> list[Process]:
        """Find what runs in the VM's jail, by root's list."""
        return self._running(vm)

    def end(self, vm: str, paths: VmPaths) -> None:
        """Have root remove the jail, and keep what was said in it; see `Launcher.end`."""
        with contextlib.suppress(BangerError, FileNotFoundError):
            self._keep(paths)
        self._ask(JailRemove(vm=vm), ())

    def said(self, paths: VmPaths) -> str:
        """Read the console, as far as root keeps it: its first MiB, without what is said after it."""
        with contextlib.suppress(BangerError, FileNotFoundError):
            self._keep(paths)
        with contextlib.suppress(FileNotFoundError):
            return paths.console.read_text("utf-8", "replace").strip()[-LAST_SAID:]
        return ""

    def _keep(self, paths: VmPaths) -> None:
        """Copy the console to where that of every VM is. Raises Refused when there is none any more."""
        with os.fdopen(self._given(paths.vm, "console"), "rb") as console:
            said = console.read().rstrip(b"\0")
        if said:
            paths.console.touch(mode=0o600)
            paths.console.write_bytes(said)

    def _given(self, vm: str, what: Any) -> int:
        (fd,) = self._ask(JailConnect(vm=vm, socket=what), ()).fds
        return fd

    def _jails(self, vm: str) -> list[root.Made]:
        return [made for made in root.made(self._root) if made.kind == "jail" and made.vm == vm]

    def _running(self, vm: str, op: str | None = None) -> list[Process]:
        return [
            made.process
            for made in self._jails(vm)
            if made.process is not None and op in (None, made.op) and self._alive(made.process)
        ]


def _files(machine: Machine) -> tuple[Disk, ...]:
    """Give the disks that are files of the owner's; one that root has made is put into the jail by itself."""
    return tuple(disk for disk in machine.disks if disk.serial != ROOT)


def _disks(machine: Machine, places: dict[str, Any]) -> Iterator[str]:
    """Tell where the disks are, in the machine's order."""
    files = iter(places["disks"])
    return (places["snapshot"] if disk.serial == ROOT else next(files) for disk in machine.disks)


@contextlib.contextmanager
def _opened(machine: Machine) -> Iterator[list[int]]:
    """Open what goes into the jail, in root's order. Raises HostLacks."""
    files = [(machine.kernel, True), (machine.initrd, True)]
    files += [(disk.path, disk.read_only) for disk in _files(machine)]
    fds: list[int] = []
    try:
        for path, read_only in files:
            fds.append(os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC))
        yield fds
    except FileNotFoundError as error:
        raise HostLacks(f"There is no {error.filename}.") from None
    finally:
        for fd in fds:
            os.close(fd)
