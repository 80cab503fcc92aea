"""Root disks by dm-snapshot: what is made, what is refused, and that a kill anywhere changes neither."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from banger.errors import Refused
from banger.helper import names, program, storage
from banger.helper.disks import Backing, Device, Loop
from banger.helper.host import Host
from banger.helper.ledger import Ledger
from banger.helper.requests import Ask, Request, SnapshotEnsure, SnapshotRemove
from banger.helper.verbs import Call, Caller
from banger.testing.root_disks import RecordingDisks, dies

ROOT = os.geteuid() == 0
UID = 1000 if ROOT else os.getuid()
GID = 1000
OTHER = 65534
VM = "web"
NAME = f"fc-rootfs-{UID}-{VM}"
BASE_BYTES, COW_BYTES = 4 << 20, 5 << 20

ENSURE, REMOVE = SnapshotEnsure(vm=VM), SnapshotRemove(vm=VM)
root_only = pytest.mark.skipif(not ROOT, reason="only root can make other people's files")


class World:
    """Two files of an owner's, a host and root's ledger, all of which outlive a process that is killed."""

    def __init__(self, place: Path, note: Callable[[Refused], None]):
        self.place = place
        self.base, self.cow = self.file("base", BASE_BYTES), self.file("cow", COW_BYTES)
        self._fds: list[int] = []
        self.note = note

    def file(self, name: str, size: int, uid: int = UID) -> Path:
        """Make a sparse file of somebody's."""
        path = self.place / name
        path.touch()
        os.truncate(path, size)
        os.chown(path, uid, -1)
        return path

    def open(self, path: Path, flags: int = os.O_RDWR) -> int:
        """Open something as its owner would, to be closed at the end."""
        self._fds.append(os.open(path, flags | os.O_CLOEXEC))
        return self._fds[-1]

    def keep(self, fd: int) -> int:
        """Have a descriptor closed at the end."""
        self._fds.append(fd)
        return fd

    def disks(self) -> RecordingDisks:
        """Give the host's disks, as they are now."""
        return RecordingDisks(self.place)

    def ledger(self) -> Ledger:
        """Open root's ledger, as it is now."""
        return Ledger(sqlite3.connect(self.place / "root.db", isolation_level=None))

    def ensure(self, disks: Any = None, **changes: Any) -> dict[str, Any]:
        """Ask for the snapshot, with a fresh descriptor of each file."""
        fds = (self.open(self.base, os.O_RDONLY), self.open(self.cow))
        return storage.ensure(_host(disks or self.disks()), self.ledger(), _call(fds, **changes), ENSURE)

    def remove(self, disks: Any = None, **changes: Any) -> dict[str, Any]:
        """Ask for it to be gone."""
        return storage.remove(_host(disks or self.disks()), self.ledger(), _call((), **changes), REMOVE)

    def there(self) -> dict[str, Any]:
        """Tell what is on the host and in the ledger, but for what a number or an operation is."""
        disks = self.disks()
        return {
            "loops": [(loop.backing, loop.read_only, loop.leaving) for loop in disks.loops()],
            "devices": disks.devices(),
            "nodes": disks.nodes(),
            "ledger": sorted((row.kind, row.name, row.state) for row in self.ledger().of_owner(UID)),
            "listing": storage.listing(_host(disks), self.ledger(), UID),
        }

    def close(self) -> None:
        """Close what was opened."""
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def world(request: pytest.FixtureRequest, refused: Callable[..., None]) -> Iterator[World]:
    """A world of its own, on a file system that root relies on; what it refuses is put on the record."""
    place = Path(tempfile.mkdtemp(prefix="bg-", dir="/dev/shm"))
    case = request.node.name.removeprefix("test_").replace("_", " ").capitalize()
    made = World(place, lambda error: refused(case, error))
    yield made
    made.close()
    shutil.rmtree(place)


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BUSY_S", 0.1)
    monkeypatch.setattr(storage, "LOOK_S", 0.01)


NOTHING: dict[str, Any] = {"loops": [], "devices": [], "nodes": {}, "ledger": [], "listing": []}


