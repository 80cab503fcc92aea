"""What root does about jails: the same for real ones (by the jailer's stand-in) and recorded ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger import proc
from banger.errors import BangerError, HostLacks, ProgramFailed, Refused
from banger.helper import jail, names, storage
from banger.helper.devicemapper import KernelDisks
from banger.helper.host import Host
from banger.helper.jailer import Jailer, written
from banger.helper.jails import UIDS
from banger.helper.ledger import Ledger
from banger.helper.requests import JailConnect, JailLaunch, JailRemove, JailSignal
from banger.helper.verbs import Call, Caller, Facts
from banger.model import Process
from banger.testing import jailer as stand_in
from banger.testing.root_disks import KILLED, Mortal, RecordingDisks
from banger.testing.root_jails import RecordingJails
from banger.testing.root_net import RecordingNet
from banger.testing.root_resolver import RecordingResolver
from tests.helper.conftest import NEEDS_ROOT
from tests.helper.test_jailer import ask

VM = "vm-1"
# Loop devices are everybody's: two runs of these tests at one time must not see each other's.
OWNER = 10_000 + os.getpid() % 50_000 if os.geteuid() == 0 else os.getuid()
JAIL_CALLS = ("make", "put_file", "put_device", "give_tap", "start", "signal", "ended", "connect", "remove")
DISK_CALLS = ("attach", "detach")
AS_ROOT = pytest.mark.parametrize("world", [pytest.param("real", marks=NEEDS_ROOT)], indirect=True)


class OnlyLoops(KernelDisks):
    """The kernel's loop devices where it has no device-mapper."""

    def devices(self) -> list[Any]:
        return []


class World:
    """A helper's host and ledger, and an owner's files."""

    def __init__(self, path: Path, *, real: bool):
        self.path, self.real = path, real
        self.caller = Caller(uid=OWNER, gid=OWNER)
        (path / "owner").mkdir()
        self.open_files: list[int] = []
        if real:
            (path / "bin").mkdir()
            stand_in.install(path / "bin")
        self.restart()

    def restart(self) -> None:
        """Be the next helper: what it knows is in its files and on the host."""
        reap()
        database = sqlite3.connect(self.path / "root.db", isolation_level=None)
        database.execute("PRAGMA synchronous = OFF")  # who dies here is a process, not the machine
        self.ledger = Ledger(database)
        self.host = Host(
            net=RecordingNet(self.path / "net.json"),
            disks=OnlyLoops() if self.real else RecordingDisks(self.path),
            jails=self._jails(),
            resolver=RecordingResolver(self.path),
        )

    def _jails(self) -> Jailer | RecordingJails:
        if self.real:
            return Jailer(str(self.path / "bin"), str(self.path / "jails"))
        return RecordingJails(self.path)

    def call(self, *fds: int, op: str = "op-1", uid: int | None = None) -> Call:
        caller = self.caller if uid is None else Caller(uid=uid, gid=uid)
        return Call(caller=caller, op=op, step="launch", epoch=1, fds=fds)

    def file(self, name: str, data: bytes | int, flags: int = os.O_RDONLY, uid: int | None = OWNER) -> int:
        """Make an owner's file and give a descriptor of it, as the owner would send it."""
        path = self.path / "owner" / name
        path.write_bytes(data if isinstance(data, bytes) else bytes(data))
        if os.geteuid() == 0 and uid is not None:
            os.chown(path, uid, uid)
        path.chmod(0o600)
        return self.opened(path, flags)

    def opened(self, path: Path, flags: int) -> int:
        self.open_files.append(os.open(path, flags))
        return self.open_files[-1]

    def payloads(self, kernel: bytes = b"kernel") -> list[int]:
        return [self.file("kernel", kernel), self.file("initrd", b"initrd")]

    def disks(self) -> list[int]:
        return [self.file("base", b"BASE" * 1024), self.file("up", b"UPPR" * 1024, os.O_RDWR)]

    def launch(self, *fds: int, op: str = "op-1", vm: str = VM, snapshot: bool = False) -> Facts:
        sent = fds or (*self.payloads(), *self.disks())
        asked = JailLaunch(vm=vm, disks=len(sent) - 2, snapshot=snapshot)
        return jail.launch(self.host, self.ledger, self.call(*sent, op=op), asked)

    def remove(self, vm: str = VM) -> Facts:
        return jail.remove(self.host, self.ledger, self.call(), JailRemove(vm=vm))

    def connect(self, door: Any = "api") -> int:
        call = self.call()
        jail.connect(self.host, self.ledger, call, JailConnect(vm=VM, socket=door))
        (fd,) = call.give
        return fd

    def listing(self) -> Any:
        """Everything of this owner's on the host, and in the ledger; which pid does not matter."""
        found = jail.listing(self.host, self.ledger, OWNER)
        loops = [loop for loop in self.host.disks.loops() if loop.mark.startswith(f"banger {OWNER} ")]
        tree = sorted(str(path) for path in (self.path / "jails").rglob("*")) if self.real else []
        inside = [self.host.jails.inmates(jail_["id"]) for jail_ in found]
        return found, loops, tree[1:], inside, self.ledger.of_owner(OWNER)

    def close(self) -> None:
        for name in {held.vm for held in self.ledger.of_owner(OWNER)}:
            self.remove(name)
        for fd in self.open_files:
            os.close(fd)
        reap()


