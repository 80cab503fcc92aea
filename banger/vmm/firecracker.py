"""Firecracker: the promises of `Vmm` kept through its API socket.

Firecracker has no network of its own, only taps. It does not lock disks, writes no pidfile, and a
guest cannot switch it off: it ends when its guest resets the CPU through the keyboard controller,
which Linux does when it reboots with `reboot=k`. So a guest on it reboots in order to power off.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import msgspec

from banger import proc
from banger.config import VmPaths
from banger.errors import (
    BangerError,
    Busy,
    DiskFull,
    HostLacks,
    ProgramFailed,
    TimedOut,
    WrongState,
    from_os_error,
)
from banger.images import vmlinux
from banger.model import Process, Value
from banger.vmm import console, firecracker_api, vsock, witness
from banger.vmm.driver import MARK_ADDRESS, MARK_OP, MARK_VM, Disk, Machine, Running
from banger.vmm.firecracker_api import (
    Api,
    BootSource,
    Drive,
    Entropy,
    Logger,
    MachineConfig,
    MemoryBackend,
    Metrics,
    NetworkInterface,
    SnapshotCreate,
    SnapshotLoad,
    Version,
    Vsock,
)

PROGRAM = "firecracker"
OLDEST: Version = (1, 5, 0)
NEWEST: Version = (1, 17, 0)
"""The version whose API description every request is checked against; a newer one is not refused."""

WORDS = ("reboot=k", "pci=off")
"""Added to the kernel's command line: how to end Firecracker, and that there is no PCI bus to look for."""

START_TIMEOUT_S = 30.0
CONTROL_TIMEOUT_S = 5.0
SNAPSHOT_TIMEOUT_S = 120.0
VERSION_TIMEOUT_S = 5.0
LAST_WORDS_S = 2.0
LONGEST_METRICS = 1 << 20
SAID_CHARACTERS = 600

End = Literal["api", "vsock"]
Configure = Callable[[Api, Machine, "Seen"], None]
"""Turns a fresh Firecracker into a machine that runs."""


class Seen(Value):
    """The paths of a machine as Firecracker sees them; in a jail they are others than ours.

    `disks` are in the order of the machine's. Without `log` Firecracker's lines go to its console.
    """

    kernel: str
    initrd: str
    disks: tuple[str, ...]
    vsock: str
    log: str | None = None
    metrics: str | None = None


class Launcher(Protocol):
    """How a Firecracker is brought up and ended, in a jail or without; nothing is configured here."""

    def start(self, machine: Machine) -> Process:
        """Make it so that a fresh Firecracker runs for the machine and takes connections.

        One of before is ended first. Raises Busy, DiskFull, HostLacks, ProgramFailed or TimedOut.
        """

    def seen(self, machine: Machine) -> Seen:
        """Tell where Firecracker finds the machine's files."""

    def connect(self, paths: VmPaths, end: End) -> socket.socket:
        """Connect to one of its sockets. Raises WrongState when nobody listens, TimedOut."""

    def launched(self, machine: Machine) -> Process | None:
        """Give the Firecracker that this machine's operation started before, if it runs."""

    def find(self, vm: str) -> list[Process]:
        """Find the Firecrackers of the VM with this id."""

    def end(self, vm: str, paths: VmPaths) -> None:
        """Make it so that no process or socket of it exists. Raises TimedOut."""

    def said(self, paths: VmPaths) -> str:
        """Tell what Firecracker and its guest said last."""


