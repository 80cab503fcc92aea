"""The names of what root makes: computed here from the caller's uid and the VM's id.

What the kernel lets carry a text carries a mark, so that it can be told from other people's.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

TAP_PREFIX = "fc-"
DEVICE_PREFIX = "fc-rootfs-"
UUID_PREFIX = "BANGER-"
TABLE = "banger"
"""The one nftables table (family inet) that root touches."""

_MARK = "banger"


def _digest(uid: int, vm: str) -> str:
    return hashlib.sha256(f"{uid} {vm}".encode()).hexdigest()


def tap(uid: int, vm: str) -> str:
    """Name a VM's tap: 13 bytes of the 15 that an interface's name may have."""
    return TAP_PREFIX + _digest(uid, vm)[:10]


def device(uid: int, vm: str) -> str:
    """Name a VM's dm device, which is below /dev/mapper."""
    return f"{DEVICE_PREFIX}{uid}-{vm}"


def device_uuid(uid: int, vm: str) -> str:
    """Give the uuid of a VM's dm device: at most 96 bytes of 128 (dm-ioctl.h, DM_UUID_LEN)."""
    return f"{UUID_PREFIX}{uid}-{vm}"


def loop(uid: int, vm: str, role: str) -> str:
    """Name one of a VM's loop devices in the ledger: what no kernel shows, so that it needs no number."""
    return f"{uid}-{vm}.{role}"


def loop_mark(uid: int, vm: str, role: str, op: str) -> str:
    """Mark a loop device: at most 63 bytes (loop.h, LO_NAME_SIZE), so a digest stands for VM and role."""
    return str(Mark(uid, _digest(uid, f"{vm} {role}")[:9], op))


def jail(uid: int, vm: str) -> str:
    """Name a VM's jail: at most 31 of the 64 letters, digits and hyphens that the jailer takes."""
    return f"{uid}-{_digest(uid, vm)[:20]}"


class Mark(NamedTuple):
    """Whose a thing is: in an interface's alias, a rule's comment, a loop's name."""

    uid: int
    vm: str
    op: str

    def __str__(self) -> str:
        return f"{_MARK} {self.uid} {self.vm} {self.op}"


def read_mark(text: str | None) -> Mark | None:
    """Read a mark; None when the text is none of ours."""
    match (text or "").split(" "):
        case [word, uid, vm, op] if word == _MARK and uid.isascii() and uid.isdecimal():
            return Mark(int(uid), vm, op)
    return None
