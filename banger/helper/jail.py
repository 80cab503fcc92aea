"""Firecracker in its jail: launch it, reach it, signal it, remove it."""

from __future__ import annotations

import errno
import os
import signal
import time

from banger.errors import HostLacks, ProgramFailed, Refused, TimedOut
from banger.helper import names, storage
from banger.helper.beneath import check_owned_file
from banger.helper.disks import SECTOR, Backing
from banger.helper.given import appends, check_file, is_read_only
from banger.helper.host import Host
from banger.helper.jails import API, CONSOLE_BYTES, VSOCK, Inmate, door_path
from banger.helper.ledger import Held, Ledger
from banger.helper.requests import JailConnect, JailLaunch, JailRemove, JailSignal
from banger.helper.verbs import Call, Facts, Verb

MAX_JAILS = 256
"""Of one owner."""

MAX_PAYLOAD = 64 << 20
"""Bytes of a kernel, and of an initrd: root's own disk holds a copy of each for each jail."""

READY_S = 10.0
END_S = 10.0
LOOK_S = 0.01

PAYLOADS = ("kernel", "initrd")
DISKS = tuple(f"disk{number}" for number in range(8))
SNAPSHOT = "snapshot"
PROCESS = ("pid", "start_ticks", "boot_id")
LISTED = (*PROCESS, "address")
SIGNALS = {"TERM": signal.SIGTERM, "KILL": signal.SIGKILL}


def launch(host: Host, ledger: Ledger, call: Call, ask: JailLaunch) -> Facts:
    """Make it so that Firecracker runs in the VM's jail, with what came with the request in it.

    What the same operation has started already is left as it is. Facts: pid, start_ticks, boot_id,
    uid, and where in the jail things are: kernel, initrd, disks, snapshot, api, vsock. The VM's tap,
    if it has one, is the jail's uid's from then on.
    Raises Refused for descriptors that are not files of the owner's, when another operation's
    Firecracker runs there, or the owner has too many jails; ProgramFailed with the end of what it
    wrote when it ends at once, TimedOut when its API does not answer.
    """
    uid, jail = call.caller.uid, names.jail(call.caller.uid, ask.vm)
    held = ledger.get("jail", jail)
    if host.jails.inmates(jail):
        if held is None or held.op != call.op:
            raise Refused("Firecracker runs in the VM's jail already.")
    else:
        _check(host, ledger, call, ask)
        _clear(host, ledger, uid, ask.vm)
        _check_unused(host, call.fds[len(PAYLOADS) :])
        known = {} if ask.address is None else {"address": ask.address}
        ledger.intend("jail", jail, call, ask.vm, uid=_free_uid(host, ledger), **known)
        try:
            _furnish(host, ledger, call, ask)
        except Exception:
            _clear(host, ledger, uid, ask.vm)
            raise
    inmate = _ready(host, ledger, uid, ask.vm)
    process = {name: getattr(inmate, name) for name in PROCESS}
    ledger.hold("jail", jail, **process)
    return {**process, "uid": inmate.uid, **_places(ask)}


def connect(host: Host, ledger: Ledger, call: Call, ask: JailConnect) -> Facts:
    """Give a descriptor connected to one of Firecracker's sockets, or one to read what it wrote.

    Raises Refused when there is none.
    """
    jail = _held(ledger, call.caller.uid, ask.vm)
    door = ask.socket
    found = host.jails.console(jail) if door == "console" else host.jails.connect(jail, door)
    if found is None:
        raise Refused("Nobody has what Firecracker wrote any more.")
    call.give.append(found)
    return {}


def send(host: Host, ledger: Ledger, call: Call, ask: JailSignal) -> Facts:
    """Send a signal to what runs in the VM's jail. Facts: to how many processes, 0 when it has ended."""
    jail = _held(ledger, call.caller.uid, ask.vm)
    inside = host.jails.inmates(jail)
    for inmate in inside:
        host.jails.signal(jail, inmate, SIGNALS[ask.signal])
    return {"sent": len(inside)}


def remove(host: Host, ledger: Ledger, call: Call, ask: JailRemove) -> Facts:
    """Make it so that the VM has no jail. Raises TimedOut when what runs there does not end."""
    _clear(host, ledger, call.caller.uid, ask.vm)
    return {}


def listing(host: Host, ledger: Ledger, uid: int) -> list[dict[str, str]]:
    """List an owner's jails that are on the host, and for each its VM's address and its first process."""
    found = []
    for jail in host.jails.jails():
        mark, held = names.read_mark(jail.mark), ledger.get("jail", jail.name)
        whose = mark or (held and names.Mark(held.uid, held.vm, held.op))
        if whose and whose.uid == uid:
            known = {name: str(held.facts[name]) for name in LISTED if held and name in held.facts}
            found.append({"kind": "jail", "id": jail.name, "vm": whose.vm, "op": whose.op, **known})
    return found


