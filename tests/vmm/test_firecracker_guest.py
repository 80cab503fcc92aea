"""A Linux guest through the Firecracker driver: its kernel as ELF, its disks in order, its agent by vsock."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import config
from banger.guest import initrd
from banger.images import kernel as kernels
from banger.storage import ext4
from banger.vmm import firecracker_api, vsock
from banger.vmm.driver import Machine
from banger.vmm.firecracker import Firecracker
from tests.guest.conftest import NAME, Guest

pytestmark = [pytest.mark.guest, pytest.mark.parametrize("vmm", ["firecracker"], indirect=True)]

BOOT_S = 60.0


@pytest.fixture
def machine(dirs: config.Dirs, tmp_path: Path, vmm: Firecracker) -> Iterator[Machine]:
    """Make a machine on an empty root file system, which our initrd fills with all that it takes."""
    root = tmp_path / "base"
    ext4.make(root, 64, label="base")
    guest = Guest(dirs, "vm-fc", root, "web")
    bundled, archive = kernels.kernel_paths(kernels.build(kernels.RECIPES[NAME], dirs.cache))
    vmlinuz = tmp_path / "vmlinuz"
    shutil.copyfile(bundled, vmlinuz)
    initrd.write_initrd(archive, guest.paths.initrd, guest._files())
    yield guest._machine(vmlinuz)
    vmm.destroy("vm-fc", guest.paths)


def say(vmm: Firecracker, machine: Machine, word: bytes) -> bytes:
    """Say a word to the agent, and give its answer."""
    (process,) = vmm.find(machine.vm)
    with vsock.wait_connected(
        vmm.dial(machine.paths),
        vsock.AGENT_PORT,
        BOOT_S,
        cancelled=lambda: False,
        alive=lambda: vmm.alive(process),
    ) as channel:
        channel.settimeout(BOOT_S)
        channel.sendall(word + b"\n")
        return channel.recv(100)


def test_a_guest_lives_and_dies(vmm: Firecracker, machine: Machine) -> None:
    """It boots from its kernel's ELF form, says that it is ready, and ends when its keys are pressed."""
    process = vmm.launch(machine)
    assert machine.kernel.with_name("vmlinuz.elf").read_bytes()[:4] == b"\x7fELF"
    vsock.Agent(lambda path: firecracker_api.connect(path, 5)).wait_ready(
        machine.paths.agent,
        BOOT_S,
        cancelled=lambda: False,
        alive=lambda: vmm.alive(process),
        report=lambda: vmm.crash_report(machine.paths),
    )
    for _ in range(10):  # a key that is pressed before the guest looks at its keyboard is lost
        vmm.power_button(machine.paths)
        if vmm.wait_gone(process, 3):
            break
    assert not vmm.alive(process), vmm.crash_report(machine.paths)


def test_a_guest_goes_on_from_its_snapshot(vmm: Firecracker, machine: Machine, tmp_path: Path) -> None:
    """A guest that was ready when it was written down is ready at once when it is read again."""
    vmm.launch(machine)
    assert say(vmm, machine, b"hello") == b"ready\n"
    vmm.pause(machine.paths)
    vmm.snapshot(machine.paths, str(tmp_path / "state"), str(tmp_path / "memory"))
    vmm.destroy(machine.vm, machine.paths)
    vmm.restore(machine, str(tmp_path / "state"), str(tmp_path / "memory"))
    assert say(vmm, machine, b"ping") == b"pong\n"