def reap() -> None:
    """Wait for what an earlier helper has started, as init does when a helper ends."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@pytest.fixture(params=["recorded", pytest.param("real", marks=NEEDS_ROOT)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    real = request.param == "real"
    path = Path(tempfile.mkdtemp(prefix="bgj-", dir="/var/lib" if real else None))
    made = World(path, real=real)
    yield made
    made.close()
    shutil.rmtree(path)


# -- what it does --------------------------------------------------------------------------------


def test_launch_connect_signal_remove_leave_nothing(world: World) -> None:
    """A jail's whole life: Firecracker answers, is asked to end, and nothing is left of anything."""
    before = world.listing()
    facts = world.launch()
    assert facts["disks"] == ["/disk0", "/disk1"]
    assert (facts["kernel"], facts["initrd"], facts["snapshot"]) == ("/kernel", "/initrd", None)
    assert (facts["api"], facts["vsock"]) == ("/run/api.socket", "/run/vsock.socket")
    assert facts["uid"] in UIDS
    (listed,) = jail.listing(world.host, world.ledger, OWNER)
    assert (listed["vm"], listed["op"], listed["pid"]) == (VM, "op-1", str(facts["pid"]))
    with socket.socket(fileno=world.connect()) as api:
        assert api.family is socket.AF_UNIX
    sent = jail.send(world.host, world.ledger, world.call(), JailSignal(vm=VM, signal="TERM"))
    assert sent == {"sent": 1}
    assert world.remove() == {}
    assert world.listing() == before
    assert world.remove() == {}


@AS_ROOT
def test_firecracker_finds_all_that_was_sent_and_no_more(world: World) -> None:
    """Kernel, initrd and disks are there for its uid; a disk sent to be read cannot be written."""
    facts = world.launch()
    process = Process(**{name: facts[name] for name in ("pid", "start_ticks", "boot_id")})
    assert proc.identify(facts["pid"]) == process
    files = ask(world.connect(), "/jail")["files"]
    assert isinstance(files, dict)
    assert sorted(files) == ["dev", "disk0", "disk1", "firecracker", "initrd", "kernel", "run"]
    assert (files["kernel"], files["initrd"], files["disk0"][:4]) == ("kernel", "initrd", "BASE")
    root = world.path / "jails/firecracker" / names.jail(OWNER, VM) / "root"
    modes = {name: (root / name).stat().st_mode & 0o777 for name in ("kernel", "disk0", "disk1")}
    assert modes == {"kernel": 0o400, "disk0": 0o400, "disk1": 0o600}
    assert {(root / name).stat().st_uid for name in files if name != "firecracker"} == {facts["uid"]}
    with (root / "disk0").open("r+b", buffering=0) as device, pytest.raises(PermissionError):
        device.write(bytes(512))
    console = world.connect("console")
    assert written(console).startswith("Running Firecracker v")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(console, b"x")
    os.close(console)


