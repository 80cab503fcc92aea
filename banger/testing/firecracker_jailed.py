"""The stand-in for Firecracker in a jail of the jailer's stand-in, with real guests.

QEMU cannot run in a jail that has none of its files. So a process is forked before the jail is entered that
starts QEMU when it is asked: as the jail's user, on the jail's files and device nodes, and with nothing
else of the jail's. Both end together.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401  what is imported later, in the jail, is not found
import contextlib
import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from banger.helper.netlink import IFF_NO_PI, IFF_TAP, IFREQ, TUNSETIFF
from banger.testing import firecracker_guest, firecracker_rules
from banger.testing.firecracker import Arguments, Server
from banger.testing.firecracker_guest import Guest
from banger.testing.firecracker_rules import Fault, Json, Rules, Shapes
from banger.vmm import tsc

LONGEST = 1 << 16
MOST_FDS = 16
NO_GROUP = "65534"
"""Not the jail's, so that root cannot look at QEMU (ptrace(2)), takes it for an inmate that hides, and waits
for its end, too: it has the jail's devices open."""

_FD = re.compile(r",fd=([0-9]+)")
TAIL = 4096
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Prepared:
    """What was made outside of the jail, for inside."""

    shapes: Shapes
    tsc_khz: int
    root_fd: int
    runner: socket.socket


def install(directory: Path) -> None:
    """Write the program `firecracker` into a directory, beside the jailer's stand-in."""
    path = directory / "firecracker"
    path.write_text(
        f"#!{sys.executable} -I\n"
        "import sys\n\n"
        'if sys.argv[1:] == ["--version"]:\n'
        f"    sys.exit(print('Firecracker v{VERSION}'))\n\n"
        "from banger.testing.firecracker_jailed import before_chroot, main\n\n"
        'if __name__ == "__main__":\n'
        "    main(sys.argv[1:])\n"
    )
    path.chmod(0o755)


VERSION = "1.13.2"


def before_chroot(root: Path) -> None:
    """Prepare what cannot be had in the jail: the API's description, and who starts QEMU."""
    path = firecracker_rules.description()
    if path is None:
        sys.exit(f"This stand-in needs Firecracker's API description: {firecracker_rules.ENVIRON}.")
    Prepared.shapes = Shapes(path)
    with contextlib.suppress(Fault):  # its libraries read files of their own when they are first used
        Rules(Prepared.shapes).judge("PUT", "/machine-config", b'{"vcpu_count": 1, "mem_size_mib": 64}')
    Prepared.tsc_khz = tsc.host_khz()
    inside, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    if os.fork() == 0:
        inside.close()
        try:
            _run_qemu(outside, root_fd)
        finally:
            os._exit(0)
    outside.close()
    Prepared.root_fd, Prepared.runner = root_fd, inside


def main(words: Sequence[str]) -> None:
    """Be Firecracker, in the jail."""
    asked = Arguments().parse_args(list(words))
    sys.exit(asyncio.run(Server(asked.id, Prepared.shapes, JailedGuest()).run(asked.api_sock)))


class JailedGuest(Guest):
    """The QEMU that is started outside."""

    async def _run(self, rules: Rules, control: int, agent: int, incoming: str | None) -> None:
        if incoming is not None:
            raise Fault("This stand-in loads no snapshots in a jail.")
        root = f"/proc/self/fd/{Prepared.root_fd}"
        words = firecracker_guest.argv(rules, control, agent, root=root, tsc_khz=Prepared.tsc_khz)
        fds = [control, agent]
        with contextlib.ExitStack() as opened:
            for card in rules.networks.values():
                tap = opened.enter_context(_tap(card["host_dev_name"]))
                words = [_by_descriptor(word, card, tap) for word in words]
                fds.append(tap)
            order = json.dumps({"words": words, "fds": fds}).encode()
            socket.send_fds(Prepared.runner, [order], [*fds, sys.stdout.fileno()])
        self._waiter = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        answer = await asyncio.to_thread(Prepared.runner.recv, LONGEST)
        ended = json.loads(answer or b'{"status": 1, "said": ""}')
        self._said = ended["said"].encode()
        self.status = ended["status"]
        self.ended.set()


@contextlib.contextmanager
def _tap(name: str) -> Iterator[int]:
    """Open a tap by the jail's own node, as Firecracker does. Raises Fault."""
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Fault(f"Open tap device failed: {error}") from None
    try:
        fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(name.encode(), IFF_TAP | IFF_NO_PI))
        yield fd
    except OSError as error:
        raise Fault(f"Open tap device failed: {error}") from None
    finally:
        os.close(fd)


def _by_descriptor(word: str, card: Json, tap: int) -> str:
    return f"tap,id={card['iface_id']},fd={tap}" if word.startswith(f"tap,id={card['iface_id']},") else word


# -- outside of the jail -------------------------------------------------------------------------


def _run_qemu(orders: socket.socket, root_fd: int) -> None:
    """Start QEMU when told to, and end with the stand-in or with it."""
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):  # who has the console as standard output is taken for the jailer
        os.dup2(null, fd)
    order, fds, _, _ = socket.recv_fds(orders, LONGEST, MOST_FDS)
    if not order:
        return
    asked = json.loads(order)
    *given, console = fds
    ours = dict(zip(asked["fds"], given, strict=True))
    words = [_FD.sub(lambda found: f",fd={ours[int(found[1])]}", word) for word in asked["words"]]
    jail = os.fstat(root_fd)
    qemu = subprocess.Popen(
        [
            "setpriv", "--reuid", str(jail.st_uid), "--regid", NO_GROUP, "--clear-groups",
            "--pdeathsig", "KILL",
            *words,
        ],
        stdin=subprocess.DEVNULL,
        stdout=console,
        stderr=subprocess.PIPE,
        pass_fds=(root_fd, *given),
        env={"PATH": PATH},
        cwd="/",
    )  # fmt: skip
    os.close(console)
    for fd in given:
        os.close(fd)
    _wait_for_either(qemu, orders)
    said = qemu.stderr.read()[-TAIL:].decode("utf-8", "replace") if qemu.stderr else ""
    with contextlib.suppress(OSError):
        orders.send(json.dumps({"status": qemu.wait(), "said": said}).encode())


def _wait_for_either(qemu: subprocess.Popen[bytes], orders: socket.socket) -> None:
    """Wait until QEMU has ended; end it when the stand-in has."""
    ended = os.pidfd_open(qemu.pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(orders, select.POLLIN)
    found = {fd for fd, _ in poll.poll()}
    if ended not in found:
        os.kill(qemu.pid, signal.SIGKILL)  # our own unreaped child
    qemu.poll()
