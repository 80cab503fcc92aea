"""Firecracker's jails, as root's handlers see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

UIDS = range(200_000, 265_536)
"""Where the uids of jails come from; each jail has one, and the gid of the same number."""

Door = Literal["api", "vsock"]
API: Door = "api"
VSOCK: Door = "vsock"

CONSOLE_BYTES = 1 << 20
"""What is kept of Firecracker's output: the first of it, which tells of the boot."""

RUN = "run"
"""The one directory in a jail where Firecracker makes its sockets."""


def door_path(door: Door) -> str:
    """Name a socket as Firecracker sees it in its jail."""
    return f"/{RUN}/{door}.socket"


class Jail(NamedTuple):
    """A jail that exists. `mark` is empty when it was made by halves."""

    name: str
    mark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inmate:
    """A process in a jail, told apart from a later one with its pid as `banger.model.Process` does.

    `uid` is 0 while it is the jailer that has not become Firecracker yet.
    """

    pid: int
    start_ticks: int
    boot_id: str
    uid: int


class Version(NamedTuple):
    """A version of Firecracker."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return ".".join(map(str, self))


class Jails(Protocol):
    """The jails below one directory that only root can enter, and what is in them."""

    @property
    def uids(self) -> range:
        """Tell where the uids of jails come from."""

    def version(self) -> Version:
        """Give Firecracker's version, which is its jailer's, too.

        Raises HostLacks when either is missing, not root's own, too old, or not of that version.
        """

    def spoken_for(self) -> Sequence[range]:
        """List the uids and gids that others have, or may give away (subuid(5)), or that run something."""

    def is_known(self, uid: int) -> bool:
        """Tell whether any source of users or groups has this uid or gid, such as a directory service."""

    def jails(self) -> list[Jail]:
        """List the jails."""

    def inmates(self, jail: str) -> list[Inmate]:
        """List what runs in a jail: with its root there, as the uid that the jail is owned by."""

    def make(self, jail: str, mark: str) -> None:
        """Make a jail with nothing in it; raise Refused when there is one."""

    def put_file(self, jail: str, name: str, fd: int, size: int, uid: int) -> None:
        """Copy `size` bytes from a descriptor into a new file of the jail, readable for `uid` only.

        Raises Refused when it has become shorter.
        """

    def put_device(self, jail: str, name: str, device: str, uid: int, read_only: bool) -> None:
        """Make a new node in the jail for the block device that `device` is a node of, for `uid` only."""

    def give_tap(self, tap: str, uid: int) -> None:
        """Make it so that `uid`, and nobody else but root, may open a tap that exists. Raises OSError."""

    def start(self, jail: str, uid: int, mark: str) -> None:
        """Start the jailer, which becomes Firecracker. Raises HostLacks as `version` does."""

    def signal(self, jail: str, inmate: Inmate, number: int) -> None:
        """Send a signal to it if it still is what it was; to nobody else, whoever has its pid by now."""

    def ended(self, inmate: Inmate, timeout_s: float) -> bool:
        """Wait until it has ended; tell whether it has."""

    def connect(self, jail: str, door: Door) -> int:
        """Give a descriptor connected to a socket that Firecracker listens on; else raise Refused."""

    def console(self, jail: str) -> int | None:
        """Give a descriptor of what Firecracker has written: a file of CONSOLE_BYTES that ends in zeros.

        None when nobody has it any more.
        """

    def remove(self, jail: str) -> None:
        """Remove a jail in which nothing runs, whatever is in it; what is gone is no error."""
