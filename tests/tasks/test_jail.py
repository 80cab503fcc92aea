"""Firecracker through root: its launcher over the real verbs on recorded kernels, and who gets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from banger.config import Config, Dirs, VmPaths
from banger.errors import HostLacks, InvalidRequest, WrongState
from banger.helper.client import Answer
from banger.helper.disks import SECTOR
from banger.helper.requests import AnyAsk, Request, SnapshotEnsure
from banger.model import VmSpec
from banger.tasks import monitor, root
from banger.tasks.jail import Jailed
from banger.testing.recording_jailed import Inmates
from banger.testing.recording_root import RecordingRoot
from banger.testing.root_pool import RootPool
from banger.vmm import kvm
from banger.vmm.accelerator import HostFacts
from banger.vmm.driver import ROOT, Disk, Machine
from tests.helper.conftest import NEEDS_ROOT

VM = "vm-00000001"
ADDRESS = "172.31.0.2"
SPEC = VmSpec(name="web", image="i", kernel="k", vcpu=1, memory_mib=128, disk_mib=64, network="bridge")

Asking = Callable[[str], Callable[[AnyAsk, Sequence[int]], Answer]]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (path := tmp_path / "vmms").mkdir()
    return path


@pytest.fixture
def recorded(place: Path) -> RecordingRoot:
    return RecordingRoot(place)


@pytest.fixture
def asking(recorded: RecordingRoot) -> Asking:
    """Ask as a step of an operation does."""

    def of(op: str) -> Callable[[AnyAsk, Sequence[int]], Answer]:
        def ask(wanted: AnyAsk, fds: Sequence[int] = ()) -> Answer:
            return recorded.ask(Request(op=op, step="jail", epoch=1, key="key", ask=wanted), fds)

        return ask

    return of


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    def file(name: str) -> Path:
        (tmp_path / name).write_bytes(bytes(SECTOR))
        return tmp_path / name

    return Machine(
        vm=VM,
        op="op-1",
        name="web",
        vcpu=1,
        memory_mib=64,
        kernel=file("kernel"),
        initrd=file("initrd"),
        words=(),
        disks=(Disk(serial="base", path=file("base"), read_only=True), Disk(serial="up", path=file("up"))),
        ssh_port=22,
        mac="02:00:00:00:00:01",
        nat=False,
        paths=VmPaths(vm=VM, directory=tmp_path, runtime=tmp_path),
        address=ADDRESS,
    )


def jailed(recorded: RecordingRoot, asking: Asking, place: Path, op: str = "op-1") -> Jailed:
    return Jailed(recorded, asking(op), alive=Inmates(place).alive)


def test_a_launch_is_found_again_by_its_operation_only(
    recorded: RecordingRoot, asking: Asking, place: Path, machine: Machine
) -> None:
    """What runs is told by root's list: for the VM to everybody, as launched to its own operation."""
    launcher = jailed(recorded, asking, place)
    process = launcher.start(machine)
    assert launcher.find(VM) == [process] == jailed(recorded, asking, place, "op-2").find(VM)
    assert launcher.launched(machine) == process
    assert launcher.launched(msgspec.structs.replace(machine, op="op-2")) is None
    assert [made.address for made in root.made(recorded) if made.kind == "jail"] == [ADDRESS]


def test_a_fresh_one_takes_the_place_of_another(
    recorded: RecordingRoot, asking: Asking, place: Path, machine: Machine
) -> None:
    """A start ends what another operation runs in the VM's jail, and after its end nothing is there."""
    before = jailed(recorded, asking, place).start(machine)
    launcher = jailed(recorded, asking, place, "op-2")
    after = launcher.start(msgspec.structs.replace(machine, op="op-2"))
    assert after != before
    assert launcher.find(VM) == [after]
    launcher.end(VM, machine.paths)
    launcher.end(VM, machine.paths)
    assert list(root.made(recorded)) == []


def test_disks_are_told_in_the_machines_order(
    recorded: RecordingRoot, asking: Asking, place: Path, machine: Machine, tmp_path: Path
) -> None:
    """Files are numbered as they come; a root disk that root has made is named where the machine has it."""
    launcher = jailed(recorded, asking, place)
    launcher.start(machine)
    assert launcher.seen(machine).disks == ("/disk0", "/disk1")
    launcher.end(VM, machine.paths)

    with (tmp_path / "whole").open("w+b") as base, (tmp_path / "cow").open("w+b") as cow:
        base.truncate(1 << 20)
        cow.truncate(2 << 20)
        with (tmp_path / "whole").open("rb") as reads:
            asking("op-1")(SnapshotEnsure(vm=VM), (reads.fileno(), cow.fileno()))
    on_snapshot = msgspec.structs.replace(
        machine, disks=(Disk(serial=ROOT, path=Path("/dev/mapper/x")), machine.disks[1])
    )
    launcher.start(on_snapshot)
    assert launcher.seen(on_snapshot).disks == ("/snapshot", "/disk0")


def test_what_is_not_there_is_told(
    recorded: RecordingRoot, asking: Asking, place: Path, machine: Machine
) -> None:
    """A missing file is the host's lack; a Firecracker that does not run, the wrong state."""
    launcher = jailed(recorded, asking, place)
    with pytest.raises(HostLacks, match=r"There is no .*/none"):
        launcher.start(msgspec.structs.replace(machine, kernel=machine.kernel.with_name("none")))
    with pytest.raises(WrongState, match="not running"):
        launcher.connect(machine.paths, "api")
    assert launcher.said(machine.paths) == ""


# -- which machine monitor a VM gets -------------------------------------------------------------


def remember(dirs: Dirs, *, kvm_works: bool) -> None:
    """Have it known whether KVM works here, as it is after the first look at a host."""
    facts = HostFacts(
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip(),
        kvm_accessible=kvm.accessible(),
        kvm=kvm.KvmVerdict(usable=kvm_works, why="a test"),
        tsc_khz=1,
    )
    dirs.accelerator.write_bytes(msgspec.json.encode(facts))


@NEEDS_ROOT
def test_auto_wants_kvm_a_bridge_and_a_known_firecracker(dirs: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of them is missing a VM gets QEMU, and so it does where nobody answers."""
    alone = msgspec.structs.replace(SPEC, network="user")
    remember(dirs, kvm_works=True)
    with RootPool() as pool:
        helper = root.Pool(pool.socket)
        assert monitor.choose(SPEC, Config(), dirs, helper) == "firecracker"
        assert monitor.choose(alone, Config(), dirs, helper) == "qemu"
        assert monitor.choose(SPEC, Config(vmm="qemu"), dirs, helper) == "qemu"
        monkeypatch.setattr("banger.vmm.firecracker.NEWEST", (1, 13, 1))
        assert monitor.choose(SPEC, Config(), dirs, helper) == "qemu"
        monkeypatch.undo()
        remember(dirs, kvm_works=False)
        assert monitor.choose(SPEC, Config(), dirs, helper) == "qemu"
        remember(dirs, kvm_works=True)
    assert monitor.choose(SPEC, Config(), dirs, helper) == "qemu"


def test_a_vm_that_cannot_have_what_is_configured_is_refused(dirs: Dirs) -> None:
    """Firecracker for a VM on QEMU's own network is refused, whatever the host has."""
    nobody = root.Pool(dirs.runtime / "none")
    assert monitor.choose(SPEC, Config(vmm="firecracker"), dirs, nobody) == "firecracker"
    with pytest.raises(InvalidRequest, match="no network of its own"):
        monitor.choose(msgspec.structs.replace(SPEC, network="user"), Config(vmm="firecracker"), dirs, nobody)