class Firecracker:
    """The `Vmm` of a host with KVM and root's helper."""

    def __init__(self, launcher: Launcher):
        self._launcher = launcher

    def launch(self, machine: Machine) -> Process:
        """Make it so that the machine runs; see `Vmm.launch`. A bzImage is unpacked once, in seconds."""
        return self._adopt(machine) or self._bring_up(_bootable(machine), _boot)

    def restore(self, machine: Machine, state: str, memory: str) -> Process:
        """Make it so that the machine goes on where a snapshot was taken; raises as `launch` does.

        `state` and `memory` are the snapshot's files as Firecracker sees them; its disks and its tap
        must be what and where they were.
        """

        def load(api: Api, _: Machine, seen: Seen) -> None:
            _watch(api, seen)
            backend = MemoryBackend(backend_path=memory, backend_type="File")
            api.load(SnapshotLoad(snapshot_path=state, mem_backend=backend, resume_vm=True))

        return self._adopt(machine) or self._bring_up(machine, load)

    def find(self, vm: str) -> list[Process]:
        """Find the Firecracker processes of the VM with this id."""
        return self._launcher.find(vm)

    def alive(self, process: Process) -> bool:
        """Tell whether exactly this Firecracker still runs."""
        return proc.alive(process)

    def wait_gone(self, process: Process, timeout_s: float) -> bool:
        """Wait until this Firecracker has ended; see `Vmm.wait_gone`."""
        return proc.wait_gone(process, timeout_s)

    def age_s(self, process: Process) -> float:
        """Tell for how many seconds this Firecracker has been running."""
        return proc.age_s(process)

    def power_button(self, paths: VmPaths) -> None:
        """Press Ctrl-Alt-Del, the one key that Firecracker has (x86 only); see `Vmm.power_button`."""
        with self._api(paths) as api:
            api.ctrl_alt_del()

    def pause(self, paths: VmPaths) -> None:
        """Make it so that the guest's CPUs stand still. Raises WrongState, TimedOut, ProgramFailed."""
        with self._api(paths) as api:
            if api.instance().state != "Paused":
                api.pause()

    def resume(self, paths: VmPaths) -> None:
        """Make it so that the guest's CPUs run. Raises WrongState, TimedOut, ProgramFailed."""
        with self._api(paths) as api:
            if api.instance().state != "Running":
                api.resume()

    def snapshot(self, paths: VmPaths, state: str, memory: str) -> None:
        """Write a paused machine's state and memory to files, given as Firecracker sees them.

        Raises ProgramFailed when it is not paused, WrongState, TimedOut.
        """
        with self._api(paths, SNAPSHOT_TIMEOUT_S) as api:
            to = SnapshotCreate(snapshot_path=state, mem_file_path=memory, snapshot_type="Full")
            api.snapshot(to)

    def metrics(self, paths: VmPaths) -> dict[str, Any]:
        """Give Firecracker's own figures of this moment, as it names them; empty where it keeps none.

        Raises WrongState when it does not run, ProgramFailed, TimedOut.
        """
        if not paths.metrics.exists():
            return {}
        with _opened(paths.metrics) as pipe:
            _drain(pipe)
            with self._api(paths) as api:
                api.flush_metrics()
            lines = _drain(pipe).splitlines()
        try:
            return msgspec.json.decode(lines[-1], type=dict[str, Any])
        except (IndexError, msgspec.DecodeError):
            raise ProgramFailed("Firecracker wrote no metrics.") from None

    def dial(self, paths: VmPaths) -> vsock.Dial:
        """Give what connects to the guest's vsock, for `banger.vmm.vsock`."""
        return lambda: self._launcher.connect(paths, "vsock")

    def destroy(self, vm: str, paths: VmPaths) -> None:
        """Make it so that nothing of this VM's Firecracker exists; see `Vmm.destroy`."""
        self._launcher.end(vm, paths)

    def crash_report(self, paths: VmPaths) -> str:
        """Tell what Firecracker and the guest's console said last."""
        return self._launcher.said(paths)

    @contextlib.contextmanager
    def _api(self, paths: VmPaths, timeout_s: float = CONTROL_TIMEOUT_S) -> Iterator[Api]:
        with firecracker_api.using(self._launcher.connect(paths, "api"), timeout_s) as api:
            yield api

    def _adopt(self, machine: Machine) -> Process | None:
        """Give the Firecracker that this operation launched before, if its guest was started."""
        process = self._launcher.launched(machine)
        if process is not None:
            with contextlib.suppress(BangerError), self._api(machine.paths) as api:
                if api.instance().state != "Not started":
                    return process
        return None

    def _bring_up(self, machine: Machine, configure: Configure) -> Process:
        try:
            process = self._launcher.start(machine)
            with self._api(machine.paths, START_TIMEOUT_S) as api:
                _check_version(api.version())
                configure(api, machine, self._launcher.seen(machine))
        except OSError as error:
            raise from_os_error(error) from error
        except WrongState:
            raise explain(self.crash_report(machine.paths), machine) from None
        except ProgramFailed as error:
            raise explain(error.message, machine) from None
        return process


def version_of(program: Path) -> Version:
    """Ask a Firecracker program for its version. Raises ProgramFailed, HostLacks, TimedOut."""
    said = proc.run([program, "--version"], timeout_s=VERSION_TIMEOUT_S)
    found = re.search(r"^Firecracker (v\S+)", said, re.MULTILINE)
    return firecracker_api.parse_version(found[1] if found else said.strip()[:40])


def is_known(version: Version) -> bool:
    """Tell whether the requests were checked for this version."""
    return OLDEST <= version <= NEWEST


def running(runtime: Path) -> Iterator[Running]:
    """List the Firecrackers whose sockets are in this directory, whether or not anyone knows of them."""
    for process, vm in proc.marked(MARK_VM):
        if f"--api-sock {runtime}/" in proc.words(process):
            yield Running(vm=vm, process=process, ssh_port=None, address=proc.mark_of(process, MARK_ADDRESS))


