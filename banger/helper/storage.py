"""A VM's root disk where the kernel has device-mapper: an image that stays, and a file for what is changed.

Both files are the owner's, who opens them and sends the descriptors. Root attaches loop devices to exactly
those, makes a dm-snapshot of them, and gives it to the owner; it opens no path of theirs, and looks at no
file system: whoever is to check or mount one does it with his own rights.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from banger.errors import Refused
from banger.helper import given, names
from banger.helper.disks import CHUNK, SECTOR, Backing, Device, Disks, Loop, Snapshot
from banger.helper.host import Host
from banger.helper.ledger import Held, Ledger
from banger.helper.names import read_mark
from banger.helper.requests import SnapshotEnsure, SnapshotRemove
from banger.helper.verbs import Call, Facts, Verb

BASE, COW = "base", "cow"
MIN_BYTES, MAX_BYTES = 1 << 20, 1 << 44
"""1 MiB and 16 TiB, which is what ext4 can have with blocks of 4 KiB."""

MAX_OF_OWNER = 256
"""Snapshots that an owner may have at once: each takes two loop devices and memory of the kernel's."""

BUSY_S = 3.0
LOOK_S = 0.05

_HEADER = struct.Struct("<IIII")  # magic, valid, version, chunk size (dm-snap-persistent.c, disk_header)
_NEW, _MAGIC = 0, 0x70416E53


class File(NamedTuple):
    """A file that came with a request: which, and its size in bytes."""

    backing: Backing
    size: int


def ensure(host: Host, ledger: Ledger, call: Call, ask: SnapshotEnsure) -> Facts:
    """Make it so that a dm-snapshot exists over the two files that came along."""
    base, cow = _check_files(call)
    name = names.device(call.caller.uid, ask.vm)
    _check_free(host.disks, call.caller.uid, ask.vm, base.backing, cow.backing)
    _check_share(ledger, call.caller.uid, name)
    there = _device(host.disks, call.caller.uid, ask.vm)
    ledger.intend("snapshot", name, call, ask.vm)
    if there is None or not there.live:
        _clear(host, call.caller.uid, ask.vm, there)
        there = None
    sectors = base.size // SECTOR
    _make(host, ledger, call, ask.vm, sectors, there)
    ledger.hold("snapshot", name, sectors=sectors)
    return {"device": f"/dev/mapper/{name}", "sectors": sectors}


def remove(host: Host, ledger: Ledger, call: Call, ask: SnapshotRemove) -> Facts:
    """Make it so that the VM has no dm-snapshot and no loop device below one."""
    uid, name = call.caller.uid, names.device(call.caller.uid, ask.vm)
    # A jail has a node of it, whose number the next device gets, which may be another owner's.
    if ledger.get("jail", names.jail(uid, ask.vm)) is not None:
        raise Refused("The VM has a jail: remove that first.")
    _remove_device(host.disks, uid, ask.vm)
    for role in (COW, BASE):
        detach(host, ledger, uid, ask.vm, role)
    if ledger.get("snapshot", name) is not None:
        ledger.release("snapshot", name)
    return {}


def attach(host: Host, ledger: Ledger, call: Call, vm: str, role: str, fd: int, *, read_only: bool) -> Loop:
    """Make it so that a loop device of the VM's, told from its others by `role`, is on the file behind `fd`.

    The file has been checked. Raises Refused when the VM has one on another file, OSError.
    """
    uid, backing = call.caller.uid, _backing(os.fstat(fd))
    found = find(host, uid, vm, role)
    if found is not None and (found.backing, found.read_only) != (backing, read_only):
        raise Refused(f"The VM's {role} disk is another file, or open otherwise; remove that first.")
    row = _intend(ledger, call, vm, role, backing)
    if found is None:
        host.disks.attach(fd, row.facts["mark"], read_only)
        found = find(host, uid, vm, role)
        if found is None or found.backing != backing:
            raise Refused(f"The VM's {role} disk was attached and is not there.")
    ledger.hold("loop", row.name, number=found.number)
    return found


def detach(host: Host, ledger: Ledger, uid: int, vm: str, role: str) -> None:
    """Make it so that no loop device of the VM's has this role. Raises Refused while one is in use."""
    name = names.loop(uid, vm, role)

    def is_gone() -> bool:
        found = find(host, uid, vm, role)
        if found is None or not _is_on_record(ledger.get("loop", name), found):
            return True
        host.disks.detach(found)
        return find(host, uid, vm, role) is None

    _wait(is_gone, f"The VM's {role} disk is in use.")
    if ledger.get("loop", name) is not None:
        ledger.release("loop", name)


