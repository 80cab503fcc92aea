"""What every `Vmm` promises, tried with a kernel that says "ok" and halts.

Firecracker is the real driver with a stand-in for the program (`banger.testing.firecracker`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from banger import proc
from banger.errors import Busy, HostLacks, PortTaken, WrongState
from banger.model import Process
from banger.testing.recording import RecordingVmm
from banger.vmm import firecracker, qemu, witness
from banger.vmm.driver import MARK_OP, MARK_VM, Disk, Machine, Running, Vmm
from banger.vmm.firecracker import Firecracker
from tests.vmm.conftest import MakeMachine

# Runs in a process of its own, so that it can be killed: argv is the machine as JSON, the TSC, and the
# program that stands in for Firecracker, if that is to be launched.
LAUNCHER = """
import sys, msgspec
from pathlib import Path
from banger.vmm.accelerator import Accelerator
from banger.vmm.driver import Machine
from banger.vmm.firecracker import Direct, Firecracker
from banger.vmm.qemu import Qemu
machine = msgspec.json.decode(sys.argv[1], type=Machine, dec_hook=lambda kind, text: kind(text))
print("go", flush=True)
qemu = Qemu(Accelerator(name="tcg", why="a test", tsc_khz=int(sys.argv[2])))
(Firecracker(Direct(Path(sys.argv[3]))) if sys.argv[3:] else qemu).launch(machine)
"""


ALL = pytest.mark.parametrize("vmm", ["qemu", "recording", "firecracker"], indirect=True)
REAL = pytest.mark.parametrize("vmm", ["qemu", "firecracker"], indirect=True)


def kill(vmm: Vmm, machine: Machine, process: Process) -> None:
    """End a VMM by SIGKILL."""
    if isinstance(vmm, RecordingVmm):
        vmm.kill(machine.vm)
    else:
        proc.kill(process)


def said_on_console(machine: Machine, timeout_s: float = 10.0) -> str:
    """Wait for the guest's first line: it goes to a file, which cannot be waited for but by looking."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if text := machine.paths.console.read_text():
                return text
        time.sleep(0.01)
    return ""


def start_launcher(vmm: Vmm, machine: Machine, tsc_khz: int) -> subprocess.Popen[bytes]:
    """Launch in another process; gives it when it is about to."""
    document = msgspec.json.encode(machine, enc_hook=str).decode()
    program = [machine.kernel.with_name("firecracker")] if isinstance(vmm, Firecracker) else []
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, document, str(tsc_khz), *program], stdout=subprocess.PIPE
    )
    assert launcher.stdout is not None
    with launcher.stdout as out:
        assert out.readline() == b"go\n"
    return launcher


def status(process: Process, field: str) -> str:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))


@ALL
def test_launch_runs_the_guest(vmm: Vmm, make_machine: MakeMachine) -> None:
    """A launched machine executes its kernel, and its process is found by the VM's id."""
    machine = make_machine()
    process = vmm.launch(machine)
    assert said_on_console(machine) == "ok\n"
    assert vmm.find(machine.vm) == [process]


def test_the_vmm_stands_alone(vmm: Vmm, make_machine: MakeMachine) -> None:
    """The VMM leads a session of its own, is nobody's child here, and cannot start programs."""
    process = vmm.launch(make_machine())
    assert os.getsid(process.pid) not in (os.getsid(0), 0)
    assert int(status(process, "PPid")) != os.getpid()
    assert status(process, "Seccomp") == "2"
    assert status(process, "NoNewPrivs") == "1"


@ALL
def test_its_sockets_are_the_owners_alone(vmm: Vmm, make_machine: MakeMachine) -> None:
    """Whoever reaches the control socket rules the VM, so only the owner does."""
    machine = make_machine()
    vmm.launch(machine)
    paths = machine.paths
    pidfile = () if isinstance(vmm, Firecracker) else (paths.pidfile,)
    for path in (paths.qmp, paths.agent, paths.vmm_log, *pidfile):
        assert path.stat().st_mode & 0o077 == 0, path