@AS_ROOT
def test_what_is_written_to_a_disk_is_in_the_owners_file(world: World) -> None:
    """A disk in the jail is the owner's own file."""
    facts = world.launch()
    root = world.path / "jails/firecracker" / names.jail(OWNER, VM) / "root"
    device = os.open(root / facts["disks"][1].lstrip("/"), os.O_RDWR)
    os.pwrite(device, b"written", 0)
    os.fsync(device)
    os.close(device)
    assert (world.path / "owner/up").read_bytes().startswith(b"written")


def test_a_launch_that_is_repeated_changes_nothing(world: World) -> None:
    """The same operation gets the same Firecracker; another is refused while it runs."""
    first = world.launch()
    before = world.listing()
    assert world.launch() == first
    world.restart()
    assert world.launch() == first
    with pytest.raises(Refused):
        world.launch(op="op-2")
    assert world.listing() == before


def test_a_dead_firecrackers_jail_is_made_anew(world: World) -> None:
    """After its Firecracker has ended a jail is not used again: everything in it is new."""
    first = world.launch()
    jail.send(world.host, world.ledger, world.call(), JailSignal(vm=VM, signal="KILL"))
    for inmate in world.host.jails.inmates(names.jail(OWNER, VM)):
        assert world.host.jails.ended(inmate, 10)
    again = world.launch(op="op-2")
    assert again["pid"] != first["pid"]
    assert jail.listing(world.host, world.ledger, OWNER)[0]["op"] == "op-2"


def test_a_signal_after_the_end_reaches_nobody(world: World) -> None:
    """Who has ended is not signalled, and that is no error."""
    world.launch()
    for expected in (1, 0):
        call = world.call()
        assert jail.send(world.host, world.ledger, call, JailSignal(vm=VM, signal="KILL")) == {
            "sent": expected
        }
        for inmate in world.host.jails.inmates(names.jail(OWNER, VM)):
            assert world.host.jails.ended(inmate, 10)


