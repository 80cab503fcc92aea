"""What a step sees of its operation and of the world."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import msgspec

from banger.config import Config, Dirs, Limits, VmPaths
from banger.errors import NotFound, from_dict
from banger.events import queries, work
from banger.events import vocabulary as ev
from banger.events.fold import Op, Vm, fold_on
from banger.events.log import EventLog
from banger.guest import agent, ssh
from banger.helper.client import Answer
from banger.helper.requests import AnyAsk, Request
from banger.images import debian, seed, whole
from banger.images import kernel as kernels
from banger.images.layers import flatten
from banger.images.remote.oci import Pulled
from banger.model import Artifact, Resource
from banger.storage import ext4
from banger.tasks.pipeline import Park, Pipeline
from banger.tasks.root import Pool, Root
from banger.vmm import accelerator, qemu
from banger.vmm.accelerator import Accelerator
from banger.vmm.driver import Running, Vmm
from banger.vmm.qemu import Qemu
from banger.workspace import guest as workspaces

PROGRESS_EVERY_S = 0.2
R = TypeVar("R", contravariant=True)


Ask = Callable[[AnyAsk, Sequence[int]], Answer]
"""How root is asked from inside a step: `Ctx.answer_of_root`."""


class Agent(Protocol):
    """How the guest's agent is heard: `banger.guest.agent`."""

    def wait_ready(
        self,
        path: Path,
        timeout_s: float,
        *,
        cancelled: Callable[[], bool],
        alive: Callable[[], bool],
        report: Callable[[], str],
    ) -> None:
        """Wait until the guest says that it is ready."""


class Shell(Protocol):
    """How a guest is told what to do: `banger.guest.ssh`."""

    def wait_ready(
        self,
        target: ssh.Target,
        timeout_s: float,
        *,
        cancelled: Callable[[], bool],
        alive: Callable[[], bool],
        report: Callable[[], str],
    ) -> None:
        """Wait until the guest's SSH server answers."""

    def power_off(self, target: ssh.Target) -> None:
        """Flush the guest's disks and switch it off."""


class Workspaces(Protocol):
    """How a repository comes into a guest: `banger.workspace.guest`."""

    def look(self, target: ssh.Target, place: workspaces.Place) -> workspaces.Seen:
        """Look what the guest has."""

    def send(
        self, target: ssh.Target, place: workspaces.Place, parcel: Path, cancelled: Callable[[], bool]
    ) -> None:
        """Make it so that what is in a parcel is the workspace, whole."""

    def withdraw(self, target: ssh.Target, place: workspaces.Place) -> None:
        """Make it so that the guest has what it had before."""


class Disks(Protocol):
    """How a disk is made: `banger.storage.ext4`."""

    def make(self, path: Path, size_mib: int, *, label: str) -> None:
        """Make it so that an empty file system is at `path`, whole."""

    def make_home(self, path: Path, size_mib: int, *, seed: Path, below: bytes) -> None:
        """Make it so that a file system with what `seed` has below a directory is at `path`, whole."""

    def grow(self, path: Path, size_mib: int) -> None:
        """Make it so that a file system that is not in use has this size; never a half-grown one."""

    def check(self, path: Path) -> bool:
        """Check and mend a file system that was used and is not in use; True when it was mended."""


class Maker(Protocol[R]):
    """How an artifact is made from its recipe: `banger.images.debian` and `.kernel`."""

    def build(
        self, recipe: R, cache: Path, *, progress: Callable[[str], None], cancelled: Callable[[], bool]
    ) -> Artifact:
        """Make it so that what the recipe makes is in the cache."""