@ALL
def test_a_vmm_that_runs_is_told_from_one_that_ended(vmm: Vmm, make_machine: MakeMachine) -> None:
    """It is alive and waited for in vain; killed, it is neither, and no later one is taken for it."""
    machine = make_machine()
    process = vmm.launch(machine)
    assert (vmm.alive(process), vmm.wait_gone(process, 0.05)) == (True, False)
    assert 0 <= vmm.age_s(process) < 60
    kill(vmm, machine, process)
    assert (vmm.alive(process), vmm.wait_gone(process, 5)) == (False, True)
    assert vmm.launch(machine) != process
    assert not vmm.alive(process)


@ALL
def test_what_runs_is_listed_with_its_port(vmm: Vmm, make_machine: MakeMachine, world: Path) -> None:
    """An audit sees each VMM of one runtime directory, whose it is and which port it forwards."""
    real = firecracker.running if isinstance(vmm, Firecracker) else qemu.running
    listed = vmm.running if isinstance(vmm, RecordingVmm) else real
    machine = make_machine()
    process = vmm.launch(machine)
    port = None if isinstance(vmm, Firecracker) else machine.ssh_port  # Firecracker forwards nothing
    assert list(listed(world)) == [Running(vm=machine.vm, process=process, ssh_port=port)]
    assert list(listed(world / "of-another-owner")) == []


def test_a_port_of_another_recorded_vmm_is_taken(make_machine: MakeMachine, tmp_path: Path) -> None:
    """The recording VMM knows the ports of its own kind only, and refuses those."""
    (place := tmp_path / "of-its-own").mkdir()
    vmm = RecordingVmm(place)
    first = make_machine()
    vmm.launch(first)
    with pytest.raises(PortTaken):
        vmm.launch(make_machine(ssh_port=first.ssh_port))
    vmm.destroy(first.vm, first.paths)


@ALL
def test_launch_adopts(vmm: Vmm, make_machine: MakeMachine) -> None:
    """Launching again in the same operation gives the process that runs already."""
    machine = make_machine()
    assert vmm.launch(machine) == vmm.launch(machine)


@ALL
def test_launch_replaces_what_another_operation_left(vmm: Vmm, make_machine: MakeMachine) -> None:
    """A VMM of an earlier operation may have been told other things, so it is replaced."""
    machine = make_machine()
    old = vmm.launch(machine)
    new = vmm.launch(msgspec.structs.replace(machine, op="op-2"))
    assert not vmm.alive(old)
    assert vmm.find(machine.vm) == [new]


@ALL
def test_launch_replaces_one_that_died(vmm: Vmm, make_machine: MakeMachine) -> None:
    """The sockets and the pidfile of a VMM that was killed do not hinder the next."""
    machine = make_machine()
    old = vmm.launch(machine)
    kill(vmm, machine, old)
    assert machine.paths.qmp.exists()
    assert vmm.launch(machine) != old


def test_the_ssh_port_is_open(vmm: Vmm, make_machine: MakeMachine) -> None:
    """After launch the port on 127.0.0.1 is the VMM's."""
    machine = make_machine()
    vmm.launch(machine)
    socket.create_connection(("127.0.0.1", machine.ssh_port), timeout=5).close()


def test_a_taken_port_has_its_own_error(vmm: Vmm, make_machine: MakeMachine) -> None:
    """When another program took the port first, launch says so, and another port is worth a try."""
    machine = make_machine()
    with socket.create_server(("127.0.0.1", machine.ssh_port)), pytest.raises(PortTaken) as caught:
        vmm.launch(machine)
    assert str(machine.ssh_port) in caught.value.message
    assert vmm.find(machine.vm) == []


@ALL
def test_a_missing_disk_is_named(vmm: Vmm, make_machine: MakeMachine) -> None:
    """A disk that is not there stops the launch with its path in the sentence."""
    machine = make_machine(disks=(Disk(serial="base", path=Path("/no/such/disk"), read_only=True),))
    with pytest.raises(HostLacks, match="/no/such/disk"):
        vmm.launch(machine)