@AS_ROOT
@pytest.mark.parametrize("kernel", [b"DIE\n", b"DEAF\n"])
def test_a_firecracker_that_does_not_come_up_leaves_nothing(
    world: World, kernel: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told what Firecracker said last, and everything is taken away again."""
    monkeypatch.setattr(jail, "READY_S", 2.0)
    world.remove()
    before = world.listing()
    with pytest.raises(BangerError) as told:
        world.launch(*world.payloads(kernel), *world.disks())
    if kernel == b"DIE\n":
        assert isinstance(told.value, ProgramFailed)
        assert "The kernel is no kernel." in told.value.message
    assert world.listing() == before


def test_each_vm_has_a_uid_of_its_own(world: World) -> None:
    """No two jails share a uid, which is free again after."""
    uids = [world.launch(*world.payloads(), vm=vm, op=f"op-{vm}")["uid"] for vm in ("a", "b", "c")]
    assert len(set(uids)) == 3
    world.remove("b")
    assert world.launch(*world.payloads(), vm="d", op="op-d")["uid"] == uids[1]


def test_the_vms_tap_is_given_to_the_jails_uid(world: World) -> None:
    """A tap that root made for the VM can be opened by its Firecracker, and by no other's."""
    tap = names.tap(OWNER, VM)
    world.ledger.intend("tap", tap, world.call(), VM)
    with pytest.raises(Refused):
        world.launch()
    net = world.host.net
    net.make_tap(tap, OWNER, str(names.Mark(OWNER, VM, "op-1")), 1)
    given: list[tuple[str, int]] = []
    world.host.jails.give_tap = lambda tap, uid: given.append((tap, uid))  # type: ignore[method-assign]
    assert given == [(tap, world.launch()["uid"])]
    world.ledger.release("tap", tap)


@NEEDS_ROOT
def test_a_tap_can_be_opened_by_whom_it_was_given_to(tmp_path: Path) -> None:
    """The kernel lets the jail's uid open the tap, and refuses the owner's (in a network namespace)."""
    script = tmp_path / "tap.py"
    script.write_text(
        "import fcntl, os, struct\n"
        "from banger.helper.jailer import Jailer\n"
        "def opened(uid):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        fd = os.open('/dev/net/tun', os.O_RDWR)\n"
        "        os.setgroups([]); os.setgid(uid); os.setuid(uid)\n"
        "        try: fcntl.ioctl(fd, 0x400454CA, struct.pack('16sH22x', b'fc-tap', 0x5002))\n"
        "        except PermissionError: os._exit(1)\n"
        "        os._exit(0)\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "with open('/dev/net/tun', 'r+b', buffering=0) as fd:\n"
        "    fcntl.ioctl(fd, 0x400454CA, struct.pack('16sH22x', b'fc-tap', 0x1002))\n"
        "    fcntl.ioctl(fd, 0x400454CC, 1234)\n"
        "    fcntl.ioctl(fd, 0x400454CB, 1)\n"
        "assert opened(1234) and not opened(200000)\n"
        "Jailer('/nowhere', '/nowhere').give_tap('fc-tap', 200000)\n"
        "assert opened(200000) and not opened(1234)\n"
    )
    subprocess.run(["unshare", "--net", sys.executable, "-I", str(script)], check=True, timeout=30)


# -- killed in the middle ------------------------------------------------------------------------


def mortal(world: World, boundary: int) -> Host:
    """Give a host of which the process dies at its n-th boundary, in whichever seam that is."""
    jails = Mortal(world.host.jails, boundary, *JAIL_CALLS)
    disks = Mortal(world.host.disks, boundary, *DISK_CALLS)
    disks._pass = jails._pass  # type: ignore[method-assign]  # one count for both
    return replace(world.host, jails=jails, disks=disks)


def dies(world: World, act: Callable[[World], object], boundary: int) -> bool:
    """Run it in a process of its own, killed at a boundary; False when it came to its end before."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            world.restart()
            world.host = mortal(world, boundary)
            act(world)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), status
    return status == KILLED


def stable(facts: Facts) -> Facts:
    return {name: value for name, value in facts.items() if name not in ("pid", "start_ticks", "uid")}


def test_a_launch_killed_anywhere_is_completed_by_the_next(world: World) -> None:
    """Kill -9 before and after each call of a kernel's; then the same launch, then a removal."""
    before = world.listing()
    expected = stable(world.launch())
    world.remove()
    boundary = 1
    while dies(world, lambda child: child.launch(), boundary):
        world.restart()
        assert stable(world.launch()) == expected, boundary
        assert len(world.host.jails.inmates(names.jail(OWNER, VM))) == 1
        world.remove()
        assert world.listing() == before, boundary
        boundary += 1
    world.restart()
    world.remove()
    assert world.listing() == before
    assert boundary > 2 * 8


def test_a_launch_killed_anywhere_is_undone_by_a_removal(world: World) -> None:
    """Kill -9 before and after each call of a kernel's; then a removal, and nothing is left."""
    before = world.listing()
    boundary = 1
    while dies(world, lambda child: child.launch(), boundary):
        world.restart()
        world.remove()
        assert world.listing() == before, boundary
        boundary += 1
    world.restart()
    world.remove()
    assert world.listing() == before
    assert boundary > 2 * 8


def test_a_removal_killed_anywhere_is_completed_by_the_next(world: World) -> None:
    """Kill -9 before and after each call of a kernel's; then the same removal, and nothing is left."""
    before = world.listing()
    boundary, more = 1, True
    while more:
        world.restart()
        world.launch()
        more = dies(world, lambda child: child.remove(), boundary)
        world.restart()
        world.remove()
        assert world.listing() == before, boundary
        boundary += 1
    assert boundary > 2 * 4


def test_a_jail_without_a_record_is_removed_by_its_mark(world: World) -> None:
    """When the ledger is lost, what is on the host is still found and taken away."""
    before = world.listing()
    world.launch()
    (world.path / "root.db").unlink()
    world.restart()
    assert [found["vm"] for found in jail.listing(world.host, world.ledger, OWNER)] == [VM]
    world.remove()
    assert world.listing() == before


def test_after_a_reboot_nothing_but_the_record_is_there(world: World) -> None:
    """A record of what the host has no more does not stop a launch or a removal."""
    call = world.call()
    world.ledger.intend("jail", names.jail(OWNER, VM), call, VM, uid=UIDS[0])
    world.ledger.hold("jail", names.jail(OWNER, VM), pid=1, start_ticks=1, boot_id="before")
    facts = {"mark": names.loop_mark(OWNER, VM, "disk0", "op-0"), "device": 1, "inode": 1}
    world.ledger.intend("loop", names.loop(OWNER, VM, "disk0"), call, VM, **facts)
    world.launch(op="op-2")
    world.remove()
    assert world.ledger.of_owner(OWNER) == []


# -- what must be refused ------------------------------------------------------------------------


def refuses(world: World, act: Callable[[], object]) -> BangerError:
    """Do something that must be refused, and show that it had no effect."""
    before = world.listing()
    with pytest.raises((Refused, HostLacks)) as told:
        act()
    assert world.listing() == before
    return told.value


@pytest.mark.parametrize("verb", [jail.connect, jail.send], ids=["connect", "signal"])
def test_h10_nothing_is_asked_of_a_jail_that_is_not_there(world: World, verb: Any, refused: Any) -> None:
    """Connect and signal are refused before a launch, and for another owner's VM."""
    asked = JailConnect(vm=VM, socket="api") if verb is jail.connect else JailSignal(vm=VM, signal="KILL")
    told = refuses(world, lambda: verb(world.host, world.ledger, world.call(), asked))
    refused(f"H10 {verb.__name__} without a jail", told)
    world.launch()
    told = refuses(world, lambda: verb(world.host, world.ledger, world.call(uid=OWNER + 1), asked))
    refused(f"H53 {verb.__name__} of another's jail", told)
    assert len(world.host.jails.inmates(names.jail(OWNER, VM))) == 1


def test_h53_another_owners_removal_of_the_same_name_touches_nothing(world: World) -> None:
    """A VM's id means the caller's own VM, whoever else has one with that id."""
    world.launch()
    before = world.listing()
    jail.remove(world.host, world.ledger, world.call(uid=OWNER + 1), JailRemove(vm=VM))
    assert world.listing() == before


@pytest.mark.parametrize(
    "vm", ["../x", "", "-a", "a" * 64, "A", "a b", "a\n", "a/b", "a\0", "a.b", "ä", "..", "."]
)
def test_h53_a_vm_is_named_by_few_characters(vm: str, refused: Any) -> None:
    """What could leave the jails' directory, or begin an option, is no VM."""
    for asked in (JailLaunch, JailConnect, JailSignal, JailRemove):
        fields = {"vm": vm, "disks": 0, "socket": "api", "signal": "TERM"}
        known = {name: fields[name] for name in asked.__struct_fields__ if name in fields}
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"verb": asked.__struct_config__.tag, **known}, asked)
    refused(f"H53 VM id {vm!r:.20}", "invalid")


