from __future__ import annotations

import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from banger import proc
from banger.config import VmPaths
from banger.network import user
from banger.testing import firecracker_rules
from banger.testing.recording import RecordingVmm
from banger.vmm import tsc
from banger.vmm.accelerator import Accelerator
from banger.vmm.driver import MARK_VM, Machine, Vmm
from banger.vmm.firecracker import Direct, Firecracker
from banger.vmm.qemu import Qemu

LOAD_ADDRESS = 0x100000
MULTIBOOT_MAGIC, HAS_ADDRESSES = 0x1BADB002, 0x10000
# Writes "ok\n" to the first serial port and halts; 32-bit code, as Multiboot starts it.
TINY_CODE = bytes.fromhex("66baf803 b06fee b06bee b00aee fa f4 ebfd")

PVH_ENTRY, X86_64, PT_LOAD, PT_NOTE, ELF_CODE = 18, 62, 1, 4, 256
REMAINS = (".pid", ".qmp", ".agent", ".metrics")

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


def multiboot() -> bytes:
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
    return header + TINY_CODE


def elf() -> bytes:
    """Make the same kernel as an ELF file whose PVH note names its entry (Xen: docs/misc/pvh.pandoc)."""
    note = struct.pack("<3I4sQ", 4, 8, PVH_ENTRY, b"Xen\0", LOAD_ADDRESS + ELF_CODE)
    size = ELF_CODE + len(TINY_CODE)
    header = struct.pack(
        "<16s2HI3QI6H",
        b"\x7fELF\x02\x01\x01",
        2,
        X86_64,
        1,
        LOAD_ADDRESS + ELF_CODE,
        64,
        0,
        0,
        64,
        56,
        2,
        0,
        0,
        0,
    )
    load = struct.pack("<2I6Q", PT_LOAD, 7, 0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 0x1000)
    notes = struct.pack(
        "<2I6Q", PT_NOTE, 4, 176, LOAD_ADDRESS + 176, LOAD_ADDRESS + 176, len(note), len(note), 4
    )
    return (header + load + notes + note).ljust(ELF_CODE, b"\0") + TINY_CODE


@pytest.fixture
def tiny_kernel(tmp_path: Path) -> Path:
    """Make a kernel that says ok and halts."""
    path = tmp_path / "kernel"
    path.write_bytes(multiboot())
    return path


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """Make the program `firecracker` that stands in for the real one."""
    if firecracker_rules.description() is None:
        pytest.skip(f"Firecracker's API description is not here: {firecracker_rules.ENVIRON} names it")
    return stand_in_at(tmp_path)


def stand_in_at(place: Path) -> Path:
    """Make the stand-in's program file in a directory."""
    path = place / "firecracker"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m banger.testing.firecracker "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def vmm(request: pytest.FixtureRequest, tsc_khz: int, tmp_path: Path) -> Vmm:
    """QEMU; where a test is parametrised with them, the recording VMM and Firecracker's stand-in too."""
    match getattr(request, "param", "qemu"):
        case "qemu":
            return Qemu(Accelerator(name="tcg", why="a test", tsc_khz=tsc_khz))
        case "firecracker":
            return Firecracker(Direct(request.getfixturevalue("stand_in")))
    (place := tmp_path / "vmms").mkdir()
    return RecordingVmm(place)


@pytest.fixture
def make_machine(world: Path, tiny_kernel: Path, vmm: Vmm) -> Iterator[MakeMachine]:
    """Make machines, and fail when one of them leaves anything behind that `destroy` does not remove."""
    made: list[Machine] = []
    if isinstance(vmm, Firecracker):
        tiny_kernel.write_bytes(elf())
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
        vm = f"vm-{world.name[3:].replace('_', '-')}{len(made)}"
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
    assert [path.name for path in world.iterdir() if path.suffix in REMAINS] == []