@ALL
def test_a_base_is_shared_and_a_writable_disk_is_not(
    vmm: Vmm, make_machine: MakeMachine, world: Path
) -> None:
    """Two VMs may read one base at once; a disk that one of them writes is refused to the other."""
    for name in ("base", "work"):
        (world / name).write_bytes(bytes(1 << 20))
    base = Disk(serial="base", path=world / "base", read_only=True)
    work = Disk(serial="work", path=world / "work")
    vmm.launch(make_machine(disks=(base, work)))
    vmm.launch(make_machine(disks=(base,)))
    with pytest.raises(Busy):
        vmm.launch(make_machine(disks=(base, work)))


@REAL
@pytest.mark.skipif(
    Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1", reason="this host promises any memory"
)
def test_too_much_memory_is_refused(vmm: Vmm, make_machine: MakeMachine) -> None:
    """Asking for more memory than the host can promise names the size."""
    with pytest.raises(HostLacks, match="800000000 MiB"):
        vmm.launch(make_machine(memory_mib=800_000_000))


@ALL
def test_an_unreadable_kernel_is_named(vmm: Vmm, make_machine: MakeMachine) -> None:
    """A kernel that is not there stops the launch with its path in the sentence."""
    with pytest.raises(HostLacks, match="/no/such/kernel"):
        vmm.launch(make_machine(kernel=Path("/no/such/kernel")))


@ALL
def test_destroy_repeats(vmm: Vmm, make_machine: MakeMachine) -> None:
    """Destroying twice is as good as once, and leaves neither process nor socket."""
    machine = make_machine()
    process = vmm.launch(machine)
    for _ in range(2):
        vmm.destroy(machine.vm, machine.paths)
        assert not vmm.alive(process)
        assert not machine.paths.qmp.exists()


@ALL
def test_destroy_needs_no_launch(vmm: Vmm, make_machine: MakeMachine) -> None:
    """Destroying what never was, even without its directory, succeeds."""
    machine = make_machine()
    vmm.destroy(machine.vm, machine.paths)
    machine.paths.directory.rmdir()
    vmm.destroy(machine.vm, machine.paths)


@ALL
def test_destroy_finds_a_stray_without_its_directory(vmm: Vmm, make_machine: MakeMachine) -> None:
    """A VMM whose directory someone deleted is still found and ended."""
    machine = make_machine()
    process = vmm.launch(machine)
    machine.paths.directory.rename(machine.paths.directory.with_suffix(".gone"))
    vmm.destroy(machine.vm, machine.paths)
    assert not vmm.alive(process)


@ALL
def test_destroy_spares_others(vmm: Vmm, make_machine: MakeMachine) -> None:
    """Destroying one VM leaves the one beside it alone, even when its id begins alike."""
    machine = make_machine()
    neighbour = vmm.launch(make_machine())
    vmm.destroy(machine.vm, machine.paths)
    assert vmm.alive(neighbour)


@pytest.mark.parametrize(
    ("vmm", "after_ms"),
    [
        *(("qemu", ms) for ms in (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 25, 30, 40)),
        *(("firecracker", ms) for ms in (0, 20, 40, 80, 160, 320, 480, 640)),
    ],
    indirect=["vmm"],
)
def test_a_launcher_killed_half_way_leaves_nothing(
    vmm: Vmm, make_machine: MakeMachine, tsc_khz: int, after_ms: int
) -> None:
    """Whenever the launcher dies, destroy removes what it had started, for good."""
    machine = make_machine()
    launcher = start_launcher(vmm, machine, tsc_khz)
    time.sleep(after_ms / 1000)
    launcher.kill()
    launcher.wait()
    vmm.destroy(machine.vm, machine.paths)
    time.sleep(0.1)  # a VMM that slipped through would have appeared by now
    assert vmm.find(machine.vm) == []


