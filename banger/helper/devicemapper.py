"""dm-snapshots, by Debian's dmsetup(8); it is told not to wait for udev, which may not be there."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

from banger.errors import HostLacks, ProgramFailed, Refused
from banger.helper import program
from banger.helper.disks import CHUNK, Device, Snapshot
from banger.helper.loops import BLOCK_DEVICES, MAJOR, KernelLoops
from banger.helper.names import UUID_PREFIX

MAPPER = "/dev/mapper"

_WITHOUT_UDEV = ("--noudevsync", "--noudevrules")
_COLUMNS = ("name", "uuid", "suspended", "tables_loaded", "devnos_used")
_BUSY = re.compile(r"device or resource busy", re.IGNORECASE)


class KernelDevices:
    """The kernel's dm devices; a `Devices`."""

    def can_snapshot(self) -> bool:
        """Tell whether the host can make dm-snapshots; the kernel loads its modules for the answer."""
        try:
            program.run(["dmsetup", "target-version", "snapshot"])
        except (HostLacks, ProgramFailed):
            return False
        return True

    def devices(self) -> list[Device]:
        """List them all; none where the kernel has no device-mapper, or nobody has used it yet."""
        if not _is_loaded():
            return []
        # Neither a name nor a uuid has this separator: dmsetup writes it as \x7c.
        said = program.run(
            ["dmsetup", "info", "--columns", "--noheadings", "--separator", "|", "-o", ",".join(_COLUMNS)]
        )
        rows = (line.strip().split("|") for line in said.splitlines())
        return [_device(row) for row in rows if len(row) == len(_COLUMNS)]  # else: No devices found

    def create(self, snapshot: Snapshot) -> None:
        """Make a persistent dm-snapshot."""
        origin, cow = (f"{MAJOR}:{number:d}" for number in (snapshot.origin, snapshot.cow))
        program.run(
            [
                "dmsetup", "create", snapshot.name,
                "--uuid", snapshot.uuid,
                "--uid", f"{snapshot.uid:d}",
                "--gid", f"{snapshot.gid:d}",
                "--mode", "0600",
                *_WITHOUT_UDEV,
                "--table", f"0 {snapshot.sectors:d} snapshot {origin} {cow} P {CHUNK}",
            ]
        )  # fmt: skip

    def node(self, snapshot: Snapshot) -> None:
        """Make it so that a device that exists has its node below /dev/mapper: its owner's, mode 0600."""
        node = _open_node(Path(MAPPER, snapshot.name), _number(snapshot.name))
        try:
            os.fchmod(node, 0o600)
            os.fchown(node, snapshot.uid, snapshot.gid)
        finally:
            os.close(node)

    def remove(self, name: str, uuid: str) -> bool:
        """Remove the device with this uuid, and its node; what is gone is no error."""
        if not uuid.startswith(UUID_PREFIX):
            raise Refused(f"The device {name} is not banger's.")
        devices, node = self.devices(), Path(MAPPER, name)
        if any(device.name == name and device.uuid != uuid for device in devices):
            return not any(device.uuid == uuid for device in devices) or _remove(uuid)
        owner = give_node(node, 0)
        if any(device.uuid == uuid for device in devices) and not _remove(uuid):
            give_node(node, owner)
            return False
        # dmsetup may have been killed before it got to the node.
        node.unlink(missing_ok=True)
        return True

    def status(self, name: str) -> str:
        """Give a snapshot's status."""
        said = program.run(["dmsetup", "status", name]).split()
        return " ".join(said[3:])  # after: start, length, "snapshot"


class KernelDisks(KernelLoops, KernelDevices):
    """The kernel's loop and dm devices; a `Disks`."""


def _is_loaded() -> bool:
    with open("/proc/misc") as devices:  # noqa: PTH123  the kernel's own
        return any(line.split()[1:] == ["device-mapper"] for line in devices)


def _device(row: list[str]) -> Device:
    name, uuid, suspended, tables, used = row
    numbers = (word.split(":") for word in used.split(",") if word)
    return Device(
        name=name,
        uuid=uuid,
        live=tables in ("Live", "Both") and suspended == "Active",
        loops=tuple(sorted(int(minor) for major, minor in numbers if int(major) == MAJOR)),
    )


def _remove(uuid: str) -> bool:
    try:
        program.run(["dmsetup", "remove", *_WITHOUT_UDEV, "--uuid", uuid])
    except ProgramFailed as failed:
        if _BUSY.search(failed.message):
            return False
        raise
    return True


def _number(name: str) -> int:
    """Give a live device's number, as in st_rdev. Raises ProgramFailed when it is gone."""
    for told in BLOCK_DEVICES.glob("dm-*/dm/name"):
        if told.read_text() == f"{name}\n":
            major, minor = (told.parents[1] / "dev").read_text().split(":")
            return os.makedev(int(major), int(minor))
    raise ProgramFailed(f"The device {name} is gone.")


def _open_node(path: Path, number: int) -> int:
    """Open a device's node, made anew when it is another's or none."""
    with contextlib.suppress(FileNotFoundError):
        if not _leads_to(path.lstat(), number):
            give_node(path, 0)
            path.unlink()
    with contextlib.suppress(FileExistsError):
        os.mknod(path, stat.S_IFBLK | 0o600, number)
    node = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not _leads_to(os.fstat(node), number):
        os.close(node)
        raise ProgramFailed(f"{path} leads to another device.")
    return node


def give_node(node: Path, uid: int) -> int:
    """Give a node to a user, if it is there; tell whose it was.

    Who holds on to a node of his (O_PATH of open(2)) can open it as long as it is his, also when its
    number has become another device's.
    """
    with contextlib.suppress(FileNotFoundError):
        directory = os.open(node.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            owner = node.lstat().st_uid
            os.chown(node.name, uid, -1, dir_fd=directory, follow_symlinks=False)
            return owner
        finally:
            os.close(directory)
    return 0


def _leads_to(found: os.stat_result, number: int) -> bool:
    return stat.S_ISBLK(found.st_mode) and found.st_rdev == number
