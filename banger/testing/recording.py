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
from banger.config import Config, Dirs, VmPaths
from banger.errors import Busy, Cancelled, HostLacks, PortTaken, ProgramFailed, WrongState
from banger.guest import ssh
from banger.images import base, debian, store
from banger.images import kernel as kernels
from banger.images.remote.oci import ImageConfig, Layer, Pulled
from banger.model import Artifact, Process, Value
from banger.tasks.context import World
from banger.vmm.accelerator import Accelerator
from banger.vmm.driver import Disk, Machine, Running

HALF = "banger.half"
FIRST_PID = 1 << 22
"""PID_MAX_LIMIT of linux/threads.h: no real process has this pid or a higher one."""

PIDS = 4_000_000


class Record(Value):
    """One VMM that runs: who started it, for which VM, and what it keeps for itself."""

    vm: str
    op: str
    process: Process
    runtime: Path
    ssh_port: int
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
            ssh_port=machine.ssh_port,
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
                yield Running(vm=record.vm, process=record.process, ssh_port=record.ssh_port)

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
            if not path.exists():
                raise HostLacks(f"There is no {path}.")
        for record in self._records():
            if record.ssh_port == machine.ssh_port:
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

    def power_off(self, target: ssh.Target) -> None:
        """Switch the guest off; raises ProgramFailed when nobody answers."""
        if not self._vmm.find(target.vm) or not self._vmm.guest(target.vm).exists():
            raise ProgramFailed("ssh exited with 255: Connection refused", status=255)
        self._vmm.switch_off(target.paths)


class RecordingDisks:
    """Disks that are a line of text, made as real ones are: beside, then renamed."""

    def make(self, path: Path, size_mib: int, *, label: str) -> None:
        """Make it so that a disk is at `path`; an existing one is left as it is."""
        if path.exists():
            return
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            new = Path(file.name)
        try:
            write(new, f"{label} {size_mib} MiB\n".encode())
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def check(self, path: Path) -> bool:
        """Look whether the disk is whole: there is nothing to mend in a line of text."""
        if not path.read_bytes().endswith(b" MiB\n"):
            raise ProgramFailed(f"The disk {path.name} is half a line.")
        return False


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
            write(staging / base.FILE, b"a root file system")
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
            write(staging / kernels.VMLINUZ, b"a kernel")
            write(staging / kernels.INITRD, b"an archive")
            return {"version": "0"}

        return store.build(cache, "kernel", recipe.name, recipe.digest, make, cancelled)


class RecordingPuller:
    """A registry whose images have two layers of a few bytes."""

    def fetch(
        self, reference: str, blobs: Path, *, progress: Callable[[str], None], cancelled: Callable[[], bool]
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
        progress: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> dict[str, str | int | list[str]]:
        """Fill an artifact's staging directory from the image's layers."""
        progress(f"joining {len(pulled.layers)} layers into {name}")
        _stop_if(cancelled)
        write(staging / base.FILE, b"".join(layer.path.read_bytes() for layer in pulled.layers))
        return {"reference": pulled.reference, "manifest": pulled.digest}


class RecordingWorld(World):
    """The world of steps on a recording host; `place` is the directory of its VMMs."""

    def __init__(self, dirs: Dirs, config: Config, place: Path):
        super().__init__(dirs, config)
        self.recorded = RecordingVmm(place)
        self.vmm = self.recorded
        self.accelerator = Accelerator(name="tcg", why="Nothing runs here.", tsc_khz=1)
        self.agent = self.shell = RecordingGuest(self.recorded)
        self.disks = RecordingDisks()
        self.images = RecordingImages()
        self.kernels = RecordingKernels()
        self.puller = RecordingPuller()

    def running(self, runtime: Path) -> Iterable[Running]:
        """List the VMMs whose sockets are in this directory."""
        return self.recorded.running(runtime)