def find(host: Host, uid: int, vm: str, role: str) -> Loop | None:
    """Find a loop device by the mark that only root can have put on it, whichever operation did."""
    ours = read_mark(names.loop_mark(uid, vm, role, ""))
    marked = ((loop, read_mark(loop.mark)) for loop in host.disks.loops())
    return next((loop for loop, mark in marked if mark and ours and mark[:2] == ours[:2]), None)


def listing(host: Host, ledger: Ledger, uid: int) -> list[dict[str, str]]:
    """List this owner's loop devices and dm-snapshots as they are on the host.

    A snapshot's `status` tells how full it is; `Invalid` and `Overflow` mean that it is lost.
    """
    return [*_loops_of(host.disks, ledger, uid), *_snapshots_of(host.disks, ledger, uid)]


def _make(host: Host, ledger: Ledger, call: Call, vm: str, sectors: int, there: Device | None) -> None:
    """Attach both files and make the device; what is there of it already stays."""
    loops: list[Loop] = []
    try:
        for role, fd in zip((BASE, COW), call.fds, strict=True):
            loops.append(attach(host, ledger, call, vm, role, fd, read_only=role == BASE))
        snapshot = _snapshot(call, vm, sectors, *loops)
        if there is None:
            host.disks.create(snapshot)
        elif there.loops != tuple(sorted(loop.number for loop in loops)):
            raise Refused("The VM's root disk is made of other files; remove that first.")
        host.disks.node(snapshot)
    finally:
        # The device holds them now, and they go with it whoever removes it; without one they go at once.
        for loop in loops:
            host.disks.detach(loop)


def _snapshot(call: Call, vm: str, sectors: int, base: Loop, cow: Loop) -> Snapshot:
    return Snapshot(
        name=names.device(call.caller.uid, vm),
        uuid=names.device_uuid(call.caller.uid, vm),
        origin=base.number,
        cow=cow.number,
        sectors=sectors,
        uid=call.caller.uid,
        gid=call.caller.gid,
    )


def _clear(host: Host, uid: int, vm: str, half_made: Device | None) -> None:
    """Take away what was made by halves; loop devices that are leaving anyway are waited for."""
    if half_made is not None:
        _remove_device(host.disks, uid, vm)
    for role in (COW, BASE):
        _settle(host, uid, vm, role)


def _device(disks: Disks, uid: int, vm: str) -> Device | None:
    """Find the VM's device. Raises Refused when its name or uuid is on another."""
    name, uuid = names.device(uid, vm), names.device_uuid(uid, vm)
    found = [device for device in disks.devices() if device.name == name or device.uuid == uuid]
    if any((device.name, device.uuid) != (name, uuid) for device in found):
        raise Refused(f"There is a device {name} that is not banger's.")
    return next(iter(found), None)


def _remove_device(disks: Disks, uid: int, vm: str) -> None:
    name, uuid = names.device(uid, vm), names.device_uuid(uid, vm)
    _wait(lambda: disks.remove(name, uuid), "The VM's root disk is in use: end what has it open first.")


def _settle(host: Host, uid: int, vm: str, role: str) -> None:
    """Wait until a loop device that leaves by itself has left."""

    def is_settled() -> bool:
        found = find(host, uid, vm, role)
        return found is None or not found.leaving

    _wait(is_settled, f"The VM's {role} disk is in use.")


def _wait(is_done: Callable[[], bool], refusal: str) -> None:
    deadline = time.monotonic() + BUSY_S
    while not is_done():
        if time.monotonic() >= deadline:
            raise Refused(refusal)
        time.sleep(LOOK_S)


def _intend(ledger: Ledger, call: Call, vm: str, role: str, backing: Backing) -> Held:
    """Record a loop device before it is there; what is recorded of an earlier file, now gone, is replaced."""
    name = names.loop(call.caller.uid, vm, role)
    facts = {
        "mark": names.loop_mark(call.caller.uid, vm, role, call.op),
        "device": backing.device,
        "inode": backing.inode,
    }
    row = ledger.intend("loop", name, call, vm, **facts)
    if Backing(row.facts["device"], row.facts["inode"]) != backing:
        ledger.release("loop", name)
        row = ledger.intend("loop", name, call, vm, **facts)
    return row