@pytest.mark.parametrize(
    "more",
    [
        "args",
        "no_seccomp",
        "seccomp_filter",
        "config_file",
        "uid",
        "gid",
        "exec_file",
        "kernel",
        "netns",
        "env",
    ],
)
def test_h54_h55_h57_there_is_no_field_for_arguments_uids_and_paths(more: str, refused: Any) -> None:
    """A launch says which VM and how many disks; whatever else it says is refused."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"verb": "jail.launch", "vm": VM, "disks": 0, more: "x"}, JailLaunch)
    refused(f"H54 field {more}", "invalid")


@pytest.mark.parametrize("number", ["KILL ", "9", "-9", "STOP", "HUP"])
def test_h48_only_two_signals_are_sent(number: str) -> None:
    """A signal is TERM or KILL, by name; there is no pid in a request."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"verb": "jail.signal", "vm": VM, "signal": number}, JailSignal)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"verb": "jail.signal", "vm": VM, "signal": "KILL", "pid": 1}, JailSignal)


def payload_flaws(world: World) -> dict[str, Callable[[], int]]:
    owner = world.path / "owner"
    return {
        "nothing in it": lambda: world.file("bad", b""),
        "too large": lambda: _sparse(world.file("bad", b"x", os.O_RDWR), jail.MAX_PAYLOAD + 1),
        "write-only": lambda: world.file("bad", b"x", os.O_WRONLY),
        "O_PATH": lambda: world.file("bad", b"x", os.O_PATH),
        "directory": lambda: world.opened(owner, os.O_RDONLY),
        "character device": lambda: world.opened(Path("/dev/zero"), os.O_RDONLY),
        "pipe": lambda: _pipe(world),
        "socket": lambda: _socket(world),
        "proc": lambda: world.opened(Path("/proc/self/status"), os.O_RDONLY),
        "without a name": lambda: _unlinked(world),
    }


