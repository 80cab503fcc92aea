"""What every virtual machine monitor must do: the values it gets and the promise it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from banger.config import VmPaths
from banger.model import Process, Value

# A VMM carries these in its environment from its first instruction to its last, so that it can be
# found without having been recorded.
MARK_VM = "BANGER_VM"
MARK_OP = "BANGER_OP"
MARK_ADDRESS = "BANGER_ADDRESS"


ROOT = "root"
"""The serial of a disk that is the guest's whole root: a device of the host's, not a file."""


class Disk(Value):
    """A raw disk file; the guest finds it by its `serial` (at most 20 bytes, as virtio-blk has it)."""

    serial: str
    path: Path
    read_only: bool = False


class Machine(Value):
    """A virtual machine that is ready to be launched: everything is decided, nothing is derived later.

    `words` is the kernel command line. Without a `tap` the guest has a network of its own, and
    `ssh_port` of the host's 127.0.0.1 leads to its port 22; on a tap it is at `address`.
    """

    vm: str
    op: str
    name: str
    vcpu: int
    memory_mib: int
    kernel: Path
    initrd: Path
    words: tuple[str, ...]
    disks: tuple[Disk, ...]
    ssh_port: int
    mac: str
    nat: bool
    paths: VmPaths
    tap: str | None = None
    address: str | None = None


class Running(Value):
    """A VMM process on the host: whose it is, and the port of 127.0.0.1 or the address its guest has."""

    vm: str
    process: Process
    ssh_port: int | None
    address: str | None = None


class Vmm(Protocol):
    """A virtual machine monitor. Its processes outlive us, so nothing is kept in memory between calls."""

    def launch(self, machine: Machine) -> Process:
        """Make it so that the machine runs; one that this operation started before is adopted.

        Raises PortTaken, Busy (a disk is in use), DiskFull, HostLacks, ProgramFailed or TimedOut;
        whatever was started may still be there then, and `destroy` removes it.
        """

    def find(self, vm: str) -> list[Process]:
        """Find the VMM processes of the VM with this id, by their environment."""

    def alive(self, process: Process) -> bool:
        """Tell whether exactly this VMM still runs."""

    def wait_gone(self, process: Process, timeout_s: float) -> bool:
        """Wait until this VMM has ended; False when it still runs after `timeout_s` seconds."""

    def age_s(self, process: Process) -> float:
        """Tell for how many seconds this VMM has been running."""

    def power_button(self, paths: VmPaths) -> None:
        """Press the guest's power button; whether it shuts down is the guest's affair.

        Raises WrongState when no VMM runs, TimedOut when it does not answer.
        """

    def destroy(self, vm: str, paths: VmPaths) -> None:
        """Make it so that no process, socket or pidfile of this VM exists; repeatable.

        Raises TimedOut when a process cannot be ended.
        """

    def crash_report(self, paths: VmPaths) -> str:
        """Tell what the VMM and the guest said last; empty when they said nothing."""
