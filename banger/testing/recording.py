"""A host without QEMU: its VMMs, guests and builders are small files, so they survive kill -9.

It keeps the promises of the real ones that a step can see, and every effect takes several file
operations, so that there is a middle to die in. Between the two halves of a write it raises an
audit event of its own, HALF: Python raises none there.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from banger import proc
from banger.config import Config, Dirs, Limits, VmPaths
from banger.errors import Busy, Cancelled, HostLacks, PortTaken, ProgramFailed, WrongState
from banger.events.fold import Vm
from banger.guest import ssh
from banger.helper.devicemapper import MAPPER
from banger.helper.disks import SECTOR
from banger.helper.storage import MIN_BYTES
from banger.images import base, debian, store
from banger.images import kernel as kernels
from banger.images import seed as seeds
from banger.images.layers import flatten
from banger.images.magic import RootFormat
from banger.images.remote.oci import ImageConfig, Layer, Pulled
from banger.model import Artifact, Process, Value
from banger.tasks.context import Ask, World
from banger.testing.recording_jailed import Inmates, RecordingFirecracker, line
from banger.testing.recording_root import RecordingRoot
from banger.testing.root_disks import RecordingDisks as RecordingKernelDisks
from banger.testing.root_net import RecordingNet
from banger.vmm.accelerator import Accelerator
from banger.vmm.driver import Disk, Machine, Running, Vmm
from banger.workspace import guest as workspaces
from banger.workspace.parcel import LAST

HALF = "banger.half"
FIRST_PID = 1 << 22
"""PID_MAX_LIMIT of linux/threads.h: no real process has this pid or a higher one."""

PIDS = 4_000_000

ELF = b"\x7fELF\x02\x01" + bytes(12) + b"\x3e\x00"
"""As much of a kernel for x86-64 as is looked at."""


class Record(Value):
    """One VMM that runs: who started it, for which VM, and what it keeps for itself."""

    vm: str
    op: str
    process: Process
    runtime: Path
    ssh_port: int | None
    address: str | None
    written: tuple[Path, ...]


def write(path: Path, content: bytes) -> None:
    """Write a file (0600) in two halves."""
    with path.open("wb") as file:
        path.chmod(0o600)
        file.write(content[: len(content) // 2])
        file.flush()
        sys.audit(HALF, str(path))
        file.write(content[len(content) // 2 :])


class RecordingVmm:
    """The `Vmm` whose processes are records in a directory.

    A record that is half written is a child that is forked and has no mark yet: `find` does not see
    it, `destroy` ends it.
    """

    def __init__(self, place: Path):
        self._place = place

    def launch(self, machine: Machine) -> Process:
        """Make it so that the machine runs; see `Vmm.launch`."""
        paths, old = machine.paths, self._record(machine.vm)
        if old is not None and old.op == machine.op and _started(paths, old.process):
            return old.process
        self.destroy(machine.vm, paths)
        self._refuse(machine)
        for path in (paths.qmp, paths.agent, paths.vmm_log):
            write(path, b"")
        process = _identity()
        record = Record(
            vm=machine.vm,
            op=machine.op,
            process=process,
            runtime=paths.runtime,
            ssh_port=None if machine.tap else machine.ssh_port,
            address=machine.address,
            written=tuple(disk.path for disk in machine.disks if not disk.read_only),
        )
        write(self._path(machine.vm), msgspec.json.encode(record, enc_hook=str))
        write(paths.console, b"ok\n")
        write(paths.pidfile, _pid_line(process))
        return process

    def find(self, vm: str) -> list[Process]:
        """Find the VMM of the VM with this id."""
        record = self._record(vm)
        return [] if record is None else [record.process]

    def running(self, runtime: Path) -> Iterable[Running]:
        """List the VMMs whose sockets are in this directory."""
        for record in self._records():
            if record.runtime == runtime:
                yield Running(
                    vm=record.vm,
                    process=record.process,
                    ssh_port=record.ssh_port,
                    address=record.address,
                )

    def alive(self, process: Process) -> bool:
        """Tell whether exactly this VMM still runs."""
        return any(record.process == process for record in self._records())

    def wait_gone(self, process: Process, timeout_s: float) -> bool:  # noqa: ARG002  nothing ends by itself
        """Tell whether this VMM has ended: here, nothing does so later than what ends it."""
        return not self.alive(process)

    def age_s(self, process: Process) -> float:
        """Tell for how many seconds this VMM has been running."""
        return proc.age_s(process)

    def power_button(self, paths: VmPaths) -> None:
        """Press the guest's power button; a guest that is not ready does not heed it."""
        if self._record(paths.vm) is None:
            raise WrongState("No VMM runs.")
        if self.guest(paths.vm).exists():
            self.switch_off(paths)

    def destroy(self, vm: str, paths: VmPaths) -> None:
        """Make it so that nothing of this VM's VMM exists; see `Vmm.destroy`."""
        for path in (self._path(vm), self.guest(vm), paths.qmp, paths.agent, paths.pidfile):
            path.unlink(missing_ok=True)

    def crash_report(self, paths: VmPaths) -> str:
        """Tell what the VMM and the guest said last."""
        said = (path.read_text() for path in (paths.vmm_log, paths.console) if path.exists())
        return "\n".join(text for text in said if text)

    # -- what the guest does -----------------------------------------------------------------

    def guest(self, vm: str) -> Path:
        """Give the file that is there while the VM's guest is ready."""
        return self._place / f"{vm}.ready"

    def kill(self, vm: str) -> None:
        """End a VMM as SIGKILL does: its sockets and its pidfile stay."""
        for path in (self.guest(vm), self._path(vm)):
            path.unlink(missing_ok=True)

    def switch_off(self, paths: VmPaths) -> None:
        """End a VMM as a guest does that powers off: its sockets stay, as QEMU's do."""
        self.kill(paths.vm)
        paths.pidfile.unlink(missing_ok=True)

    def _path(self, vm: str) -> Path:
        return self._place / f"{vm}.vmm"

    def _record(self, vm: str) -> Record | None:
        try:
            data = self._path(vm).read_bytes()
            return msgspec.json.decode(data, type=Record, dec_hook=lambda kind, text: kind(text))
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def _records(self) -> Iterable[Record]:
        found = (self._record(path.stem) for path in sorted(self._place.glob("*.vmm")))
        return [record for record in found if record is not None]

    def _refuse(self, machine: Machine) -> None:
        """Raise what a real VMM ends with when the host lacks what the machine needs."""
        for path in (machine.kernel, machine.initrd, *(disk.path for disk in machine.disks)):
            if not (has_device(self._place, path) if _is_device(path) else path.exists()):
                raise HostLacks(f"There is no {path}.")
        net = RecordingNet(self._place / "root" / "net.json")
        if machine.tap is not None and net.link(machine.tap) is None:
            raise HostLacks(f"There is no interface {machine.tap}.")
        for record in self._records():
            if record.ssh_port == machine.ssh_port and not machine.tap:
                raise PortTaken(f"Port {machine.ssh_port} is taken.")
            if any(_taken(disk, record) for disk in machine.disks):
                raise Busy(f"A disk of {machine.name} is in use by {record.vm}.")


