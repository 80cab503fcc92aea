"""What is asked of a recording host, for each kind of operation that is registered."""

from __future__ import annotations

from collections.abc import Callable

from banger.events import queries
from banger.rpc import protocol as p
from banger.rpc.service import Service
from banger.testing.recording import RecordingWorld, write

Deed = Callable[[Service, RecordingWorld], object]


def ask(request: p.Request) -> Deed:
    """Ask as a client does."""
    return lambda service, _: service.answer(request)


def _vmm_dies(service: Service, world: RecordingWorld) -> None:
    world.recorded.kill(queries.find_vm(service.log, "web").id)


def _bury(service: Service, _: RecordingWorld) -> None:
    service.bury(queries.find_vm(service.log, "web"))


def _lose_log(_: Service, world: RecordingWorld) -> None:
    for path in world.dirs.state.glob(f"{world.dirs.database.name}*"):
        path.unlink()


def _recover(service: Service, _: RecordingWorld) -> None:
    service.recover_lost()


def _strew(_: Service, world: RecordingWorld) -> None:
    """Leave one thing of each kind that a sweep removes."""
    stray = world.dirs.vm("vm-stray000")
    stray.directory.mkdir()
    for path in (stray.initrd, stray.qmp, stray.agent, world.dirs.vm("vm-stray001").qmp):
        write(path, b"nobody's")


CACHED = (ask(p.ImageBuild(image="debian-12")), ask(p.KernelPull(kernel="debian-12")))
RUNNING = (*CACHED, ask(p.VmCreate(name="web")))
STOPPED = (*RUNNING, ask(p.VmStop(vm="web")))
CREATE_ALL = "vm.create, nothing cached"
SCENES: dict[str, tuple[Deed, ...]] = {
    "image.build": CACHED[:1],
    "kernel.pull": CACHED[1:],
    "image.delete": (*CACHED, ask(p.ImageDelete(image="debian-12"))),
    "kernel.delete": (*CACHED, ask(p.KernelDelete(kernel="debian-12"))),
    "vm.create": RUNNING,
    "vm.start": (*STOPPED, ask(p.VmStart(vm="web"))),
    "vm.stop": STOPPED,
    "vm.restart": (*RUNNING, ask(p.VmRestart(vm="web"))),
    "vm.kill": (*RUNNING, ask(p.VmKill(vm="web"))),
    "vm.bury": (*RUNNING, _vmm_dies, _bury),
    "vm.delete": (*RUNNING, ask(p.VmDelete(vm="web"))),
    "vm.recover": (*RUNNING, _lose_log, *CACHED, _recover),
    "host.sweep": (*STOPPED, _strew, ask(p.OpsSweep())),
    CREATE_ALL: (ask(p.VmCreate(name="web")),),
}
"""For each kind of operation: what comes before it, each to its end, and how it is asked for."""