def _is_on_record(row: Held | None, loop: Loop) -> bool:
    """Tell whether it is on the file that the ledger names; without a record its mark has to do."""
    return row is None or Backing(row.facts["device"], row.facts["inode"]) == loop.backing


def _loops_of(disks: Disks, ledger: Ledger, uid: int) -> Iterator[dict[str, str]]:
    known = {row.facts["mark"]: row for row in ledger.of_kind("loop", uid)}
    for loop in disks.loops():
        if (mark := read_mark(loop.mark)) and mark.uid == uid:
            row = known.get(loop.mark)
            name, vm = (row.name, row.vm) if row else (f"loop{loop.number}", "")
            yield {"kind": "loop", "id": name, "vm": vm, "op": mark.op}


def _snapshots_of(disks: Disks, ledger: Ledger, uid: int) -> Iterator[dict[str, str]]:
    ours = names.device_uuid(uid, "")
    for device in disks.devices():
        if device.uuid.startswith(ours):
            row = ledger.get("snapshot", device.name)
            yield {
                "kind": "snapshot",
                "id": device.name,
                "vm": device.uuid.removeprefix(ours),
                "op": row.op if row else "",
                "status": disks.status(device.name) if device.live else "half-made",
            }


def _check_share(ledger: Ledger, uid: int, name: str) -> None:
    have = {row.name for row in ledger.of_kind("snapshot", uid)}
    if name not in have and len(have) >= MAX_OF_OWNER:
        raise Refused(f"You have {len(have)} root disks, and no more than {MAX_OF_OWNER} are allowed.")


def _check_free(disks: Disks, uid: int, vm: str, base: Backing, cow: Backing) -> None:
    """Refuse files that are below other loop devices; a base may be below any number that only read."""
    own = {read_mark(names.loop_mark(uid, vm, role, "")) for role in (BASE, COW)}
    for loop in disks.loops():
        if (mark := read_mark(loop.mark)) and mark._replace(op="") in own:
            continue
        if loop.backing == cow:
            raise Refused("The file for changes is attached to a loop device already.")
        if loop.backing == base and not loop.read_only:
            raise Refused("The base file is being written to through a loop device.")


def _check_files(call: Call) -> tuple[File, File]:
    (base, cow), uid = call.fds, call.caller.uid
    files = _check_file(base, "base file"), _check_file(cow, "file for changes")
    if files[0].backing == files[1].backing:
        raise Refused("The base file and the file for changes are one.")
    if os.fstat(base).st_uid not in (uid, 0):
        raise Refused("The base file is not yours.")
    found = os.fstat(cow)
    if found.st_uid != uid:
        raise Refused("The file for changes is not yours.")
    if found.st_nlink != 1:
        raise Refused("The file for changes does not have exactly one name.")
    if fcntl.fcntl(cow, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND) != os.O_RDWR:
        raise Refused("The file for changes is not open to be read and written.")
    _check_header(cow)
    return files


def _check_file(fd: int, what: str) -> File:
    """Give what is behind a descriptor if a loop device may be attached to it; else raise Refused."""
    found = given.check_file(fd, what)
    if not MIN_BYTES <= found.st_size <= MAX_BYTES or found.st_size % SECTOR:
        raise Refused(f"The {what} has {found.st_size} bytes: not 1 MiB to 16 TiB in whole sectors.")
    return File(_backing(found), found.st_size)


def _check_header(cow: int) -> None:
    """Refuse what the kernel would take for a snapshot that is none of ours, or is lost.

    This is against accidents: the file stays its owner's, who may write to it at any time.
    """
    head = os.pread(cow, _HEADER.size, 0).ljust(_HEADER.size, b"\0")  # it may be cut off by now
    magic, valid, version, chunk = _HEADER.unpack(head)
    if magic == _NEW:
        return
    if (magic, version, chunk) != (_MAGIC, 1, CHUNK):
        raise Refused("The file for changes has other content.")
    if not valid:
        raise Refused("The file for changes was full once, and what it held is lost.")


def _backing(found: os.stat_result) -> Backing:
    return Backing(found.st_dev, found.st_ino)


VERBS = (
    Verb(ask=SnapshotEnsure, run=ensure, fds=lambda _: 2),
    Verb(ask=SnapshotRemove, run=remove),
)