def _held(ledger: Ledger, uid: int, vm: str) -> str:
    """Name the VM's jail if root has made it; else raise Refused."""
    jail = names.jail(uid, vm)
    if ledger.get("jail", jail) is None:
        raise Refused(f"The VM {vm} has no jail.")
    return jail


def _places(ask: JailLaunch) -> Facts:
    """Tell where things are, as Firecracker sees them."""
    return {
        **{name: f"/{name}" for name in PAYLOADS},
        "disks": [f"/{name}" for name in DISKS[: ask.disks]],
        "snapshot": f"/{SNAPSHOT}" if ask.snapshot else None,
        **{door: door_path(door) for door in (API, VSOCK)},
    }


# -- before any effect ---------------------------------------------------------------------------


def _check(host: Host, ledger: Ledger, call: Call, ask: JailLaunch) -> None:
    """Raise Refused or HostLacks for what cannot be launched."""
    jail = names.jail(call.caller.uid, ask.vm)
    others = [held for held in ledger.of_kind("jail", call.caller.uid) if held.name != jail]
    if len(others) >= MAX_JAILS:
        raise Refused(f"You have {len(others)} jails; {MAX_JAILS} are allowed.")
    host.jails.version()
    for name, fd in zip(PAYLOADS, call.fds, strict=False):
        _check_payload(name, fd)
    for fd in call.fds[len(PAYLOADS) :]:
        _check_disk(fd, call.caller.uid)
    for tap in ledger.of_vm(call.caller.uid, ask.vm, "tap"):
        if not _is_there(host, tap):
            raise Refused(f"The VM {tap.vm} has no tap any more.")
    if ask.snapshot:
        _check_snapshot(host, ledger, call.caller.uid, ask.vm)


def _check_payload(name: str, fd: int) -> int:
    size = check_file(fd, name).st_size
    if not 0 < size <= MAX_PAYLOAD:
        raise Refused(f"The {name} has {size} bytes; 1 to {MAX_PAYLOAD} are allowed.")
    return size


def _check_disk(fd: int, uid: int) -> None:
    """Refuse what is no disk. A file that its owner opened only to be read may be anybody's."""
    found = check_file(fd, "disk")
    if not is_read_only(fd):
        check_owned_file(fd, uid)
        if appends(fd):
            raise Refused("A disk came as a descriptor that only appends.")
    if found.st_size <= 0 or found.st_size % SECTOR:
        raise Refused(f"A disk has {found.st_size} bytes: not a multiple of {SECTOR}.")


def _check_unused(host: Host, fds: tuple[int, ...]) -> None:
    """Refuse a file that is written through another loop device, or would be while another reads it."""
    reads = {Backing(found.st_dev, found.st_ino): is_read_only(fd) for fd in fds for found in [os.fstat(fd)]}
    if len(reads) != len(fds):
        raise Refused("The same file came as two disks.")
    for loop in host.disks.loops():
        if loop.backing in reads and not (loop.read_only and reads[loop.backing]):
            raise Refused("A disk is in use by another loop device.")


def _check_snapshot(host: Host, ledger: Ledger, uid: int, vm: str) -> None:
    name = names.device(uid, vm)
    ours = ledger.get("snapshot", name) is not None
    if not ours or not any(
        (device.name, device.uuid, device.live) == (name, names.device_uuid(uid, vm), True)
        for device in host.disks.devices()
    ):
        raise Refused(f"The VM {vm} has no dm-snapshot.")


def _is_there(host: Host, tap: Held) -> bool:
    link = host.net.link(tap.name)
    mark = names.read_mark(link.alias) if link else None
    return mark is not None and (mark.uid, mark.vm) == (tap.uid, tap.vm)


def _free_uid(host: Host, ledger: Ledger) -> int:
    """Choose a uid that no other jail has, and that nobody else has or may give to anybody."""
    used = {held.facts["uid"] for held in ledger.of_kind("jail")}
    others = host.jails.spoken_for()
    for uid in host.jails.uids:
        if uid not in used and not any(uid in some for some in others) and not host.jails.is_known(uid):
            return uid
    raise HostLacks(
        "There is no free uid for a jail.",
        hint=f"/etc/subuid or other jails have all of {host.jails.uids[0]} to {host.jails.uids[-1]}.",
    )


# -- the effects ---------------------------------------------------------------------------------


