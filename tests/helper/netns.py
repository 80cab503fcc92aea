"""Network namespaces of a test's own: this thread's, and others that a thread each lives in.

A thread is in one namespace (setns(2)), so nothing here has an effect on the machine's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import queue
import select
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from banger.helper.netlink import IFF_NO_PI, IFF_TAP, IFREQ, TUNSETIFF

CLONE_NEWNET = 0x40000000
LARGEST_FRAME = 65_536

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def entered() -> Iterator[None]:
    """Be in a new namespace, with a loopback that is up, and back in the old one afterwards."""
    old = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _unshare()
        assert not os.path.samestat(os.fstat(old), Path("/proc/thread-self/ns/net").stat())
        run("ip link set lo up")
        yield
    finally:
        assert _libc.setns(old, CLONE_NEWNET) == 0
        os.close(old)


def run(words: str) -> str:
    """Run a program with these words, in the namespace of this thread; gives what it says."""
    done = subprocess.run(words.split(), capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


class Place:
    """A namespace with a thread in it that does what it is given, until it is left."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        self.path = self.do(lambda: f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net")

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self._jobs.put(None)
        self._thread.join()

    def do(self, job: Callable[[], T]) -> T:
        """Do something there, and give what it gives."""
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future.result(timeout=30)

    def run(self, words: str) -> str:
        """Run a program there."""
        return self.do(lambda: run(words))

    def _live(self) -> None:
        _unshare()
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)


@contextlib.contextmanager
def guest(tap: str, address: str, gateway: str) -> Iterator[Place]:
    """Be a VM: hold its tap open, and pass its frames on to an interface in a namespace of the VM's own."""
    with Place() as place, _open_tap(tap) as outer, place.do(lambda: _open_tap("eth0")) as inner:
        place.run("ip link set lo up")
        place.run(f"ip addr add {address} dev eth0")
        place.run("ip link set eth0 up")
        place.run(f"ip route add default via {gateway}")
        with _copying(outer.fileno(), inner.fileno()):
            yield place


def _open_tap(name: str) -> Any:
    tap = open("/dev/net/tun", "r+b", buffering=0)  # noqa: SIM115, PTH123  a device without a place
    fcntl.ioctl(tap, TUNSETIFF, IFREQ.pack(name.encode(), IFF_TAP | IFF_NO_PI))
    return tap


@contextlib.contextmanager
def _copying(one: int, other: int) -> Iterator[None]:
    ended, end = os.pipe()
    thread = threading.Thread(target=_copy, args=(one, other, ended))
    thread.start()
    try:
        yield
    finally:
        os.close(end)
        thread.join()
        os.close(ended)


def _copy(one: int, other: int, ended: int) -> None:
    beyond = {one: other, other: one}
    while True:
        ready, _, _ = select.select([one, other, ended], [], [])
        if ended in ready:
            return
        for fd in ready:
            os.write(beyond[fd], os.read(fd, LARGEST_FRAME))


def _unshare() -> None:
    if _libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
