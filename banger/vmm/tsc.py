"""The frequency of the host's time-stamp counter, which a guest must be told.

The CPU's MHz in /proc/cpuinfo is something else on hosts that scale their clock.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import time
from collections.abc import Callable, Iterator

# Linux: include/uapi/linux/kvm.h
KVM_CREATE_VM = 0xAE01
KVM_GET_TSC_KHZ = 0xAEA3

READ_COUNTER = bytes.fromhex(
    "0f31"  # rdtsc          edx:eax = counter
    "48c1e220"  # shl rdx, 32
    "4809d0"  # or rax, rdx
    "c3"  # ret            rax is the result in the System V ABI
)
TIMING_S = 0.05
READINGS = 5
MAP_FAILED = ctypes.c_void_p(-1).value


def host_khz() -> int:
    """Give the frequency in kHz: what KVM says, else what 50 ms of timing say (right to 0.1 %)."""
    return _from_kvm() or _timed()


def _from_kvm() -> int | None:
    """Ask KVM (Documentation/virt/kvm/api.rst, 4.56); None without access or on an older kernel."""
    try:
        with _opened("/dev/kvm") as kvm, _closing(fcntl.ioctl(kvm, KVM_CREATE_VM, 0)) as vm:
            return fcntl.ioctl(vm, KVM_GET_TSC_KHZ, 0) or None
    except OSError:
        return None


def _timed() -> int:
    """Count the counter's ticks between two readings of the raw monotonic clock."""
    with _machine_code(READ_COUNTER) as counter:
        start_ticks, start_ns = _reading(counter)
        time.sleep(TIMING_S)
        end_ticks, end_ns = _reading(counter)
    return round((end_ticks - start_ticks) * 1_000_000 / (end_ns - start_ns))


def _reading(counter: Callable[[], int]) -> tuple[int, int]:
    """Read counter and clock at one moment: of a few pairs the least interrupted one counts."""
    pairs = []
    for _ in range(READINGS):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        ticks = counter()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        pairs.append((after - before, ticks, (before + after) // 2))
    _, ticks, moment_ns = min(pairs)
    return ticks, moment_ns


@contextlib.contextmanager
def _machine_code(code: bytes) -> Iterator[Callable[[], int]]:
    """Map machine code and give it as a function.

    It is mapped from a memfd: a page that is both writable and executable is refused where
    systemd's MemoryDenyWriteExecute or SELinux rule.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    with _closing(os.memfd_create("banger-tsc")) as fd:
        os.write(fd, code)
        page = libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, fd, 0)
    if page == MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap of machine code")
    try:
        yield ctypes.CFUNCTYPE(ctypes.c_uint64)(page)
    finally:
        libc.munmap(page, mmap.PAGESIZE)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    with _closing(os.open(path, os.O_RDWR | os.O_CLOEXEC)) as fd:
        yield fd


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