PAYLOAD_FLAWS = (
    "nothing in it|too large|write-only|O_PATH|directory|character device|pipe|socket|proc|without a name"
).split("|")


def _sparse(fd: int, size: int) -> int:
    os.ftruncate(fd, size)
    return fd


def _pipe(world: World) -> int:
    world.open_files.extend(os.pipe())
    return world.open_files[-2]


def _socket(world: World) -> int:
    world.open_files.append(socket.socket(socket.AF_UNIX).detach())
    return world.open_files[-1]


def _linked(world: World) -> int:
    fd = world.file("bad", 4096, os.O_RDWR)
    (world.path / "owner/link").hardlink_to(world.path / "owner/bad")
    return fd


def _unlinked(world: World) -> int:
    fd = world.file("bad", b"x" * 4096)
    (world.path / "owner/bad").unlink()
    return fd


@pytest.mark.parametrize("flaw", PAYLOAD_FLAWS)
@pytest.mark.parametrize("place", [0, 1], ids=["kernel", "initrd"])
def test_h57_a_kernel_or_initrd_is_a_file_that_the_owner_has_open(
    world: World, flaw: str, place: int, refused: Any
) -> None:
    """Root opens nothing by name, and copies only from a file that the owner could read."""
    assert set(payload_flaws(world)) == set(PAYLOAD_FLAWS)
    fds = world.payloads()
    fds[place] = payload_flaws(world)[flaw]()
    refused(f"H57 payload: {flaw}", refuses(world, lambda: world.launch(*fds, *world.disks())))


def disk_flaws(world: World) -> dict[str, Callable[[], int]]:
    return {
        "not whole sectors": lambda: world.file("bad", 1000, os.O_RDWR),
        "empty": lambda: world.file("bad", b"", os.O_RDWR),
        "another's, to be written": lambda: world.file("bad", 4096, os.O_RDWR, uid=OWNER + 1),
        "two names": lambda: _linked(world),
        "block device": lambda: world.opened(Path("/dev/loop0"), os.O_RDONLY),
        "write-only": lambda: world.file("bad", 4096, os.O_WRONLY),
        "appending": lambda: world.file("bad", 4096, os.O_RDWR | os.O_APPEND),
        "O_PATH": lambda: world.file("bad", 4096, os.O_PATH),
        "pipe": lambda: _pipe(world),
        "proc": lambda: world.opened(Path("/proc/self/status"), os.O_RDONLY),
        "without a name": lambda: _unlinked(world),
    }


DISK_FLAWS = (
    "not whole sectors|empty|another's, to be written|two names|block device|write-only|appending|O_PATH|pipe"
    "|proc|without a name"
).split("|")


@NEEDS_ROOT
@pytest.mark.parametrize("flaw", DISK_FLAWS)
def test_h31_a_disk_is_a_whole_file_of_the_owners(world: World, flaw: str, refused: Any) -> None:
    """What can be written through a jail is the owner's own, with one name; what is read, a plain file."""
    assert set(disk_flaws(world)) == set(DISK_FLAWS)
    bad = disk_flaws(world)[flaw]()
    refused(f"H31 disk: {flaw}", refuses(world, lambda: world.launch(*world.payloads(), bad)))


