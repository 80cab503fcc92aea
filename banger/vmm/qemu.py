"""QEMU's `microvm` machine: the command line, and the promises of `Vmm` kept with it.

QEMU is not started with -daemonize: that needs fork and setsid, which the sandbox refuses to a
QEMU that a guest may have taken over, and it throws QEMU's last words away. Instead `setsid
--fork` detaches it, its complaints go to a file, and it inherits sockets that listen already: a
client connects at once and its first answer, or the hang-up, is the end of the start.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from banger import proc
from banger.config import VmPaths
from banger.errors import BangerError, TimedOut, WrongState, from_os_error
from banger.model import Process
from banger.vmm import console, qmp, witness
from banger.vmm.accelerator import Accelerator
from banger.vmm.driver import MARK_ADDRESS, MARK_OP, MARK_VM, Disk, Machine, Running
from banger.vmm.qemu_errors import explain

PROGRAM = "qemu-system-x86_64"
PACKAGE = "qemu-system-x86"
# Translated code. QEMU's default, a fraction of the host's RAM, costs memory and wins nothing here.
TB_CACHE_MIB = 32
AGENT_PORT = "banger.agent"
START_TIMEOUT_S = 30.0
CONTROL_TIMEOUT_S = 5.0


def argv(machine: Machine, accel: Accelerator, *, qmp_fd: int, agent_fd: int) -> list[str]:
    """Give the command line; `qmp_fd` and `agent_fd` are listening unix sockets to inherit."""
    paths = machine.paths
    # microvm has no HPET and no PM timer: without tsc_early_khz Linux calibrates the TSC against
    # the PIT, and under scheduling jitter one boot in ten hangs.
    words = " ".join([*machine.words, f"tsc_early_khz={accel.tsc_khz}"])
    return [
        PROGRAM,
        "-name", f"guest={machine.vm},process=banger-{machine.vm}",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display", "none",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-pidfile", str(paths.pidfile),
        "-machine", "microvm",
        *_accelerator(accel),
        "-smp", str(machine.vcpu),
        "-m", f"{machine.memory_mib}M",
        "-kernel", str(machine.kernel),
        "-initrd", str(machine.initrd),
        "-append", words,
        "-chardev", f"file,id=console,path={_value(paths.console)},append=on",
        "-serial", "chardev:console",
        "-chardev", f"socket,id=qmp,fd={qmp_fd},server=on,wait=off",
        "-mon", "chardev=qmp,mode=control",
        "-device", "virtio-serial-device",
        "-chardev", f"socket,id=agent,fd={agent_fd},server=on,wait=off",
        "-device", f"virtserialport,chardev=agent,name={AGENT_PORT}",
        "-device", "virtio-rng-device",
        *(word for disk in machine.disks for word in _disk(disk)),
        "-netdev", _network(machine),
        "-device", f"virtio-net-device,netdev=net,mac={machine.mac}",
    ]  # fmt: skip


def _accelerator(accel: Accelerator) -> list[str]:
    if accel.name == "kvm":
        return [
            "-accel", "kvm",
            "-cpu", "host",
        ]  # fmt: skip
    return [
        "-accel", f"tcg,tb-size={TB_CACHE_MIB}",
        "-cpu", "qemu64,+rdrand",  # without rdrand the guest's sshd waits a second for entropy
    ]  # fmt: skip


def _disk(disk: Disk) -> list[str]:
    mode = "readonly=on" if disk.read_only else "discard=unmap"
    return [
        "-drive", f"if=none,id={disk.serial},format=raw,{mode},file={_value(disk.path)}",
        "-device", f"virtio-blk-device,drive={disk.serial},serial={disk.serial}",
    ]  # fmt: skip


def _network(machine: Machine) -> str:
    """Give the tap or, without one, the user-mode network: restricted, its guest reaches nothing."""
    if machine.tap is not None:
        return f"tap,id=net,ifname={machine.tap},script=no,downscript=no"
    restrict = "off" if machine.nat else "on"
    forward = f"hostfwd=tcp:127.0.0.1:{machine.ssh_port}-:22"
    return f"user,id=net,ipv6=off,restrict={restrict},{forward}"


def running(runtime: Path) -> Iterator[Running]:
    """List the QEMUs whose sockets are in this directory, whether or not anyone knows of them."""
    for process, vm in proc.marked(MARK_VM):
        # Other owners', and those of banger's tests, live below other directories.
        words = proc.words(process)
        if str(runtime) in words:
            port = re.search(r"hostfwd=tcp:127\.0\.0\.1:(\d+)-:22", words)
            address = proc.mark_of(process, MARK_ADDRESS)
            yield Running(vm=vm, process=process, ssh_port=int(port[1]) if port else None, address=address)


def _marks(machine: Machine) -> dict[str, str]:
    """Give what the process carries in its environment."""
    marks = {MARK_VM: machine.vm, MARK_OP: machine.op}
    return marks if machine.address is None else {**marks, MARK_ADDRESS: machine.address}


def _value(path: Path) -> str:
    """Write a path as an option's value, in which a comma is doubled (qemu(1))."""
    return str(path).replace(",", ",,")


