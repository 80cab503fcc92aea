"""What the Firecracker driver does beyond `Vmm`, and what it tells a (stand-in) Firecracker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import msgspec
import pytest

from banger import proc
from banger.errors import BangerError, Busy, DiskFull, HostLacks, InvalidImage, ProgramFailed, WrongState
from banger.model import Process
from banger.testing import firecracker as stand_in_program
from banger.testing.firecracker_rules import Shapes, description
from banger.vmm import firecracker, firecracker_api
from banger.vmm.driver import MARK_VM, Disk, Machine
from banger.vmm.firecracker import Direct, Firecracker, Seen, explain
from tests.vmm.conftest import MakeMachine

pytestmark = pytest.mark.parametrize("vmm", ["firecracker"], indirect=True)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the stand-in write down each request."""
    monkeypatch.setenv(stand_in_program.RECORD, str(tmp_path / "asked"))
    return tmp_path / "asked"


def requests(asked: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in asked.read_text().splitlines()]


def state(machine: Machine) -> str:
    with firecracker_api.using(firecracker_api.connect(machine.paths.qmp, 5), 5) as api:
        return api.instance().state


def children(process: Process) -> list[Process]:
    """Give what runs below a process."""
    words = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [found for pid in words.split() if (found := proc.identify(int(pid)))]


def test_every_request_is_valid(
    vmm: Firecracker, make_machine: MakeMachine, asked: Path, world: Path
) -> None:
    """All that the driver asks is in the description, allowed at its moment, and what the machine needs."""
    (world / "base").write_bytes(bytes(4096))
    disks = (
        Disk(serial="base", path=world / "base", read_only=True),
        Disk(serial="up", path=world / "base", read_only=True),
    )
    machine = make_machine(disks=disks, memory_mib=65)
    vmm.launch(machine)
    vmm.pause(machine.paths)
    vmm.snapshot(machine.paths, str(world / "state"), str(world / "memory"))
    vmm.resume(machine.paths)
    vmm.power_button(machine.paths)
    vmm.metrics(machine.paths)
    vmm.destroy(machine.vm, machine.paths)
    vmm.restore(machine, str(world / "state"), str(world / "memory"))
    found = requests(asked)
    assert [one for one in found if one["status"] not in (200, 204)] == []
    assert {str(one["path"]) for one in found} == {
        *("/", "/version", "/logger", "/metrics", "/machine-config", "/boot-source", "/drives/base"),
        *("/drives/up", "/vsock", "/entropy", "/actions", "/vm", "/snapshot/create", "/snapshot/load"),
    }


def test_what_is_sent_is_in_the_oldest_version(
    vmm: Firecracker, make_machine: MakeMachine, asked: Path, world: Path
) -> None:
    """No field and no path is sent that Firecracker 1.5 does not have."""
    (world / "base").write_bytes(bytes(4096))
    vmm.launch(make_machine(disks=(Disk(serial="base", path=world / "base", read_only=True),)))
    known = {
        "/logger": {"log_path", "level", "show_level", "show_log_origin", "module"},
        "/metrics": {"metrics_path"},
        "/machine-config": {"vcpu_count", "mem_size_mib", "smt", "cpu_template", "track_dirty_pages"},
        "/boot-source": {"kernel_image_path", "initrd_path", "boot_args"},
        "/drives/base": {"drive_id", "path_on_host", "is_root_device", "is_read_only", "cache_type"},
        "/vsock": {"guest_cid", "uds_path", "vsock_id"},
        "/entropy": {"rate_limiter"},
        "/actions": {"action_type"},
    }
    sent = {str(one["path"]): json.loads(str(one["body"])) for one in requests(asked) if one["body"]}
    assert sent.keys() == known.keys()
    assert all(body.keys() <= known[path] for path, body in sent.items())


def test_a_tap_becomes_a_network_card(vmm: Firecracker, make_machine: MakeMachine) -> None:
    """What is sent for a tap is what the description asks for, under the interface's own name."""
    sent: list[tuple[str, str, bytes]] = []

    class Recorder(firecracker_api.Api):
        def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
            sent.append((method, path, body or b""))
            return b"{}"

    machine = make_machine(tap="tap0", address="172.16.0.2")
    seen = Seen(kernel="/kernel", initrd="/initrd", disks=(), vsock="/run/vsock.socket")
    recorder = Recorder(socket.socket(), 1)
    firecracker._boot(recorder, machine, seen)
    recorder.close()
    path = description()
    assert path is not None
    shapes = Shapes(path)
    assert all(shapes.match(*one) for one in sent)
    card = next(body for _, path, body in sent if path == "/network-interfaces/eth0")
    assert json.loads(card) == {"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": machine.mac}


