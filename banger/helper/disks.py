"""Loop devices and dm-snapshots, as root's handlers see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

SECTOR = 512
"""Bytes: what device-mapper and the block layer count in."""

CHUNK = 8
"""Sectors that a snapshot copies at once: a block of ext4's, so that no more is copied than changes."""

MAX_MARK = 63
"""Bytes of text that a loop device carries (linux/loop.h, LO_NAME_SIZE with its NUL)."""


class Backing(NamedTuple):
    """The file below a loop device, by what no rename can change: st_dev and st_ino."""

    device: int
    inode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A loop device that is attached. `mark` is the text it carries, ours or somebody else's.

    `leaving`: it detaches by itself when the last that has it open lets go.
    """

    number: int
    backing: Backing
    mark: str
    read_only: bool
    leaving: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A dm device. `loops` are the numbers of the loop devices that it holds.

    One that is not `live` was made by halves: it has no table, or was not resumed.
    """

    name: str
    uuid: str
    live: bool
    loops: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A dm-snapshot to be made: `sectors` of loop device `origin`, but for what loop device `cow` holds."""

    name: str
    uuid: str
    origin: int
    cow: int
    sectors: int
    uid: int
    gid: int


class Loops(Protocol):
    """The host's loop devices (loop(4))."""

    def attach(self, fd: int, mark: str, read_only: bool) -> int:
        """Attach a free loop device to the file that `fd` is open on; give its number.

        The mark has at most 63 bytes. Raises OSError.
        """

    def loops(self) -> list[Loop]:
        """List those that are attached, whoever did it."""

    def detach(self, loop: Loop) -> None:
        """Detach it: at once, or when the last that has it open lets go.

        What is gone, or is on another file or has another mark by now, is left alone.
        """


class Devices(Protocol):
    """The host's dm devices (dmsetup(8))."""

    def can_snapshot(self) -> bool:
        """Tell whether the host can make dm-snapshots. Raises TimedOut."""

    def devices(self) -> list[Device]:
        """List them all. Raises ProgramFailed or TimedOut."""

    def create(self, snapshot: Snapshot) -> None:
        """Make a persistent dm-snapshot, and its node below /dev/mapper: its owner's, mode 0600.

        Raises ProgramFailed or TimedOut.
        """

    def node(self, snapshot: Snapshot) -> None:
        """Make it so that a device that exists has its node below /dev/mapper: its owner's, mode 0600."""

    def remove(self, name: str, uuid: str) -> bool:
        """Remove the device with this uuid, and its node; what is gone is no error.

        Tells False while it is open. A device of the same name with another uuid stays, and its node.
        Raises Refused when the uuid is none of ours, else ProgramFailed or TimedOut.
        """

    def status(self, name: str) -> str:
        """Give a snapshot's status: `allocated/total metadata` in sectors, `Invalid` or `Overflow`.

        Source: the kernel's admin-guide/device-mapper/snapshot. Raises ProgramFailed or TimedOut.
        """


class Disks(Loops, Devices, Protocol):
    """Both."""