def _check_version(version: Version) -> None:
    if version < OLDEST:
        raise HostLacks(f"Firecracker is version {_dotted(version)}; {_dotted(OLDEST)} or newer is needed.")


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def _bootable(machine: Machine) -> Machine:
    """Check that there is something to boot, and give the machine with its kernel unpacked."""
    for what, path in (("kernel", machine.kernel), ("initrd", machine.initrd)):
        if not os.access(path, os.R_OK):
            raise HostLacks(f"The {what} {path} cannot be read.")
    try:
        return msgspec.structs.replace(machine, kernel=vmlinux.elf(machine.kernel))
    except OSError as error:
        raise from_os_error(error) from error


def _boot(api: Api, machine: Machine, seen: Seen) -> None:
    """Describe the machine, and start it."""
    _watch(api, seen)
    api.machine(MachineConfig(vcpu_count=machine.vcpu, mem_size_mib=machine.memory_mib))
    api.boot_source(
        BootSource(kernel_image_path=seen.kernel, initrd_path=seen.initrd, boot_args=boot_args(machine))
    )
    for disk, path in zip(machine.disks, seen.disks, strict=True):
        api.drive(drive(disk, path))
    if machine.tap is not None:
        api.network(NetworkInterface(iface_id="eth0", host_dev_name=machine.tap, guest_mac=machine.mac))
    api.vsock(Vsock(guest_cid=vsock.GUEST_CID, uds_path=seen.vsock))
    api.entropy(Entropy())
    api.start()


def _watch(api: Api, seen: Seen) -> None:
    if seen.log is not None:
        api.logger(Logger(log_path=seen.log, level="Warning"))
    if seen.metrics is not None:
        api.metrics(Metrics(metrics_path=seen.metrics))


def boot_args(machine: Machine) -> str:
    """Give the kernel's command line.

    Firecracker makes up each disk's serial itself, but keeps their order. Words that the kernel does
    not know become the environment of its first program: `disk_base=/dev/vda` tells it what is where.
    """
    places = (f"disk_{disk.serial}=/dev/vd{chr(ord('a') + at)}" for at, disk in enumerate(machine.disks))
    return " ".join([*machine.words, *WORDS, *places])


def drive(disk: Disk, path: str) -> Drive:
    """Give what Firecracker is told of a disk; none is the root device, for the initrd mounts them."""
    return Drive(drive_id=disk.serial, path_on_host=path, is_root_device=False, is_read_only=disk.read_only)


# Pieces of what Firecracker says, the error each stands for, and its sentence. The first that fits is taken.
COMPLAINTS: tuple[tuple[str, type[BangerError], str], ...] = (
    ("Cannot allocate memory", HostLacks, "This host cannot give {name} {memory_mib} MiB of memory."),
    ("No space left on device", DiskFull, "There is no space left on the disk."),
    ("Resource busy", Busy, "Another program uses the tap {tap} of {name}."),
    ("KVM", HostLacks, "Firecracker needs KVM, which does not work here."),
)


def explain(said: str, machine: Machine) -> BangerError:
    """Turn what Firecracker said when it did not start into the error that stands for it."""
    for text, error, sentence in COMPLAINTS:
        if text in said:
            return error(sentence.format(name=machine.name, memory_mib=machine.memory_mib, tap=machine.tap))
    return ProgramFailed(f"Firecracker did not start: {said[-SAID_CHARACTERS:] or 'it said nothing.'}")