def test_a_snapshot_is_made_of_the_two_files(world: World) -> None:
    """The base is attached read-only, changes go into the other file, the device is the caller's alone."""
    disks = world.disks()
    assert world.ensure(disks) == {"device": f"/dev/mapper/{NAME}", "sectors": BASE_BYTES // 512}
    base, cow = disks.loops()
    assert (base.backing, base.read_only) == (_backing(world.base), True)
    assert (cow.backing, cow.read_only) == (_backing(world.cow), False)
    device = Device(name=NAME, uuid=f"BANGER-{UID}-{VM}", live=True, loops=(base.number, cow.number))
    assert disks.devices() == [device]
    assert disks.nodes() == {NAME: (UID, GID)}
    assert [call[0] for call in disks.calls] == ["attach", "attach", "create", "node", "detach", "detach"]
    # Whoever removes the device, root or the host's admin, no file stays attached.
    assert base.leaving
    assert cow.leaving


def test_asked_again_it_stays_as_it_is(world: World) -> None:
    """A second request finds everything and makes nothing, under the operation that made it."""
    told, before = world.ensure(), world.there()
    disks = world.disks()
    assert world.ensure(disks, op="op-later") == told
    assert world.there() == before
    assert not {"attach", "create", "remove"} & {call[0] for call in disks.calls}
    assert {row["op"] for row in before["listing"]} == {"op-made"}


def test_removed_nothing_is_left(world: World) -> None:
    """After a removal neither the host nor the ledger knows of it; a second removal finds nothing to do."""
    world.ensure()
    assert world.remove() == {}
    assert world.there() == NOTHING
    assert world.remove() == {}
    assert world.there() == NOTHING


def test_what_was_never_made_can_be_removed(world: World) -> None:
    """A removal without anything to remove succeeds and changes nothing."""
    assert world.remove() == {}
    assert world.there() == NOTHING


def test_the_listing_tells_what_is_really_there(world: World) -> None:
    """Listed is what the host has of this owner's, with VM and operation, and how full the snapshot is."""
    world.ensure()
    listed = world.there()["listing"]
    assert listed == [
        {"kind": "loop", "id": f"{UID}-{VM}.base", "vm": VM, "op": "op-made"},
        {"kind": "loop", "id": f"{UID}-{VM}.cow", "vm": VM, "op": "op-made"},
        {"kind": "snapshot", "id": NAME, "vm": VM, "op": "op-made", "status": "16/2048 16"},
    ]
    assert storage.listing(_host(world.disks()), world.ledger(), OTHER) == []
    (world.place / "disks.json").unlink()  # as a reboot does: the ledger's rows alone are not listed
    assert world.there()["listing"] == []


def test_two_owners_with_a_vm_of_one_name_do_not_meet(world: World) -> None:
    """Each owner's VM has its own device, and removing one leaves the other."""
    world.ensure()
    mine = world.there()
    assert storage.remove(_host(world.disks()), world.ledger(), _call((), uid=OTHER), REMOVE) == {}
    assert world.there() == mine


@pytest.mark.parametrize("then", ["ensure", "remove"])
@pytest.mark.parametrize("first", ["ensure", "remove"])
def test_killed_anywhere_it_is_finished_or_undone(world: World, first: str, then: str) -> None:
    """Killed before or after any of its effects, the next request ends as if nobody had been killed."""
    world.ensure()
    whole = world.there()
    world.remove()
    boundary = 0
    while True:
        boundary += 1
        if first == "remove":
            world.ensure()
        run = world.ensure if first == "ensure" else world.remove
        killed = dies(run, world.disks(), boundary)
        (world.ensure if then == "ensure" else world.remove)()
        assert world.there() == (whole if then == "ensure" else NOTHING), f"{first}, boundary {boundary}"
        world.remove()
        assert world.there() == NOTHING, f"{first}, boundary {boundary}"
        if not killed:
            break
    assert boundary > (12 if first == "ensure" else 2)


def test_after_a_reboot_it_is_made_again(world: World) -> None:
    """When the host has lost everything and the ledger has not, it can be made, and be forgotten."""
    world.ensure()
    whole = world.there()
    (world.place / "disks.json").unlink()
    world.ensure()
    assert world.there() == whole
    (world.place / "disks.json").unlink()
    world.remove()
    assert world.there() == NOTHING


def test_a_lost_ledger_leaves_the_marks(world: World) -> None:
    """What the ledger does not know is found by the marks that only root can have made."""
    world.ensure()
    (world.place / "root.db").unlink()
    world.remove()
    assert world.there() == NOTHING


def test_after_a_failed_attempt_other_files_may_be_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is recorded of files that nothing is attached to any more does not bind the VM to them."""
    disks = world.disks()
    monkeypatch.setattr(disks, "create", _fails)
    with pytest.raises(OSError, match="no device"):
        world.ensure(disks)
    assert world.disks().loops() == []
    world.cow = world.file("new cow", COW_BYTES)
    world.ensure()
    assert world.disks().loops()[1].backing == _backing(world.cow)


def test_a_device_made_by_halves_is_made_anew(world: World) -> None:
    """A device without a table, or not resumed, is removed and made again over the right files."""
    disks = world.disks()
    disks.plant(Device(name=NAME, uuid=f"BANGER-{UID}-{VM}", live=False, loops=()))
    assert storage.listing(_host(disks), world.ledger(), UID)[0]["status"] == "half-made"
    world.ensure()
    assert [device.live for device in world.disks().devices()] == [True]
    world.remove()
    assert world.there() == NOTHING


def test_one_in_use_is_not_removed(world: World) -> None:
    """While something has the device open, removal is refused in one sentence, and all of it stays."""
    world.ensure()
    before, disks = world.there(), world.disks()
    disks.in_use.add(NAME)
    with pytest.raises(Refused, match="in use"):
        world.remove(disks)
    assert world.there() == before
    world.remove()
    assert world.there() == NOTHING


def test_other_files_than_those_it_is_made_of_are_refused(world: World) -> None:
    """A request with another file for a device that exists is refused; the device stays."""
    world.ensure()
    before = world.there()
    world.cow = world.file("other cow", COW_BYTES)
    _refused(world, "remove that first", before)


@pytest.mark.parametrize(
    "vm",
    [
        "../control", "a b", "\n0 1 linear", "web\n", "a" * 64, "a" * 128, "", "-a", "A", "a_b", "a/b", "a.b",
        "\u0430", "a\0", "%s", "BANGER-0",
    ],
)  # fmt: skip
def test_h27_odd_names_do_not_pass_the_schema(vm: str) -> None:
    """No name but a VM's plain one is decoded, so no other can become part of a device's name."""
    for tag in ("snapshot.ensure", "snapshot.remove"):
        packet = {"op": "op-1", "step": "disk", "epoch": 1, "key": "k", "ask": {"verb": tag, "vm": vm}}
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(msgspec.json.encode(packet), type=Request)


def test_h27_a_device_that_is_not_ours_stays(world: World) -> None:
    """A device of our name with another uuid is neither used nor removed, nor is its node."""
    disks = world.disks()
    foreign = Device(name=NAME, uuid="LVM-abc", live=True, loops=())
    disks.plant(foreign)
    _refused(world, "not banger's", world.there())
    world.remove(disks)
    assert disks.devices() == [foreign]


def test_h27_names_and_uuids_fit_into_the_kernels_fields() -> None:
    """The longest VM name of the highest uid still gives a name, a uuid and a mark that are not cut off."""
    uid, vm, op = 2**32 - 1, "a" * 63, "op-" + "z" * 32
    assert len(names.device(uid, vm)) < 128
    assert len(names.device_uuid(uid, vm)) < 129
    marks = {names.loop_mark(uid, vm, role, op) for role in ("base", "cow", "disk0", "disk7")}
    assert {len(mark) for mark in marks} == {63}
    assert len(marks) == 4


def test_h28_no_request_can_name_a_device(world: World) -> None:
    """The only thing to say is which VM; files come as descriptors, and there are exactly two."""
    for ask in (SnapshotEnsure, SnapshotRemove):
        assert ask.__struct_fields__ == ("vm",)
    verbs = {verb.ask: verb for verb in storage.VERBS}
    assert (verbs[SnapshotEnsure].fds(ENSURE), verbs[SnapshotRemove].fds(REMOVE)) == (2, 0)


@root_only
@pytest.mark.parametrize("which", ["base", "cow"])
def test_h28_a_device_is_no_base_and_takes_no_changes(world: World, which: str) -> None:
    """A block or character device behind a descriptor is refused."""
    for kind, number in ((0o060600, os.makedev(7, 0)), (0o020600, os.makedev(1, 5))):
        path = world.place / f"node{kind}"
        os.mknod(path, kind, number)
        os.chown(path, UID, GID)
        flags = os.O_PATH if kind == 0o060600 else os.O_RDWR
        _refused_files(world, which, world.open(path, flags), "not a regular file")


def test_h29_a_loop_device_on_another_file_stays(world: World) -> None:
    """A device of our mark whose file is not the recorded one is not detached, whatever its number."""
    world.ensure()
    disks = world.disks()
    base = disks.loops()[0]
    disks.remove(NAME, f"BANGER-{UID}-{VM}")
    foreign = replace(base, backing=Backing(1, 2), leaving=False)
    disks.plant(foreign)
    unmarked = replace(foreign, number=9, mark="/var/lib/snapd/snaps/core.snap")
    disks.plant(unmarked)
    world.remove()
    assert world.disks().loops() == [foreign, unmarked]


def _make_symlink(world: World) -> int:
    (world.place / "link").symlink_to(world.cow)
    return world.open(world.place / "link", os.O_PATH | os.O_NOFOLLOW)


def _make_hard_link(world: World) -> int:
    (world.place / "link").hardlink_to(world.cow)
    return world.open(world.cow)


def _make_fifo(world: World) -> int:
    os.mkfifo(world.place / "fifo")
    return world.open(world.place / "fifo", os.O_RDWR)


def _make_deleted(world: World) -> int:
    fd = world.open(world.file("gone", COW_BYTES))
    (world.place / "gone").unlink()
    return fd


def _make_memory(world: World) -> int:
    fd = world.keep(os.memfd_create("cow"))
    os.truncate(fd, COW_BYTES)
    return fd


def _make_socket(world: World) -> int:
    return world.keep(socket.socket(socket.AF_UNIX).detach())


H31: dict[str, tuple[Callable[[World], int], str]] = {
    "symbolic link": (_make_symlink, "not a regular file"),
    "hard link": (_make_hard_link, "exactly one name"),
    "fifo": (_make_fifo, "not a regular file"),
    "directory": (lambda world: world.open(world.place, os.O_RDONLY), "not a regular file"),
    "socket": (_make_socket, "not a regular file"),
    "deleted file": (_make_deleted, "not a regular file that has a name"),
    "memory": (_make_memory, "not a regular file that has a name"),
    "path only": (lambda world: world.open(world.cow, os.O_PATH), "not open to be read"),
    "write only": (lambda world: world.open(world.cow, os.O_WRONLY), "not open to be read"),
    "read only": (lambda world: world.open(world.cow, os.O_RDONLY), "read and written"),
    "append only": (lambda world: world.open(world.cow, os.O_RDWR | os.O_APPEND), "read and written"),
    "of the kernel": (lambda world: world.open(Path("/proc/self/status"), os.O_RDONLY), "does not rely on"),
    "the base itself": (lambda world: world.open(world.base), "are one"),
    "other content": (
        lambda world: world.open(_written(world.file("text", COW_BYTES), b"#!/bin/sh\necho hi\n")),
        "other content",
    ),
}


@pytest.mark.parametrize("kind", H31)
def test_h31_odd_files_take_no_changes(world: World, kind: str) -> None:
    """A file for changes that is not the caller's plain file, open to be read and written, is refused."""
    make, sentence = H31[kind]
    _refused_files(world, "cow", make(world), sentence)


@pytest.mark.parametrize(
    "kind",
    ["symbolic link", "fifo", "directory", "socket", "deleted file", "memory", "path only", "write only"],
)
def test_h31_odd_files_are_no_base(world: World, kind: str) -> None:
    """A base that is not a plain file, open to be read, is refused."""
    make, sentence = H31[kind]
    _refused_files(world, "base", make(world), sentence)


@root_only
@pytest.mark.parametrize(("which", "uid"), [("base", OTHER), ("cow", OTHER), ("cow", 0)])
def test_h31_other_peoples_files_are_refused(world: World, which: str, uid: int) -> None:
    """A file of another user is refused even if the caller could open it; for changes also root's."""
    fd = world.open(world.file("theirs", COW_BYTES, uid))
    _refused_files(world, which, fd, "not yours")


@root_only
def test_a_base_may_be_roots(world: World) -> None:
    """An image that root keeps for all owners serves as a base."""
    os.chown(world.base, 0, 0)
    world.ensure()
    assert world.disks().loops()[0].backing == _backing(world.base)


def test_h32_files_swapped_under_their_names_change_nothing(world: World) -> None:
    """What is attached is what was opened, whatever is under its name by then."""
    opened = _backing(world.cow)
    fds = (world.open(world.base), world.open(world.cow))
    world.file("other", COW_BYTES).rename(world.cow)
    world.file("old", COW_BYTES)
    with pytest.raises(Refused, match="regular file that has a name"):  # the rename has deleted it
        storage.ensure(_host(world.disks()), world.ledger(), _call(fds), ENSURE)
    fds = (world.open(world.base), world.open(world.cow))
    opened = _backing(world.cow)
    world.cow.rename(world.place / "aside")
    world.file("cow", COW_BYTES)
    storage.ensure(_host(world.disks()), world.ledger(), _call(fds), ENSURE)
    assert world.disks().loops()[1].backing == opened != _backing(world.cow)


def test_h34_nothing_is_mounted() -> None:
    """There is no verb that mounts."""
    tags = {str(ask.__struct_config__.tag) for ask in Ask.__subclasses__()}
    assert {"snapshot.ensure", "snapshot.remove"} <= tags
    assert [tag for tag in tags if "mount" in tag] == []


@pytest.mark.parametrize("which", ["base", "cow"])
@pytest.mark.parametrize(
    "size", [0, 511, 1 << 19, (1 << 20) - 512, (1 << 20) + 1, (1 << 44) + 512, (1 << 62) + 512]
)
def test_h35_odd_sizes_are_refused(world: World, which: str, size: int) -> None:
    """Less than 1 MiB, more than 16 TiB, and what is not in whole sectors is refused."""
    fd = world.open(world.place / "odd", os.O_RDWR | os.O_CREAT)
    os.fchown(fd, UID, -1)
    _refused_files(world, which, _sized(fd, size), "bytes: not")


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 512, 1 << 44])
def test_h35_sizes_at_the_edge_are_taken(world: World, size: int) -> None:
    """The least, the greatest, and any whole number of sectors between them will do."""
    world.base, world.cow = world.file("b", size), world.file("c", size)
    assert world.ensure()["sectors"] == size // 512


