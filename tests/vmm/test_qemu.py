"""The command line, as the pure function it is, and QEMU's complaints."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.errors import Busy, DiskFull, HostLacks, PortTaken, ProgramFailed
from banger.vmm import qemu
from banger.vmm.accelerator import Accelerator, Name
from banger.vmm.driver import Disk, Machine
from banger.vmm.qemu_errors import explain
from tests.vmm.conftest import MakeMachine


def accel(name: Name = "tcg") -> Accelerator:
    return Accelerator(name=name, why="a test", tsc_khz=2_600_000)


def line(machine: Machine, name: Name = "tcg") -> str:
    return " ".join(qemu.argv(machine, accel(name), qmp_fd=5, agent_fd=6))


@pytest.mark.parametrize("nat", [True, False])
def test_without_nat_the_guest_is_alone(make_machine: MakeMachine, nat: bool) -> None:
    """The network is restricted unless the VM asked for NAT; IPv6 never leads out."""
    found = line(make_machine(nat=nat))
    assert f"restrict={'off' if nat else 'on'}" in found
    assert "ipv6=off" in found


def test_ssh_is_for_this_host_only(make_machine: MakeMachine) -> None:
    """The one forwarded port is bound to 127.0.0.1."""
    machine = make_machine()
    assert line(machine).count("hostfwd") == 1
    assert f"hostfwd=tcp:127.0.0.1:{machine.ssh_port}-:22" in line(machine)


@pytest.mark.parametrize("name", ["kvm", "tcg"])
def test_the_guest_is_told_the_tsc(make_machine: MakeMachine, name: Name) -> None:
    """The kernel words end with the host's frequency, under both accelerators."""
    assert "-append quiet tsc_early_khz=2600000 " in line(make_machine(), name)


def test_emulation_is_kept_small(make_machine: MakeMachine) -> None:
    """Only emulation has a code cache, and only KVM may show the guest the host's CPU."""
    assert "tb-size=32" in line(make_machine())
    assert "-cpu host" not in line(make_machine())
    assert "-accel kvm -cpu host" in line(make_machine(), "kvm")


def test_a_base_cannot_be_written(make_machine: MakeMachine) -> None:
    """A read-only disk is opened so; a writable one gives freed blocks back to the host."""
    disks = (
        Disk(serial="base", path=Path("/b"), read_only=True),
        Disk(serial="work", path=Path("/w")),
    )
    words = qemu.argv(make_machine(disks=disks), accel(), qmp_fd=5, agent_fd=6)
    assert "if=none,id=base,format=raw,readonly=on,file=/b" in words
    assert "if=none,id=work,format=raw,discard=unmap,file=/w" in words


def test_an_odd_path_stays_one_value(make_machine: MakeMachine) -> None:
    """A comma in a path does not become an option of its own."""
    disk = Disk(serial="work", path=Path("/a,readonly=on/b"))
    assert "file=/a,,readonly=on/b" in line(make_machine(disks=(disk,)))


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("-netdev x: Could not set up host forwarding rule 'tcp:127.0.0.1:1-:22'", PortTaken),
        ('Failed to get "write" lock\nIs another process using the image [/x]?', Busy),
        ("cannot set up guest memory 'microvm.ram': Cannot allocate memory", HostLacks),
        ("Could not access KVM kernel module: Permission denied", HostLacks),
        ("qemu: could not open kernel file '/k': No such file or directory", HostLacks),
        ("qemu: could not load initrd '/i'", HostLacks),
        ("-drive x: Could not open '/nowhere': No such file or directory", HostLacks),
        ("cannot create PID file: No space left on device", DiskFull),
        ("something new\n" * 1000, ProgramFailed),
        ("", ProgramFailed),
    ],
)
def test_complaints_become_errors(make_machine: MakeMachine, said: str, error: type[Exception]) -> None:
    """Each of QEMU's known complaints is an error of its own; an unknown one is quoted, shortened."""
    found = explain(said, make_machine())
    assert type(found) is error
    assert len(found.message) < 1000
    assert "{" not in found.message + (found.hint or "")