def _identity() -> Process:
    """Make an identity that no process has had: its pid is the microsecond, its start a clock tick."""
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return msgspec.structs.replace(
        proc.me(),
        pid=FIRST_PID + now_ns // 1000 % PIDS,
        start_ticks=now_ns * os.sysconf("SC_CLK_TCK") // 1_000_000_000,
    )


def _pid_line(process: Process) -> bytes:
    return b"%d\n" % process.pid


def _started(paths: VmPaths, process: Process) -> bool:
    """Tell whether a VMM has come to the end of its start; a pidfile is the last that it writes."""
    return paths.pidfile.exists() and paths.pidfile.read_bytes() == _pid_line(process)


def _is_device(path: Path) -> bool:
    return path.is_relative_to(MAPPER)


def has_device(place: Path, path: Path) -> bool:
    """Tell whether a dm device, and the node that leads to it, are in root's recorded kernel."""
    kernel = RecordingKernelDisks(place / "root")
    return path.name in kernel.nodes() and any(path.name == device.name for device in kernel.devices())


def _taken(disk: Disk, record: Record) -> bool:
    return not disk.read_only and disk.path in record.written


class RecordingGuest:
    """The inside of a recorded VM: it is ready as soon as it is asked, and obeys."""

    def __init__(self, vmm: RecordingVmm):
        self._vmm = vmm

    def wait_ready(
        self,
        path: Path,
        timeout_s: float,  # noqa: ARG002  nothing takes time here
        *,
        cancelled: Callable[[], bool],
        alive: Callable[[], bool],
        report: Callable[[], str],
    ) -> None:
        """Have the guest become ready; raises as `banger.guest.agent` does."""
        if not alive() or not path.exists():
            raise ProgramFailed(f"The VMM ended before the guest was ready. {report()}")
        if cancelled():
            raise Cancelled
        write(self._vmm.guest(path.stem), b"ready\n")