@pytest.mark.parametrize("status", ["Invalid", "Overflow"])
def test_h36_one_that_is_full_says_so(world: World, status: str) -> None:
    """The listing tells the owner of a snapshot that is lost, and it can be removed."""
    world.ensure()
    world.disks().fill(NAME, status)
    assert [row["status"] for row in world.there()["listing"] if row["kind"] == "snapshot"] == [status]
    world.remove()
    assert world.there()["loops"] == []


def test_h36_one_that_was_full_is_not_started_again(world: World) -> None:
    """A file for changes that the kernel has marked as lost is refused, with the reason."""
    _written(world.cow, b"SnAp" + bytes([0, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0]))
    _refused(world, "was full once", NOTHING)
    _written(world.cow, b"SnAp" + bytes([1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0]))
    world.ensure()


def test_h36_an_owner_has_a_share(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past his share an owner gets no more snapshots; those he has can be asked for again."""
    monkeypatch.setattr(storage, "MAX_OF_OWNER", 1)
    world.ensure()
    world.ensure()
    before = world.there()
    fds = (world.open(world.base), world.open(world.file("more", COW_BYTES)))
    with pytest.raises(Refused, match="no more than 1"):
        storage.ensure(_host(world.disks()), world.ledger(), _call(fds), SnapshotEnsure(vm="other"))
    assert world.there() == before


def test_h37_root_runs_nothing_that_reads_a_file_system() -> None:
    """No program that makes, checks, mounts or changes a file system is among those that root may run."""
    readers = ("mkfs", "mke2fs", "fsck", "e2fsck", "debugfs", "resize2fs", "tune2fs", "dumpe2fs", "mount")
    assert [name for name in program.PROGRAMS if name.startswith(readers)] == []


def test_a_file_attached_elsewhere_takes_no_changes(world: World) -> None:
    """A file for changes that is below any other loop device is refused; of a base, only one written to."""
    disks = world.disks()
    elsewhere = Loop(number=7, backing=_backing(world.cow), mark="", read_only=True, leaving=False)
    disks.plant(elsewhere)
    _refused(world, "attached to a loop device already", world.there())
    disks.plant(replace(elsewhere, backing=_backing(world.base), read_only=False))
    _refused(world, "being written to", world.there())
    disks.plant(replace(elsewhere, backing=_backing(world.base)))
    world.ensure()


def test_a_base_serves_many(world: World) -> None:
    """Two VMs on one base have a loop device each, and one's removal leaves the other's."""
    world.ensure()
    fds = (world.open(world.base), world.open(world.file("second", COW_BYTES)))
    second = SnapshotEnsure(vm="second")
    storage.ensure(_host(world.disks()), world.ledger(), _call(fds), second)
    backings = [loop.backing for loop in world.disks().loops()]
    assert backings.count(_backing(world.base)) == 2
    world.remove()
    assert [device.name for device in world.disks().devices()] == [f"fc-rootfs-{UID}-second"]
    assert len(world.disks().loops()) == 2


def test_a_file_for_changes_serves_one(world: World) -> None:
    """Two VMs cannot share a file for changes, nor can one's be another's base."""
    world.ensure()
    before = world.there()
    for fds in (
        (world.open(world.base), world.open(world.cow)),
        (world.open(world.cow), world.open(world.file("second", COW_BYTES))),
        (world.open(world.file("third", COW_BYTES)), world.open(world.base)),
    ):
        with pytest.raises(Refused, match="loop device"):
            storage.ensure(_host(world.disks()), world.ledger(), _call(fds), SnapshotEnsure(vm="second"))
        assert world.there() == before


def _host(disks: Any) -> Host:
    return cast("Host", SimpleNamespace(disks=disks))


def _call(fds: tuple[int, ...], uid: int = UID, op: str = "op-made") -> Call:
    return Call(caller=Caller(uid=uid, gid=GID), op=op, step="disk", epoch=1, fds=fds)


def _backing(path: Path) -> Backing:
    found = path.stat()
    return Backing(found.st_dev, found.st_ino)


def _written(path: Path, head: bytes) -> Path:
    with path.open("r+b") as file:
        file.write(head)
    return path


def _sized(fd: int, size: int) -> int:
    os.truncate(fd, size)
    return fd


def _fails(*_: object) -> None:
    raise OSError("no device")


def _refused(world: World, sentence: str, before: dict[str, Any]) -> None:
    """Assert that the request is refused with this sentence, nothing has changed, and nothing was made."""
    disks = world.disks()
    with pytest.raises(Refused, match=sentence) as refusal:
        world.ensure(disks)
    world.note(refusal.value)
    assert world.there() == before
    assert [call for call in disks.calls if call[0] != "detach"] == []


def _refused_files(world: World, which: str, fd: int, sentence: str) -> None:
    """Assert the same for one odd file beside a plain one."""
    plain = world.open(world.file("plain", COW_BYTES))
    fds = (fd, plain) if which == "base" else (world.open(world.base), fd)
    disks = world.disks()
    with pytest.raises(Refused, match=sentence) as refusal:
        storage.ensure(_host(disks), world.ledger(), _call(fds), ENSURE)
    world.note(refusal.value)
    assert (world.there(), disks.calls) == (NOTHING, [])