def test_the_guest_is_told_its_disks(vmm: Firecracker, make_machine: MakeMachine) -> None:
    """The kernel's words name each disk's device, in the order in which they are attached."""
    disks = tuple(Disk(serial=name, path=Path("/x")) for name in ("base", "up", "work"))
    words = firecracker.boot_args(make_machine(disks=disks)).split()
    assert words == [
        "quiet",
        "reboot=k",
        "pci=off",
        "disk_base=/dev/vda",
        "disk_up=/dev/vdb",
        "disk_work=/dev/vdc",
    ]


def test_pause_and_resume_make_it_so(vmm: Firecracker, make_machine: MakeMachine) -> None:
    """Each may be repeated; a paused machine is adopted as it is."""
    machine = make_machine()
    process = vmm.launch(machine)
    for _ in range(2):
        vmm.pause(machine.paths)
        assert state(machine) == "Paused"
    assert vmm.launch(machine) == process
    for _ in range(2):
        vmm.resume(machine.paths)
        assert state(machine) == "Running"


def test_a_snapshot_of_what_runs_is_refused(vmm: Firecracker, make_machine: MakeMachine, world: Path) -> None:
    """Only what stands still can be written down."""
    machine = make_machine()
    vmm.launch(machine)
    with pytest.raises(ProgramFailed, match="pause"):
        vmm.snapshot(machine.paths, str(world / "state"), str(world / "memory"))


def test_a_snapshot_goes_on_where_it_was(vmm: Firecracker, make_machine: MakeMachine, world: Path) -> None:
    """A restored machine runs without booting: it says nothing anew."""
    machine = make_machine()
    first = vmm.launch(machine)
    vmm.pause(machine.paths)
    vmm.snapshot(machine.paths, str(world / "state"), str(world / "memory"))
    vmm.destroy(machine.vm, machine.paths)
    machine.paths.console.unlink()
    second = vmm.restore(machine, str(world / "state"), str(world / "memory"))
    assert second != first
    assert state(machine) == "Running"
    assert machine.paths.console.read_text() == ""


def test_metrics_are_of_this_moment(vmm: Firecracker, make_machine: MakeMachine) -> None:
    """Each question gets one fresh line, however often it is asked, and nothing piles up."""
    machine = make_machine()
    vmm.launch(machine)
    for _ in range(3):
        assert "utc_timestamp_ms" in vmm.metrics(machine.paths)
    assert not machine.paths.metrics.is_file()


def test_nothing_that_does_not_run_is_asked(vmm: Firecracker, make_machine: MakeMachine) -> None:
    """Without a Firecracker there is nothing to pause, and it has no figures."""
    machine = make_machine()
    for ask in (vmm.pause, vmm.resume):
        with pytest.raises(WrongState):
            ask(machine.paths)
    assert vmm.metrics(machine.paths) == {}


def test_one_that_was_never_configured_is_replaced(
    vmm: Firecracker, make_machine: MakeMachine, stand_in: Path
) -> None:
    """Of a launcher that died before the start there is a Firecracker left, but no machine in it."""
    machine = make_machine()
    half = Direct(stand_in).start(machine)
    assert state(machine) == "Not started"
    assert vmm.launch(machine) != half
    assert not vmm.alive(half)


@pytest.mark.parametrize("version", ["1.4.1", "0.25.2"])
def test_a_version_that_is_too_old_is_named(
    vmm: Firecracker, make_machine: MakeMachine, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Nothing is configured in a Firecracker below 1.5, and both versions are in the sentence."""
    monkeypatch.setenv("BANGER_FIRECRACKER_VERSION", version)
    with pytest.raises(HostLacks, match=rf"{version}.*1\.5\.0"):
        vmm.launch(make_machine())


@pytest.mark.parametrize("version", ["1.5.0", "1.17.0-dev", "2.0.0"])
def test_newer_versions_are_tried(
    vmm: Firecracker, make_machine: MakeMachine, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """The oldest is taken, and one that nobody has seen yet is not refused for its number."""
    monkeypatch.setenv("BANGER_FIRECRACKER_VERSION", version)
    machine = make_machine()
    assert vmm.alive(vmm.launch(machine))


def test_a_program_is_asked_for_its_version(
    vmm: Firecracker, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Firecracker's own sentence is read, and another program is not taken for it."""
    monkeypatch.setenv("BANGER_FIRECRACKER_VERSION", "1.7.0")
    assert firecracker.version_of(stand_in) == (1, 7, 0)
    with pytest.raises(ProgramFailed):
        firecracker.version_of(Path("/bin/true"))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo out of luck >&2; exit 3", "out of luck"),
        ("exit 3", "exited with 3"),
        ("kill -9 $$", "signal 9"),
    ],
)
def test_one_that_ends_at_once_tells_why(
    vmm: Firecracker, make_machine: MakeMachine, stand_in: Path, script: str, said: str
) -> None:
    """When Firecracker ends before it listens, the error has its last words, and comes at once."""
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    machine = make_machine()
    with pytest.raises(ProgramFailed, match=said):
        vmm.launch(machine)
    assert vmm.find(machine.vm) == []