class Puller(Protocol):
    """How an image comes from a registry: `banger.images.pulled`."""

    def fetch(
        self,
        reference: str,
        blobs: Path,
        *,
        limits: Limits,
        progress: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> Pulled:
        """Make it so that the image's blobs are in the cache."""

    def make(
        self,
        pulled: Pulled,
        staging: Path,
        name: str,
        *,
        blobs: Path,
        limits: Limits,
        progress: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> dict[str, str | int | list[str]]:
        """Fill an artifact's staging directory from the image's layers, and say what it is made of."""


class World:
    """The things outside the log that steps act on, each behind what steps ask of it.

    What needs neither a guest nor a long time (directories, keys, initrds, the store of artifacts)
    is the same on every host, and steps do it themselves.
    """

    def __init__(self, dirs: Dirs, config: Config):
        self.dirs = dirs
        self.config = config
        self.agent: Agent = agent
        self.shell: Shell = ssh
        self.workspaces: Workspaces = workspaces
        self.disks: Disks = ext4
        self.owner_home = Path.home()
        self.take_seed: seed.Take = functools.partial(seed.take, limits=flatten.Limits.of(config.limits))
        self.write_whole: whole.Write = functools.partial(
            whole.write, limits=flatten.Limits.of(config.limits)
        )
        self.images: Maker[debian.Recipe] = debian
        self.kernels: Maker[kernels.Recipe] = kernels

    @functools.cached_property
    def puller(self) -> Puller:
        """How images come from registries; what that needs is imported when one is first pulled."""
        from banger.images import pulled

        return pulled

    @functools.cached_property
    def root(self) -> Root:
        """Root's pool, which makes what an ordinary user may not."""
        return Pool(Path(self.config.root_socket))

    @functools.cached_property
    def accelerator(self) -> Accelerator:
        """What runs the guests' instructions, asked for when a VM first needs it.

        Raises HostLacks when the configured one does not work here.
        """
        return accelerator.choose(self.config.accelerator, self.dirs.accelerator)

    @functools.cached_property
    def vmm(self) -> Vmm:
        """The machine monitor of VMs without a jail."""
        return Qemu(self.accelerator)

    def firecracker(self, ask: Ask) -> Vmm:
        """Give the machine monitor of VMs in a jail; `ask` has root do what that takes."""
        from banger.tasks import jail

        return jail.firecracker(self.root, ask)

    def running(self, runtime: Path) -> Iterable[Running]:
        """List the VMMs whose sockets are in this directory; those in jails are in root's list."""
        return qemu.running(runtime)


class Ctx:
    """One attempt at one step, forward or back."""

    def __init__(self, log: EventLog, world: World, claim: work.Claim, op: Op, step: int):
        self.log = log
        self.world = world
        self.dirs = world.dirs
        self.config = world.config
        self.op = op
        self.step = step
        self.emitted: list[tuple[str, ev.Event]] = []
        self._claim = claim
        self._told_at = 0.0
        self._asked = 0

    # -- the operation -----------------------------------------------------------------------

    @property
    def args(self) -> ev.Facts:
        """What the operation was asked with."""
        return self.op.args

    @property
    def facts(self) -> ev.Facts:
        """What the steps before found and made."""
        return self.op.facts

    @property
    def attempt(self) -> int:
        """Which attempt at this step this is, from 1."""
        return self.op.steps[self.step].attempts

    def acquired(self, kind: str) -> Resource | None:
        """Give the resource of this kind that this operation still has, if any."""
        return next(
            (r for r, state, _ in self.op.resources.values() if r.kind == kind and state != "released"), None
        )

    def emit(self, stream: str, event: ev.Event) -> None:
        """Record an event together with the end of this step."""
        self.emitted.append((stream, event))

    def intend(self, resource: Resource) -> None:
        """Record, from inside a step, what it is about to acquire and could not name before it began."""
        with self.log.transaction() as tx:
            work.guard(tx, self._claim)
            intended = ev.ResourceIntended(
                resource=resource, vm=self.op.vm, step=self.op.steps[self.step].name
            )
            fold_on(self.op, tx.append(self.op.id, intended, op=self.op.id))

    def progress(self, message: str) -> None:
        """Tell whoever waits what a long step is doing; a few times a second at most."""
        now = time.monotonic()
        if now - self._told_at < PROGRESS_EVERY_S:
            return
        self._told_at = now
        with self.log.transaction() as tx:
            work.guard(tx, self._claim)
            tx.append(self.op.id, ev.StepProgress(step=self.step, message=message[:300]), op=self.op.id)

    def cancelled(self) -> bool:
        """Tell a long step whether to stop: someone asked for it, or another worker took over."""
        return not self.op.undoing and work.cancel_wanted(self.log, self._claim)

    def ask_root(self, ask: AnyAsk, fds: Sequence[int] = ()) -> dict[str, Any]:
        """Have root do its part of this step; give what it says of it.

        Each attempt at a step asks under keys of its own, so that what is repeated is what was cut off.
        """
        return self.answer_of_root(ask, fds).facts

    def answer_of_root(self, ask: AnyAsk, fds: Sequence[int] = ()) -> Answer:
        """Have root do its part of this step; give its answer, with descriptors that may be in it."""
        state = self.op.steps[self.step]
        way, attempt = ("undo", state.undo_attempts) if self.op.undoing else ("run", state.attempts)
        self._asked += 1
        key = f"{self.op.id}/{state.name}/{way}/{self._claim.epoch}/{attempt}/{self._asked}"
        request = Request(op=self.op.id, step=state.name, epoch=self._claim.epoch, key=key, ask=ask)
        return self.world.root.ask(request, fds)

    @property
    def vmm(self) -> Vmm:
        """The machine monitor that this VM has, or is to have: Firecracker if the ledger has a jail for it.

        What the configuration says by now is the next start's affair.
        """
        return self.world.firecracker(self.answer_of_root) if self.held("jail") else self.world.vmm

    # -- its VM ------------------------------------------------------------------------------

    @property
    def vm_id(self) -> str:
        """The id of the VM this operation is about."""
        assert self.op.vm is not None
        return self.op.vm

    @property
    def vm(self) -> Vm:
        """The VM as it is now. Raises NotFound when an earlier operation deleted it."""
        vm = queries.vm(self.log, self.vm_id)
        if vm is None:
            raise NotFound(f"The VM {self.op.name or self.vm_id} is no more.")
        return vm

    @property
    def paths(self) -> VmPaths:
        """The VM's paths."""
        return self.dirs.vm(self.vm_id)

    def held(self, *kinds: str) -> list[Resource]:
        """List what the ledger has for this VM, of these kinds."""
        return [r for r in queries.resources_of_vm(self.log, self.vm_id) if r.kind in kinds]

    # -- what other operations make ----------------------------------------------------------

    def require(
        self,
        find: Callable[[], Artifact | None],
        pipeline: Pipeline,
        *,
        lane: str,
        args: dict[str, Any],
        reason: str,
    ) -> Artifact:
        """Give what `find` finds; if it finds nothing, wait for the operation that makes it.

        Raises the other operation's error when it failed.
        """
        artifact = find()
        if artifact is not None:
            return artifact
        if self.op.last_child is not None:
            self._raise_child(self.op.last_child)
        raise Park(pipeline.request(lane=lane, args=args, name=args.get("name")), reason)

    def foresee(self, pipeline: Pipeline, *, lane: str, args: dict[str, Any]) -> None:
        """Request what a later step will wait for, so that it is made meanwhile."""
        if queries.active_op(self.log, pipeline.kind, lane) is None:
            asked = pipeline.request(lane=lane, args=args, name=args.get("name"))
            self.log.request(msgspec.structs.replace(asked, parent=self.op.id))

    def _raise_child(self, child: str) -> NoReturn:
        row = queries.op(self.log, child)
        error = (row.error if row else None) or {"message": f"{child} did not make it."}
        failure = from_dict(error)
        failure.op = child
        raise failure