class Direct:
    """The `Launcher` without a jail: Firecracker as the owner's own process, under its own seccomp filter.

    It needs a /dev/kvm that this user may open and a tap that is this user's: it is for hosts without root's
    helper, and for tests.
    """

    def __init__(self, program: Path | None = None):
        self._program = program

    def start(self, machine: Machine) -> Process:
        """Make it so that a fresh Firecracker runs; see `Launcher.start`."""
        paths = machine.paths
        with (
            witness.sole(machine.vm, paths.directory) as lock,
            _disks_locked(machine) as disks,
            _hang_up() as (hung_up, end),
        ):
            _remove_remains(paths)
            os.mkfifo(paths.metrics, 0o600)
            self._spawn(machine, keep=(lock, end.fileno(), *disks))
            end.close()
            _wait_listening(paths.qmp, hung_up)
        found = self.find(machine.vm)
        if not found:
            raise firecracker_api.gone()
        return found[0]

    def seen(self, machine: Machine) -> Seen:
        """Give the machine's own paths. /dev/stderr is a pipe here: see `banger.vmm.console`."""
        return Seen(
            kernel=str(machine.kernel),
            initrd=str(machine.initrd),
            disks=tuple(str(disk.path) for disk in machine.disks),
            vsock=str(machine.paths.agent),
            log="/dev/stderr",
            metrics=str(machine.paths.metrics),
        )

    def connect(self, paths: VmPaths, end: End) -> socket.socket:
        """Connect by the socket's path; see `Launcher.connect`."""
        return firecracker_api.connect(paths.qmp if end == "api" else paths.agent, CONTROL_TIMEOUT_S)

    def launched(self, machine: Machine) -> Process | None:
        """Find it by the operation's mark; see `Launcher.launched`."""
        found = (one for one in self.find(machine.vm) if proc.mark_of(one, MARK_OP) == machine.op)
        return next(found, None)

    def find(self, vm: str) -> list[Process]:
        """Find them by the VM's mark."""
        return proc.find_by_environ(MARK_VM, vm)

    def end(self, vm: str, paths: VmPaths) -> None:
        """Kill what carries the mark; see `Launcher.end`."""
        try:
            with witness.sole(vm, paths.directory):
                _remove_remains(paths)
        except FileNotFoundError:  # no directory, so no launch since it went; a stray may still run
            witness.end_marked(vm)
            _remove_remains(paths)

    def said(self, paths: VmPaths) -> str:
        """Read the two capped files, when all is written; see `Launcher.said`."""
        if not self.find(paths.vm):
            with contextlib.suppress(FileNotFoundError):
                witness.wait_idle(paths.directory, LAST_WORDS_S)
        said = (console.tail(paths.vmm_log), console.tail(paths.console))
        return "\n".join(text for text in said if text)

    def _spawn(self, machine: Machine, keep: tuple[int, ...]) -> None:
        paths = machine.paths
        paths.vmm_log.unlink(missing_ok=True)
        program = self._program or Path(proc.which(PROGRAM))
        launcher = proc.start_detached(
            [
                "setsid", "--fork", sys.executable, "-I", "-S", console.__file__,
                str(paths.console), str(paths.vmm_log), *_marks(machine), "--",
                str(program),
                "--id", machine.vm,
                "--api-sock", str(paths.qmp),
            ],
            errors=paths.vmm_log,
            keep=keep,
        )  # fmt: skip
        launcher.wait()


def _marks(machine: Machine) -> list[str]:
    """Give what Firecracker carries in its environment."""
    address = [] if machine.address is None else [f"{MARK_ADDRESS}={machine.address}"]
    return [f"{MARK_VM}={machine.vm}", f"{MARK_OP}={machine.op}", *address]


@contextlib.contextmanager
def _disks_locked(machine: Machine) -> Iterator[list[int]]:
    """Lock the machine's disks, for Firecracker to inherit: readers share one, a writer has it alone.

    flock(2) locks go with the last process that has the descriptor, through exec and kill -9.
    """
    with contextlib.ExitStack() as opened:
        fds = []
        for disk in machine.disks:
            try:
                fd = opened.enter_context(_opened(disk.path))
                fcntl.flock(fd, (fcntl.LOCK_SH if disk.read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                hint = f"`fuser -v {disk.path}` shows which one."
                raise Busy(f"Another process uses a disk of {machine.name}.", hint=hint) from None
            except OSError as error:
                why = f"The disk {disk.path} of {machine.name} cannot be read: {error.strerror}."
                raise HostLacks(why) from None
            fds.append(fd)
        yield fds


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open for reading, without waiting for a writer where it is a pipe."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _hang_up() -> Iterator[tuple[int, IO[bytes]]]:
    """Give a pipe whose reading end tells when everybody has gone who inherited the writing one."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as hung_up, os.fdopen(writing, "wb") as end:
        yield hung_up.fileno(), end


def _wait_listening(path: Path, hung_up: int) -> None:
    """Wait until Firecracker takes connections. Raises WrongState when it has ended, TimedOut."""
    deadline = time.monotonic() + START_TIMEOUT_S
    poll = select.poll()
    poll.register(hung_up, select.POLLIN)
    while True:
        with contextlib.suppress(WrongState):
            firecracker_api.connect(path, CONTROL_TIMEOUT_S).close()
            return
        if poll.poll(firecracker_api.LOOK_AGAIN_S * 1000):
            raise firecracker_api.gone()
        if time.monotonic() >= deadline:
            raise TimedOut(f"Firecracker took no connections within {START_TIMEOUT_S:g} s.")


def _drain(pipe: int) -> bytes:
    """Read what is in a pipe now, at most 1 MiB."""
    data = b""
    with contextlib.suppress(BlockingIOError):
        while len(data) < LONGEST_METRICS and (piece := os.read(pipe, 1 << 16)):
            data += piece
    return data


def _remove_remains(paths: VmPaths) -> None:
    for path in (paths.qmp, paths.agent, paths.metrics, paths.pidfile):
        path.unlink(missing_ok=True)