def test_a_program_that_is_not_there_is_named(vmm: Firecracker, make_machine: MakeMachine) -> None:
    """Its path is in the sentence."""
    machine = make_machine()
    with pytest.raises(ProgramFailed, match="/no/such/firecracker"):
        Firecracker(Direct(Path("/no/such/firecracker"))).launch(machine)


def test_what_is_no_kernel_is_not_started(vmm: Firecracker, make_machine: MakeMachine) -> None:
    """Neither an ELF file nor a bzImage: nothing is started."""
    machine = make_machine()
    machine.kernel.write_bytes(b"text" * 2000)
    with pytest.raises(InvalidImage):
        vmm.launch(machine)
    assert vmm.find(machine.vm) == []


def test_the_vmm_stands_alone(vmm: Firecracker, make_machine: MakeMachine) -> None:
    """It leads no session of ours, is nobody's child here, and is asked to filter its system calls."""
    process = vmm.launch(make_machine())
    assert os.getsid(process.pid) != os.getsid(0)
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert f"PPid:\t{os.getpid()}\n" not in status
    assert "seccomp" not in proc.words(process)


def test_no_guest_outlives_it(vmm: Firecracker, make_machine: MakeMachine) -> None:
    """A stand-in that is killed takes its QEMU with it, and QEMU carries no mark of its own."""
    machine = make_machine()
    process = vmm.launch(machine)
    (guest,) = children(process)
    assert proc.mark_of(guest, MARK_VM) is None
    os.kill(process.pid, signal.SIGKILL)
    assert proc.wait_gone(guest, 10)


def test_it_ends_with_its_guest(vmm: Firecracker, make_machine: MakeMachine) -> None:
    """A stand-in whose guest has ended ends too, as Firecracker does."""
    process = vmm.launch(make_machine())
    (guest,) = children(process)
    proc.kill(guest)
    assert vmm.wait_gone(process, 10)


@pytest.mark.parametrize(
    "words",
    [
        ["--config-file", "x"],
        ["--no-api"],
        ["--id", "a_b"],
        ["--id", "x" * 65],
        ["--no-seccomp", "--seccomp-filter", "x"],
        ["--api-socket", "x"],
        ["more"],
    ],
)
def test_the_stand_in_takes_no_other_words(vmm: Firecracker, stand_in: Path, words: list[str]) -> None:
    """What is no word of Firecracker's, or none for an owner, ends it with Firecracker's status."""
    done = subprocess.run([stand_in, *words], capture_output=True, timeout=30, check=False)
    assert done.returncode == stand_in_program.BAD_ARGUMENTS
    assert done.stderr


def test_a_socket_that_is_there_is_not_taken_over(vmm: Firecracker, stand_in: Path, tmp_path: Path) -> None:
    """Where something is already, Firecracker does not listen."""
    (tmp_path / "s").touch()
    done = subprocess.run(
        [stand_in, "--api-sock", tmp_path / "s"], capture_output=True, timeout=30, check=False
    )
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("Cannot create guest memory: Cannot allocate memory (os error 12)", HostLacks),
        ("No space left on device (os error 28)", DiskFull),
        ("Open tap device failed: Error while creating ifreq: Resource busy (os error 16)", Busy),
        ("Kvm error: Error creating KVM object: No such file or directory (os error 2)", HostLacks),
        ("something new" * 1000, ProgramFailed),
        ("", ProgramFailed),
    ],
)
def test_complaints_become_errors(
    vmm: Firecracker, make_machine: MakeMachine, said: str, error: type[BangerError]
) -> None:
    """Each known complaint is an error of its own; an unknown one is quoted, shortened."""
    found = explain(said, make_machine())
    assert type(found) is error
    assert len(found.message) < 1000
    assert "{" not in found.message


def test_a_machine_of_another_operation_is_not_adopted(vmm: Firecracker, make_machine: MakeMachine) -> None:
    """The operation's mark decides, not the VM's alone."""
    machine = make_machine()
    old = vmm.launch(machine)
    assert Direct().launched(machine) == old
    assert Direct().launched(msgspec.structs.replace(machine, op="op-2")) is None
