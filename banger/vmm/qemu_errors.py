"""What QEMU says when it cannot start, and what that means for the user."""

from __future__ import annotations

from banger.errors import BangerError, Busy, DiskFull, HostLacks, PortTaken, ProgramFailed
from banger.model import Value
from banger.vmm.driver import Machine

TAIL_CHARACTERS = 600


class Complaint(Value):
    """A piece of QEMU's text, the error it stands for, and its sentence."""

    text: str
    error: type[BangerError]
    sentence: str
    hint: str | None = None


# The first that fits is taken. Texts are those of QEMU 7.2 to 10.
COMPLAINTS = (
    Complaint(
        text="Could not set up host forwarding rule",
        error=PortTaken,
        sentence="Another program took port {machine.ssh_port} before {machine.name} could.",
    ),
    Complaint(
        text="Is another process using the image",
        error=Busy,
        sentence="Another process uses a disk of {machine.name}.",
        hint="`fuser -v {machine.paths.directory}/*` shows which one.",
    ),
    Complaint(
        text="cannot set up guest memory",
        error=HostLacks,
        sentence="This host cannot give {machine.name} {machine.memory_mib} MiB of memory.",
        hint="Ask for less with --memory, or stop other VMs.",
    ),
    Complaint(
        text="Could not access KVM kernel module",
        error=HostLacks,
        sentence="KVM is not accessible any more.",
        hint='Set accelerator = "tcg" in config.toml, or restore access to /dev/kvm.',
    ),
    Complaint(text="No space left on device", error=DiskFull, sentence="There is no space left on the disk."),
    Complaint(
        text="could not open kernel file",
        error=HostLacks,
        sentence="The kernel {machine.kernel} cannot be read.",
        hint="`banger kernel delete` and `banger kernel pull` make it anew.",
    ),
    Complaint(
        text="could not load initrd",
        error=HostLacks,
        sentence="The initrd {machine.initrd} cannot be read.",
    ),
    Complaint(
        text="Could not open '",
        error=HostLacks,
        sentence="QEMU cannot open a file of {machine.name}: {said}",
        hint="A disk is missing or not readable: `banger vm delete` the VM and create it again.",
    ),
)


def explain(said: str, machine: Machine) -> BangerError:
    """Turn what QEMU wrote before it ended into the error that stands for it."""
    for complaint in COMPLAINTS:
        if complaint.text in said:
            last = said.splitlines()[-1]
            hint = complaint.hint and complaint.hint.format(machine=machine)
            return complaint.error(complaint.sentence.format(machine=machine, said=last), hint=hint)
    return ProgramFailed(f"QEMU did not start: {said[-TAIL_CHARACTERS:] or 'it said nothing.'}")