def test_h31_a_file_is_one_disk_of_one_vm(world: World, refused: Any) -> None:
    """A file that is written is not given twice, in one launch or to two VMs; one that is read may be."""
    up = world.file("up", 4096, os.O_RDWR)
    told = refuses(world, lambda: world.launch(*world.payloads(), up, up))
    refused("H31 one file as two disks", told)
    world.launch(*world.payloads(), up, world.file("base", 4096))
    told = refuses(world, lambda: world.launch(*world.payloads(), up, vm="b", op="op-b"))
    refused("H31 one file for two VMs", told)
    told = refuses(
        world,
        lambda: world.launch(
            *world.payloads(), world.opened(world.path / "owner/up", os.O_RDONLY), vm="b", op="op-b"
        ),
    )
    refused("H31 a written file to be read", told)
    world.launch(*world.payloads(), world.opened(world.path / "owner/base", os.O_RDONLY), vm="b", op="op-b")


def test_h28_no_snapshot_is_put_into_a_jail_but_the_vms_own(world: World, refused: Any) -> None:
    """Without a dm-snapshot that root made for this VM there is none in the jail."""
    refused("H28 a snapshot that is not there", refuses(world, lambda: world.launch(snapshot=True)))
    world.ledger.intend("snapshot", names.device(OWNER, VM), world.call(), VM)
    refused("H28 a snapshot on record only", refuses(world, lambda: world.launch(snapshot=True)))
    world.ledger.release("snapshot", names.device(OWNER, VM))


def test_h55_uids_that_others_have_are_not_given_to_a_jail(tmp_path: Path, refused: Any) -> None:
    """A uid that an account, a subordinate range or a process has is passed over; none left: refused."""
    world = World(tmp_path, real=False)
    others = [range(UIDS[0], UIDS[0] + 10), range(UIDS[11], UIDS[-1] + 1)]
    world.host = replace(world.host, jails=RecordingJails(others=others))
    assert world.launch(*world.payloads())["uid"] == UIDS[10]
    told = refuses(world, lambda: world.launch(*world.payloads(), vm="b", op="op-b"))
    refused("H55 no uid is left", told)
    world.close()


def test_h22_an_owner_has_so_many_jails(
    tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One owner's jails do not fill root's disk: there is a number of them that is not passed."""
    monkeypatch.setattr(jail, "MAX_JAILS", 3)
    world = World(tmp_path, real=False)
    for number in range(3):
        world.launch(*world.payloads(), vm=f"vm-{number}", op=f"op-{number}")
    told = refuses(world, lambda: world.launch(*world.payloads(), vm="more", op="op-9"))
    refused("H22 one jail too many", told)
    world.close()


@AS_ROOT
def test_h48_a_removal_ends_the_jails_own_processes_only(world: World) -> None:
    """A process of the same uid elsewhere, and every other VM, live on."""
    first, other = world.launch(), world.launch(*world.payloads(), vm="b", op="op-b")
    uid = str(first["uid"])
    words = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "sleep", "60"]
    stranger = subprocess.Popen(words)
    try:
        while Path(f"/proc/{stranger.pid}/comm").read_text() != "sleep\n":
            pass
        world.remove()
        assert stranger.poll() is None
        assert world.host.jails.inmates(names.jail(OWNER, "b"))[0].pid == other["pid"]
    finally:
        stranger.send_signal(signal.SIGKILL)
        stranger.wait()


def test_what_the_disks_area_lists_names_the_jails_disks_too(world: World) -> None:
    """A jail's loop devices are in the listing of all loop devices, with their VM and operation."""
    world.launch()
    found = storage.listing(world.host, world.ledger, OWNER)
    assert {(row["id"], row["vm"], row["op"]) for row in found} == {
        (names.loop(OWNER, VM, role), VM, "op-1") for role in ("disk0", "disk1")
    }