class Qemu:
    """The `Vmm` that needs no root: QEMU with a user-mode network."""

    def __init__(self, accel: Accelerator):
        self.accel = accel

    def launch(self, machine: Machine) -> Process:
        """Make it so that the machine runs; see `Vmm.launch`."""
        adopted = self._adopt(machine)
        if adopted is not None:
            return adopted
        try:
            with witness.sole(machine.vm, machine.paths.directory) as lock:
                _remove_remains(machine.paths)
                self._start(machine, lock)
        except OSError as error:
            raise from_os_error(error) from error
        return self._settled(machine)

    def find(self, vm: str) -> list[Process]:
        """Find the QEMU processes of the VM with this id."""
        return proc.find_by_environ(MARK_VM, vm)

    def alive(self, process: Process) -> bool:
        """Tell whether exactly this QEMU still runs."""
        return proc.alive(process)

    def wait_gone(self, process: Process, timeout_s: float) -> bool:
        """Wait until this QEMU has ended; see `Vmm.wait_gone`."""
        return proc.wait_gone(process, timeout_s)

    def age_s(self, process: Process) -> float:
        """Tell for how many seconds this QEMU has been running."""
        return proc.age_s(process)

    def power_button(self, paths: VmPaths) -> None:
        """Press the guest's power button; see `Vmm.power_button`."""
        with qmp.connect(paths.qmp, CONTROL_TIMEOUT_S) as control:
            control.execute("system_powerdown")

    def destroy(self, vm: str, paths: VmPaths) -> None:
        """Make it so that nothing of this VM's QEMU exists; see `Vmm.destroy`."""
        try:
            with witness.sole(vm, paths.directory):
                _remove_remains(paths)
        except FileNotFoundError:  # no directory, so no launch since it went; a stray may still run
            witness.end_marked(vm)
            _remove_remains(paths)

    def crash_report(self, paths: VmPaths) -> str:
        """Tell what QEMU and the guest's console said last."""
        said = (console.tail(paths.vmm_log), console.tail(paths.console))
        return "\n".join(text for text in said if text)

    def _adopt(self, machine: Machine) -> Process | None:
        """Give the running QEMU that this operation launched before, if it answers."""
        launched = set(proc.find_by_environ(MARK_OP, machine.op))
        if not launched.intersection(self.find(machine.vm)):
            return None
        with contextlib.suppress(BangerError):
            return self._settled(machine)
        return None

    def _start(self, machine: Machine, lock: int) -> None:
        with _listening(machine.paths.qmp) as control, _listening(machine.paths.agent) as agent:
            command = argv(machine, self.accel, qmp_fd=control, agent_fd=agent)
            launcher = proc.start_detached(
                ["setsid", "--fork", proc.which(PROGRAM, PACKAGE), *command[1:]],
                errors=_fresh(machine.paths.vmm_log),
                keep=(lock, control, agent),
                env=_marks(machine),
            )
            launcher.wait()

    def _settled(self, machine: Machine) -> Process:
        """Wait until QEMU has built the machine and runs it; give its identity.

        The greeting may come from an I/O thread while devices are still being made; commands are
        answered by the main loop, which begins when everything stands.
        """
        try:
            with qmp.connect(machine.paths.qmp, START_TIMEOUT_S) as control:
                control.execute("query-status")
            process = proc.identify(int(machine.paths.pidfile.read_text("ascii")))
        except (WrongState, FileNotFoundError):
            process = None
        except TimedOut:
            raise TimedOut(f"QEMU did not start within {START_TIMEOUT_S:g} s.") from None
        if process is None:
            raise explain(console.tail(machine.paths.vmm_log), machine)
        return process


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[int]:
    """Give a unix socket that listens at `path` (0600), for a child to inherit.

    Our copy is closed at the end: a hang-up must be seen when the child is gone.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(8)
        yield listener.fileno()


def _fresh(path: Path) -> Path:
    path.unlink(missing_ok=True)
    return path


def _remove_remains(paths: VmPaths) -> None:
    for path in (paths.qmp, paths.agent, paths.pidfile):
        path.unlink(missing_ok=True)