class RecordingShell:
    """The same over SSH, by which one in a jail is reached from the start."""

    def __init__(self, vmm: RecordingVmm, inmates: Inmates):
        self._vmm = vmm
        self._inmates = inmates

    def wait_ready(
        self,
        target: ssh.Target,
        timeout_s: float,  # noqa: ARG002  nothing takes time here
        *,
        cancelled: Callable[[], bool],
        alive: Callable[[], bool],
        report: Callable[[], str],
    ) -> None:
        """Have the guest become ready; raises as `banger.guest.ssh` does."""
        if not alive():
            raise ProgramFailed(f"The VMM ended before the guest was ready. {report()}")
        if cancelled():
            raise Cancelled
        for process in self._inmates.of(target.vm):
            write(self._inmates.said(target.vm, "ready"), line(process))

    def power_off(self, target: ssh.Target) -> None:
        """Switch the guest off; raises ProgramFailed when nobody answers."""
        if self._vmm.find(target.vm) and self._vmm.guest(target.vm).exists():
            self._vmm.switch_off(target.paths)
            return
        for process in self._inmates.of(target.vm):
            if self._inmates.is_so(target.vm, "ready", process):
                self._inmates.kill(process)
                return
        raise ProgramFailed("ssh exited with 255: Connection refused", status=255)


class RecordingWorkspaces:
    """Workspaces that are a line of text beside the work disk: new first, then in place of the one before."""

    def look(self, target: ssh.Target, place: workspaces.Place) -> workspaces.Seen:  # noqa: ARG002
        """Have git and room, as every guest here."""
        return workspaces.Seen(git=True, free_kib=1 << 20)

    def send(
        self,
        target: ssh.Target,
        place: workspaces.Place,
        parcel: Path,
        cancelled: Callable[[], bool],
    ) -> None:
        """Make it so that the workspace is there; raises as `banger.workspace.guest` does."""
        if not (parcel / LAST).exists():
            raise ProgramFailed("The parcel is not whole.")
        _stop_if(cancelled)
        there, new = self._path(target), self._path(target).with_suffix(".new")
        if there.exists() and there.read_text() == place.op:
            return
        write(new, place.op.encode())
        if there.exists():
            there.replace(there.with_suffix(".before"))
        new.replace(there)

    def withdraw(self, target: ssh.Target, place: workspaces.Place) -> None:
        """Make it so that the workspace before is there."""
        there = self._path(target)
        there.with_suffix(".new").unlink(missing_ok=True)
        if there.exists() and there.read_text() == place.op:
            there.unlink()
        if not there.exists() and there.with_suffix(".before").exists():
            there.with_suffix(".before").replace(there)

    def _path(self, target: ssh.Target) -> Path:
        return target.paths.work.with_suffix(".workspace")


class RecordingDisks:
    """Disks that are a line of text, made as real ones are: beside, then renamed.

    Those that root makes are in its recorded kernel.
    """

    def __init__(self, place: Path):
        self._place = place

    def make(self, path: Path, size_mib: int, *, label: str) -> None:
        """Make it so that a disk is at `path`; an existing one is left as it is."""
        if path.exists():
            return
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            new = Path(file.name)
        try:
            write(new, f"{label} {size_mib} MiB\n".encode().rjust(SECTOR))
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def make_home(self, path: Path, size_mib: int, *, seed: Path, below: bytes) -> None:
        """Make it so that a disk that holds its seed is at `path`."""
        self.make(path, size_mib, label=f"home {below.decode()} {seed.read_text()}")

    def grow(self, path: Path, size_mib: int) -> None:
        """Make it so that the disk has this size, as a real one grows: in a copy beside it."""
        label = path.read_text("utf-8").lstrip().rpartition(" ")[0].rpartition(" ")[0]
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            new = Path(file.name)
        write(new, f"{label} {size_mib} MiB\n".encode().rjust(SECTOR))
        new.replace(path)

    def check(self, path: Path) -> bool:
        """Look whether the disk is whole: there is nothing to mend in a line of text."""
        if _is_device(path):
            if not has_device(self._place, path):
                raise ProgramFailed(f"There is no {path}.")
            return False
        if not path.read_bytes().endswith(b" MiB\n"):
            raise ProgramFailed(f"The disk {path.name} is half a line.")
        return False


def take_seed(
    base: Path,
    form: RootFormat,
    target: Path,
    *,
    limits: flatten.Limits | None = None,  # noqa: ARG001  a few bytes
    cancelled: Callable[[], bool] = lambda: False,  # noqa: ARG001  that take no time
) -> None:
    """Write a line for what a base file has in /root."""
    write(target, f"of {base.stat().st_size} bytes, {form}".encode())