@pytest.mark.parametrize(
    ("vmm", "after_ms"),
    [
        *(("qemu", ms) for ms in (0, 2, 4, 8, 15, 30)),
        *(("firecracker", ms) for ms in (0, 40, 160, 480)),
    ],
    indirect=["vmm"],
)
def test_a_launcher_killed_half_way_is_continued(
    vmm: Vmm, make_machine: MakeMachine, tsc_khz: int, after_ms: int
) -> None:
    """Whenever the launcher dies, the next launch of the operation ends with exactly one VMM."""
    machine = make_machine()
    launcher = start_launcher(vmm, machine, tsc_khz)
    time.sleep(after_ms / 1000)
    launcher.kill()
    launcher.wait()
    process = vmm.launch(machine)
    time.sleep(0.1)
    assert vmm.find(machine.vm) == [process]


@REAL
def test_the_vmm_outlives_its_launcher(vmm: Vmm, make_machine: MakeMachine, tsc_khz: int) -> None:
    """The end of the process that launched a VM does not end the VM."""
    machine = make_machine()
    launcher = start_launcher(vmm, machine, tsc_khz)
    assert launcher.wait(20) == 0
    assert len(vmm.find(machine.vm)) == 1


@REAL
def test_destroy_ends_a_child_that_has_no_mark_yet(vmm: Vmm, make_machine: MakeMachine) -> None:
    """A child between fork and exec, which no sweep can find, is waited for and then ended."""
    machine = make_machine()
    with witness.sole(machine.vm, machine.paths.directory) as lock:
        child = subprocess.Popen(
            ["sh", "-c", f"sleep 0.3; exec env {MARK_VM}={machine.vm} sleep 60"], pass_fds=(lock,)
        )
    reaper = threading.Thread(target=child.wait)
    reaper.start()
    vmm.destroy(machine.vm, machine.paths)
    reaper.join(5)
    assert child.returncode == -signal.SIGKILL


@REAL
def test_the_mark_names_the_operation(vmm: Vmm, make_machine: MakeMachine) -> None:
    """A sweep can tell which operation started a VMM."""
    machine = make_machine(op="op-of-this-test")
    process = vmm.launch(machine)
    assert proc.find_by_environ(MARK_OP, "op-of-this-test") == [process]


@ALL
def test_the_power_button_is_pressed(vmm: Vmm, make_machine: MakeMachine) -> None:
    """Pressing the button of a running VM succeeds; the guest that ignores it goes on."""
    machine = make_machine()
    process = vmm.launch(machine)
    vmm.power_button(machine.paths)
    assert vmm.alive(process)


@ALL
def test_the_power_button_of_nothing_is_refused(vmm: Vmm, make_machine: MakeMachine) -> None:
    """There is no button to press when nothing runs, or when what ran was killed."""
    machine = make_machine()
    with pytest.raises(WrongState):
        vmm.power_button(machine.paths)
    kill(vmm, machine, vmm.launch(machine))
    with pytest.raises(WrongState):
        vmm.power_button(machine.paths)


@REAL
def test_the_crash_report_has_both_sides(vmm: Vmm, make_machine: MakeMachine) -> None:
    """After a crash the report holds what the guest and what the VMM said last."""
    machine = make_machine()
    assert vmm.crash_report(machine.paths) == ""
    process = vmm.launch(machine)
    said_on_console(machine)
    os.kill(process.pid, signal.SIGTERM)
    assert proc.wait_gone(process, 10)
    report = vmm.crash_report(machine.paths)
    assert "signal 15" in report
    assert "ok" in report


@REAL
def test_a_long_console_is_cut_at_a_line(vmm: Vmm, make_machine: MakeMachine) -> None:
    """The report of a guest that wrote a gigabyte is its last few whole lines."""
    machine = make_machine()
    machine.paths.console.write_bytes(b"\xff a line of no worth\n" * 100_000 + b"the end\n")
    report = vmm.crash_report(machine.paths)
    assert report.endswith("the end")
    assert len(report) <= 4096
    assert report.startswith("\N{REPLACEMENT CHARACTER} a line")
