"""The guest of a stand-in Firecracker: QEMU's microvm, with what Firecracker would have given it.

QEMU's control and agent sockets have abstract names, so that no file is left when it is killed.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import time
from pathlib import Path
from typing import Any

from banger.errors import BangerError
from banger.testing.firecracker_rules import Fault, Json, Rules
from banger.vmm import qemu, tsc
from banger.vmm.driver import MARK_ADDRESS, MARK_OP, MARK_VM
from banger.vmm.qmp import Qmp

FIRST_FD = 3
FOREVER_S = 1e6
SAVE_LOOK_S = 0.05

# The kernel ends QEMU with the stand-in (setpriv), unless that has died before it asked: then the parent
# is another. Until QEMU itself runs, it carries the VM's mark and is found by whoever looks for the VM.
BEGINNING = f'[ "$PPID" = "$1" ] || exit 1; shift; unset {MARK_VM} {MARK_OP} {MARK_ADDRESS}; exec "$@"'


class Guest:
    """The QEMU behind one stand-in."""

    def __init__(self) -> None:
        self._qmp: Qmp | None = None
        self._said = b""
        self.ended = asyncio.Event()
        self.status = 0

    async def start(self, rules: Rules, *, incoming: str | None = None) -> None:
        """Run what was described; `incoming` is the memory of a snapshot to go on with. Raises Fault."""
        control, agent = _listening(_name("qmp")), _listening(_name("agent"))
        try:
            await self._run(rules, control.fileno(), agent.fileno(), incoming)
        finally:
            control.close()
            agent.close()
        try:
            self._qmp = await asyncio.to_thread(_negotiate)
            if incoming is not None:
                await self._settled("query-migrate")
        except BangerError:
            await self.ended.wait()
            raise Fault(f"Failed to start the microVM: {self._said.decode('utf-8', 'replace')}") from None

    async def _run(self, rules: Rules, control: int, agent: int, incoming: str | None) -> None:
        words = argv(rules, control, agent)
        if incoming is not None:
            words += ["-S", "-incoming", f"exec:cat {shlex.quote(incoming)}"]
        process = await asyncio.create_subprocess_exec(
            "setpriv", "--pdeathsig", "KILL", "sh", "-c", BEGINNING, "sh", str(os.getpid()), *words,
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(*_held(), control, agent),
        )  # fmt: skip
        self._watcher = asyncio.create_task(self._watch(process))

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        self._said = await process.stderr.read()
        self.status = await process.wait()
        self.ended.set()

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run one QMP command."""
        assert self._qmp is not None
        try:
            return self._qmp.execute(command, **arguments)
        except BangerError as error:
            raise Fault(str(error)) from None

    async def save(self, memory: str) -> None:
        """Write the memory and devices of a paused guest to a file."""
        await self.execute("migrate", uri=f"exec:cat > {shlex.quote(memory)}")
        await self._settled("query-migrate")

    async def _settled(self, question: str) -> None:
        while (status := (await self.execute(question)).get("status")) != "completed":
            if status in ("failed", "cancelled"):
                raise Fault(f"The snapshot {status}.")
            await asyncio.sleep(SAVE_LOOK_S)

    async def listens(self) -> bool:
        """Tell whether the agent in the guest has opened its port."""
        if self._qmp is None:
            return False
        found = await self.execute("query-chardev")
        return any(one["label"] == "agent" and one["frontend-open"] for one in found)


def agent_address() -> str:
    """Give the address at which the agent is reached."""
    return _name("agent")


def _name(end: str) -> str:
    return f"\0banger-firecracker-{os.getpid()}-{end}"


def _held() -> list[int]:
    """List what the stand-in was given to hold, locks among it: for as long as its guest runs."""
    return [int(fd) for fd in os.listdir("/proc/self/fd") if int(fd) >= FIRST_FD and _open(int(fd))]  # noqa: PTH208


def _open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:  # the one that listed them
        return False
    return os.get_inheritable(fd)


def _listening(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(8)
    return listener


def _negotiate() -> Qmp:
    """Wait until QEMU's main loop answers. Raises BangerError when it hangs up."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(_name("qmp"))
    except OSError:
        raise BangerError("QEMU has ended.") from None
    control = Qmp(connection, time.monotonic() + FOREVER_S)
    control.negotiate()
    control.execute("query-status")
    return control


def argv(rules: Rules, control: int, agent: int, *, root: str = "", tsc_khz: int | None = None) -> list[str]:
    """Give QEMU's command line for the machine, whose files QEMU finds below `root`."""
    source = rules.boot_source
    assert source is not None
    initrd = ["-initrd", root + source["initrd_path"]] if "initrd_path" in source else []
    return [
        qemu.PROGRAM,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display", "none",
        "-machine", "microvm",
        "-accel", f"tcg,tb-size={qemu.TB_CACHE_MIB}",
        "-cpu", "qemu64,+rdrand",
        "-smp", str(rules.machine["vcpu_count"]),
        "-m", f"{rules.machine['mem_size_mib']}M",
        "-kernel", root + source["kernel_image_path"],
        *initrd,
        "-append", f"{source.get('boot_args', '')} tsc_early_khz={tsc_khz or tsc.host_khz()}",
        "-chardev", "stdio,id=console,signal=off",
        "-serial", "chardev:console",
        "-chardev", f"socket,id=qmp,fd={control},server=on,wait=off",
        "-mon", "chardev=qmp,mode=control",
        *(word for drive in rules.drives.values() for word in _drive(drive, root)),
        *(word for card in rules.networks.values() for word in _network(card)),
        "-device", "virtio-serial-device",
        "-chardev", f"socket,id=agent,fd={agent},server=on,wait=off",
        "-device", f"virtserialport,chardev=agent,name={qemu.AGENT_PORT}",
        *(["-device", "virtio-rng-device"] if "entropy" in rules.devices else []),
    ]  # fmt: skip


def _drive(drive: Json, root: str) -> list[str]:
    """Attach a disk, with the serial that Firecracker would give it.

    QEMU gives the first device the highest virtio-mmio bus, and Linux meets the highest first: so the
    first disk is /dev/vda, as on Firecracker.
    """
    path, name = drive["path_on_host"], drive["drive_id"]
    mode = "readonly=on" if drive["is_read_only"] else "discard=unmap"
    about = Path(path).stat()
    serial = f"{about.st_dev}{about.st_rdev}{about.st_ino}"[:20]
    value = (root + path).replace(",", ",,")
    return [
        "-drive", f"if=none,id={name},format=raw,{mode},file={value}",
        "-device", f"virtio-blk-device,drive={name},serial={serial}",
    ]  # fmt: skip


def _network(card: Json) -> list[str]:
    tap, name = card["host_dev_name"], card["iface_id"]
    mac = f",mac={card['guest_mac']}" if "guest_mac" in card else ""
    return [
        "-netdev", f"tap,id={name},ifname={tap},script=no,downscript=no",
        "-device", f"virtio-net-device,netdev={name}{mac}",
    ]  # fmt: skip