def write_whole(
    squashfs: Path,
    target: Path,
    *,
    label: str,
    least_mib: int,  # noqa: ARG001  as little as root takes for a disk
    limits: flatten.Limits | None = None,  # noqa: ARG001  a few bytes
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Write a line for what a squashfs has, in a file of the size of a disk."""
    _stop_if(cancelled)
    write(target, f"{label}: {squashfs.stat().st_size} bytes".encode())
    os.truncate(target, MIN_BYTES)


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled


class RecordingImages:
    """Images without packages, published by the real store."""

    def build(
        self,
        recipe: debian.Recipe,
        cache: Path,
        *,
        progress: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> Artifact:
        """Make it so that the recipe's image is in the cache."""

        def make(staging: Path) -> dict[str, str | int | list[str]]:
            write(staging / "root.tar", b"packages")
            _stop_if(cancelled)
            progress("writing the file system")
            write(staging / base.FILE, b"a root file system".ljust(SECTOR))
            take_seed(staging / base.FILE, "squashfs", staging / seeds.FILE)
            (staging / "root.tar").unlink()
            return {"packages": list(recipe.include)}

        return store.build(cache, "image", recipe.name, recipe.digest, make, cancelled)


class RecordingKernels:
    """Kernel bundles without packages, published by the real store."""

    def build(
        self,
        recipe: kernels.Recipe,
        cache: Path,
        *,
        progress: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> Artifact:
        """Make it so that the recipe's kernel and initrd are in the cache."""

        def make(staging: Path) -> dict[str, str | int | list[str]]:
            progress("making the initrd")
            _stop_if(cancelled)
            write(staging / kernels.VMLINUZ, ELF)
            write(staging / kernels.INITRD, b"an archive")
            return {"version": "0"}

        return store.build(cache, "kernel", recipe.name, recipe.digest, make, cancelled)


class RecordingPuller:
    """A registry whose images have two layers of a few bytes."""

    def fetch(
        self,
        reference: str,
        blobs: Path,
        *,
        limits: Limits,  # noqa: ARG002  a few bytes
        progress: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> Pulled:
        """Make it so that the image's blobs are in the cache."""
        layers = []
        for number in range(2):
            progress(f"layer {number}")
            _stop_if(cancelled)
            digest = f"sha256:{hashlib.sha256(f'{reference} {number}'.encode()).hexdigest()}"
            path = blobs / digest.replace(":", "-")
            blobs.mkdir(mode=0o700, parents=True, exist_ok=True)
            write(path, digest.encode())
            layers.append(Layer(media_type="layer", digest=digest, size=71, diff_id=digest, path=path))
        manifest = f"sha256:{hashlib.sha256(reference.encode()).hexdigest()}"
        return Pulled(reference=reference, digest=manifest, config=ImageConfig(), layers=tuple(layers))

    def make(
        self,
        pulled: Pulled,
        staging: Path,
        name: str,
        *,
        blobs: Path,  # noqa: ARG002  nobody prunes meanwhile
        limits: Limits,  # noqa: ARG002  a few bytes
        progress: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> dict[str, str | int | list[str]]:
        """Fill an artifact's staging directory from the image's layers."""
        progress(f"joining {len(pulled.layers)} layers into {name}")
        _stop_if(cancelled)
        write(staging / base.FILE, b"".join(layer.path.read_bytes() for layer in pulled.layers))
        take_seed(staging / base.FILE, "squashfs", staging / seeds.FILE)
        return {"reference": pulled.reference, "manifest": pulled.digest}


class RecordingWorld(World):
    """The world of steps on a recording host; `place` is the directory of its VMMs."""

    def __init__(self, dirs: Dirs, config: Config, place: Path):
        super().__init__(dirs, config)
        self._place = place
        self.recorded = RecordingVmm(place)
        self.vmm = self.recorded
        self.accelerator = Accelerator(name="tcg", why="Nothing runs here.", tsc_khz=1)
        self.inmates = Inmates(place)
        self.agent = RecordingGuest(self.recorded)
        self.shell = RecordingShell(self.recorded, self.inmates)
        self.disks = RecordingDisks(place)
        self.owner_home = place
        self.write_whole = write_whole
        self.take_seed = take_seed
        self.workspaces = RecordingWorkspaces()
        self.images = RecordingImages()
        self.kernels = RecordingKernels()
        self.puller = RecordingPuller()
        self.root = RecordingRoot(place)

    def firecracker(self, ask: Ask) -> Vmm:
        """Give the real driver, over recorded jails."""
        return RecordingFirecracker(self.root, ask, self._place, write)

    def running(self, runtime: Path) -> Iterable[Running]:
        """List the VMMs whose sockets are in this directory."""
        return self.recorded.running(runtime)

    def alive(self, process: Process) -> bool:
        """Tell whether exactly this VMM runs, in a jail or without."""
        return self.recorded.alive(process) or self.inmates.alive(process)

    def kill(self, vm: Vm) -> None:
        """End a VM's VMM as SIGKILL does."""
        self.recorded.kill(vm.id)
        if vm.process is not None:
            self.inmates.kill(vm.process)