def _furnish(host: Host, ledger: Ledger, call: Call, ask: JailLaunch) -> None:
    """Make the jail, put everything into it, and start the jailer as the last thing."""
    jail = names.jail(call.caller.uid, ask.vm)
    held = ledger.get("jail", jail)
    assert held is not None
    uid, mark = held.facts["uid"], str(names.Mark(call.caller.uid, ask.vm, call.op))
    host.jails.make(jail, mark)
    for name, fd in zip(PAYLOADS, call.fds, strict=False):
        # Its owner may have made it longer since it was checked.
        host.jails.put_file(jail, name, fd, _check_payload(name, fd), uid)
    for name, fd in zip(DISKS, call.fds[len(PAYLOADS) :], strict=False):
        read_only = is_read_only(fd)
        loop = storage.attach(host, ledger, call, ask.vm, name, fd, read_only=read_only)
        host.jails.put_device(jail, name, f"/dev/loop{loop.number}", uid, read_only)
    if ask.snapshot:
        device = names.device(call.caller.uid, ask.vm)
        host.jails.put_device(jail, SNAPSHOT, f"/dev/mapper/{device}", uid, False)
    for tap in ledger.of_vm(call.caller.uid, ask.vm, "tap"):
        host.jails.give_tap(tap.name, uid)
    host.jails.start(jail, uid, mark)


def _ready(host: Host, ledger: Ledger, uid: int, vm: str) -> Inmate:
    """Wait until the API answers; what does not come that far is cleared away."""
    jail = names.jail(uid, vm)
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        inside = host.jails.inmates(jail)
        if not inside:
            said = _said(host, jail)
            _clear(host, ledger, uid, vm)
            raise ProgramFailed(f"Firecracker ended at once: {said or 'it said nothing'}")
        if inside[0].uid and _answers(host, jail):
            return inside[0]
        time.sleep(LOOK_S)
    _clear(host, ledger, uid, vm)
    raise TimedOut(f"Firecracker's API did not answer within {READY_S:g} s.")


def _answers(host: Host, jail: str) -> bool:
    try:
        os.close(host.jails.connect(jail, API))
    except Refused:
        return False
    return True


def _said(host: Host, jail: str) -> str:
    """Give the end of what Firecracker or its jailer wrote."""
    console = host.jails.console(jail)
    if console is None:
        return ""
    try:
        return os.pread(console, CONSOLE_BYTES, 0).rstrip(b"\0").decode("utf-8", "replace").strip()[-500:]
    finally:
        os.close(console)


def _clear(host: Host, ledger: Ledger, uid: int, vm: str) -> None:
    """Make it so that nothing of a VM's jail is left: first what runs in it, last the record of it."""
    jail = names.jail(uid, vm)
    _end(host, jail)
    _take_tap_back(host, ledger, uid, vm)
    host.jails.remove(jail)
    for role in _roles(host, ledger, uid, vm):
        storage.detach(host, ledger, uid, vm, role)
    ledger.release("jail", jail)


def _take_tap_back(host: Host, ledger: Ledger, uid: int, vm: str) -> None:
    """Give the VM's tap to its owner again: the next jail that has the uid may be another owner's."""
    if ledger.get("jail", names.jail(uid, vm)) is None:
        return
    for tap in ledger.of_vm(uid, vm, "tap"):
        if _is_there(host, tap):
            _give_back(host, tap.name, uid)


def _give_back(host: Host, tap: str, uid: int) -> None:
    """Wait until whoever had the tap open has let go of it: tun(4) knows one at a time."""
    deadline = time.monotonic() + END_S
    while True:
        try:
            host.jails.give_tap(tap, uid)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                raise
        time.sleep(LOOK_S)


def _end(host: Host, jail: str) -> None:
    deadline = time.monotonic() + END_S
    while inside := host.jails.inmates(jail):
        for inmate in inside:
            host.jails.signal(jail, inmate, signal.SIGKILL)
        if not all(host.jails.ended(inmate, max(deadline - time.monotonic(), 0)) for inmate in inside):
            raise TimedOut("What runs in the VM's jail did not end.")


def _roles(host: Host, ledger: Ledger, uid: int, vm: str) -> list[str]:
    """List which disks of the VM's jail are attached, by the marks on the host, or recorded."""
    there = {loop.mark.rpartition(" ")[0] for loop in host.disks.loops()}
    known = {row.name for row in ledger.of_vm(uid, vm, "loop")}
    return [
        role
        for role in DISKS
        if names.loop_mark(uid, vm, role, "").rstrip() in there or names.loop(uid, vm, role) in known
    ]


VERBS: tuple[Verb, ...] = (
    Verb(ask=JailLaunch, run=launch, fds=lambda ask: len(PAYLOADS) + ask.disks),
    Verb(ask=JailConnect, run=connect),
    Verb(ask=JailSignal, run=send),
    Verb(ask=JailRemove, run=remove),
)
