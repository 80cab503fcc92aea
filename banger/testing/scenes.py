"""What is asked of a recording host, for each kind of operation that is registered."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgspec

from banger.events import queries
from banger.images import bundle
from banger.rpc import protocol as p
from banger.rpc.service import Service
from banger.testing.recording import RecordingWorld, write
from banger.workspace.repository import git

SQUASHFS = b"hsqs" + bytes(92)
BZIMAGE = bytes(0x1FE) + b"\x55\xaa" + b"\x00\x00HdrS" + bytes(600)
INITRD = b"070701" + bytes(100)
"""As much of each as is looked at."""

Deed = Callable[[Service, RecordingWorld], object]


def ask(request: p.Request) -> Deed:
    """Ask as a client does."""
    return lambda service, _: service.answer(request)


def _vmm_dies(service: Service, world: RecordingWorld) -> None:
    world.kill(queries.find_vm(service.log, "web"))


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


def _register(service: Service, world: RecordingWorld) -> None:
    """Register a file that begins as a squashfs does."""
    file = world.dirs.state / "root.squashfs"
    write(file, SQUASHFS)
    os.utime(file, (1, 1))  # the time is part of what is registered, and no two runs write it at once
    service.answer(p.ImageRegister(name="mine", file=str(file)))


def _import_kernel(service: Service, world: RecordingWorld) -> None:
    """Import a kernel that begins as a bzImage does, with an initrd of its own."""
    kernel, initrd = world.dirs.state / "vmlinuz", world.dirs.state / "initrd"
    write(kernel, BZIMAGE)
    write(initrd, INITRD)
    service.answer(p.KernelImport(name="mine", kernel=str(kernel), initrd=str(initrd)))


def _bundled(world: RecordingWorld, name: str, **files: bytes) -> dict[str, Any]:
    """Write a bundle of files; give what a catalog says of it."""
    directory = world.dirs.state / name
    directory.mkdir(exist_ok=True)
    for file, content in files.items():
        write(directory / file.replace("_", "."), content)
    found: dict[str, Any] = msgspec.to_builtins(bundle.write(directory, directory.with_suffix(".tar.zst")))
    return found


def _install_image(service: Service, world: RecordingWorld) -> None:
    wanted = _bundled(world, "image-bundle", root_squashfs=SQUASHFS)
    service.answer(p.ImageInstall(name="mine", bundle=wanted))


def _install_kernel(service: Service, world: RecordingWorld) -> None:
    wanted = _bundled(world, "kernel-bundle", vmlinuz=BZIMAGE, initrd=INITRD)
    service.answer(p.KernelInstall(name="mine", bundle=wanted))


def _repository(_: Service, world: RecordingWorld) -> None:
    """Make a repository that is the same in every run: one commit, and a change on top."""
    root = world.dirs.state / "repository"
    always = {f"GIT_{who}_{what}": "x@x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    always |= {"GIT_AUTHOR_DATE": "@1 +0000", "GIT_COMMITTER_DATE": "@1 +0000"}
    git(["init", "--quiet", "--template=", "--initial-branch=main", root])
    write(root / "file", b"one\n")
    git(["-C", root, "add", "file"])
    git(["-C", root, "commit", "--quiet", "--message=one"], env=always)
    write(root / "file", b"another\n")
    os.utime(root / "file", (1, 1))


def _prepare(service: Service, world: RecordingWorld) -> None:
    service.answer(p.WorkspacePrepare(vm="web", repository=str(world.dirs.state / "repository")))


CACHED = (ask(p.ImageBuild(image="debian-12")), ask(p.KernelPull(kernel="debian-12")))
RUNNING = (*CACHED, ask(p.VmCreate(name="web")))
STOPPED = (*RUNNING, ask(p.VmStop(vm="web")))
CREATE_ALL = "vm.create, nothing cached"
ON_BRIDGE = ", on a bridge"
IN_JAIL = ", in a jail"
BRIDGED = (*CACHED, ask(p.VmCreate(name="web", network="bridge", nat=True)))
BRIDGED_STOPPED = (*BRIDGED, ask(p.VmStop(vm="web")))
ON_SNAPSHOT = ", on a dm-snapshot"
SNAPSHOT = (*CACHED, ask(p.VmCreate(name="web", root_disk="snapshot")))
SNAPSHOT_STOPPED = (*SNAPSHOT, ask(p.VmStop(vm="web")))
SCENES: dict[str, tuple[Deed, ...]] = {
    "image.build": CACHED[:1],
    "kernel.pull": CACHED[1:],
    "image.pull": (ask(p.ImagePull(reference="127.0.0.1:5000/debian:12", name="pulled")),),
    "image.register": (_register,),
    "image.promote": (_register, ask(p.ImagePromote(name="mine"))),
    "kernel.import": (_import_kernel,),
    "image.install": (_install_image,),
    "kernel.install": (_install_kernel,),
    "cache.prune": (*CACHED, ask(p.ImageDelete(image="debian-12")), ask(p.CachePrune())),
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
    "workspace.prepare": (*RUNNING, _repository, _prepare),
    "host.sweep": (*STOPPED, _strew, ask(p.OpsSweep())),
    "vm.set": (*STOPPED, ask(p.VmSet(vm="web", vcpu=2, disk_mib=16384))),
    f"vm.set{ON_BRIDGE}": (*BRIDGED, ask(p.VmSet(vm="web", nat=False)), ask(p.VmSet(vm="web", nat=True))),
    f"vm.create{ON_BRIDGE}": BRIDGED,
    f"vm.start{ON_BRIDGE}": (*BRIDGED_STOPPED, ask(p.VmStart(vm="web"))),
    f"vm.stop{ON_BRIDGE}": BRIDGED_STOPPED,
    f"vm.restart{ON_BRIDGE}": (*BRIDGED, ask(p.VmRestart(vm="web"))),
    f"vm.kill{ON_BRIDGE}": (*BRIDGED, ask(p.VmKill(vm="web"))),
    f"vm.bury{ON_BRIDGE}": (*BRIDGED, _vmm_dies, _bury),
    f"vm.delete{ON_BRIDGE}": (*BRIDGED, ask(p.VmDelete(vm="web"))),
    f"vm.create{IN_JAIL}": BRIDGED,
    f"vm.start{IN_JAIL}": (*BRIDGED_STOPPED, ask(p.VmStart(vm="web"))),
    f"vm.stop{IN_JAIL}": BRIDGED_STOPPED,
    f"vm.restart{IN_JAIL}": (*BRIDGED, ask(p.VmRestart(vm="web"))),
    f"vm.kill{IN_JAIL}": (*BRIDGED, ask(p.VmKill(vm="web"))),
    f"vm.bury{IN_JAIL}": (*BRIDGED, _vmm_dies, _bury),
    f"vm.delete{IN_JAIL}": (*BRIDGED, ask(p.VmDelete(vm="web"))),
    f"vm.recover{IN_JAIL}": (*BRIDGED, _lose_log, *CACHED, _recover),
    f"vm.create{ON_SNAPSHOT}": SNAPSHOT,
    f"vm.start{ON_SNAPSHOT}": (*SNAPSHOT_STOPPED, ask(p.VmStart(vm="web"))),
    f"vm.stop{ON_SNAPSHOT}": SNAPSHOT_STOPPED,
    f"vm.restart{ON_SNAPSHOT}": (*SNAPSHOT, ask(p.VmRestart(vm="web"))),
    f"vm.kill{ON_SNAPSHOT}": (*SNAPSHOT, ask(p.VmKill(vm="web"))),
    f"vm.bury{ON_SNAPSHOT}": (*SNAPSHOT, _vmm_dies, _bury),
    f"vm.delete{ON_SNAPSHOT}": (*SNAPSHOT, ask(p.VmDelete(vm="web"))),
    f"vm.recover{ON_SNAPSHOT}": (*SNAPSHOT, _lose_log, *CACHED, _recover),
    CREATE_ALL: (ask(p.VmCreate(name="web")),),
}
"""For each kind of operation, once more for VMs on a bridge, in a jail, and on a dm-snapshot: what comes
before it, each to its end, and how it is asked for."""
