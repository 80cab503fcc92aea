from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from banger import proc
from banger.config import VmPaths
from banger.network import user
from banger.testing.recording import RecordingVmm
from banger.vmm import tsc
from banger.vmm.accelerator import Accelerator
from banger.vmm.driver import MARK_VM, Machine, Vmm
from banger.vmm.qemu import Qemu

LOAD_ADDRESS = 0x100000
MULTIBOOT_MAGIC, HAS_ADDRESSES = 0x1BADB002, 0x10000
# Writes "ok\n" to the first serial port and halts; 32-bit code, as Multiboot starts it.
TINY_CODE = bytes.fromhex("66baf803 b06fee b06bee b00aee fa f4 ebfd")

MakeMachine = Callable[..., Machine]


@pytest.fixture(scope="session")
def tsc_khz() -> int:
    return tsc.host_khz()


@pytest.fixture
def world() -> Iterator[Path]:
    """Make a directory: its path is short enough for sockets and holds the comma that QEMU splits at."""
    path = Path(tempfile.mkdtemp(prefix="bg,", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def tiny_kernel(tmp_path: Path) -> Path:
    """Make a kernel of 48 bytes (Multiboot specification 0.6.96, section 3.1) that says ok and halts."""
    header = struct.pack(
        "<8I",
        MULTIBOOT_MAGIC,
        HAS_ADDRESSES,
        -(MULTIBOOT_MAGIC + HAS_ADDRESSES) & 0xFFFFFFFF,
        LOAD_ADDRESS,
        LOAD_ADDRESS,
        0,
        0,
        LOAD_ADDRESS + 32,
    )
    path = tmp_path / "kernel"
    path.write_bytes(header + TINY_CODE)
    return path


@pytest.fixture
def vmm(request: pytest.FixtureRequest, tsc_khz: int, tmp_path: Path) -> Vmm:
    """QEMU; where a test is parametrised with it, the recording VMM too."""
    if getattr(request, "param", "qemu") == "qemu":
        return Qemu(Accelerator(name="tcg", why="a test", tsc_khz=tsc_khz))
    (place := tmp_path / "vmms").mkdir()
    return RecordingVmm(place)


@pytest.fixture
def make_machine(world: Path, tiny_kernel: Path, vmm: Vmm) -> Iterator[MakeMachine]:
    """Make machines, and fail when one of them leaves anything behind that `destroy` does not remove."""
    made: list[Machine] = []
    initrd = tiny_kernel.with_name("initrd")
    initrd.write_bytes(b"nothing")
    base = Machine(
        vm="vm-0",
        op="op-1",
        name="tiny",
        vcpu=1,
        memory_mib=64,
        kernel=tiny_kernel,
        initrd=initrd,
        words=("quiet",),
        disks=(),
        ssh_port=0,
        mac="02:00:00:00:00:01",
        nat=False,
        paths=VmPaths(vm="vm-0", directory=world, runtime=world),
    )

    def make(**changes: object) -> Machine:
        vm = f"vm-{world.name[3:]}{len(made)}"
        directory = world / vm
        directory.mkdir()
        paths = VmPaths(vm=vm, directory=directory, runtime=world)
        port = user.pick_port({machine.ssh_port for machine in made})
        machine = msgspec.structs.replace(base, vm=vm, paths=paths, ssh_port=port)
        made.append(msgspec.structs.replace(machine, **changes))
        return made[-1]

    yield make
    for machine in made:
        vmm.destroy(machine.vm, machine.paths)
        assert vmm.find(machine.vm) == []
        assert proc.find_by_environ(MARK_VM, machine.vm) == []
    assert [path.name for path in world.iterdir() if path.suffix in (".pid", ".qmp", ".agent")] == []
