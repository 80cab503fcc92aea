"""What a guest says of itself: load, memory, disks, clock. All it needs is a shell, /proc and our busybox.

A guest may say anything: what it says is bounded where it is read, and every word is looked at here.
Formats: proc_loadavg(5), proc_uptime(5), proc_meminfo(5), df -P (POSIX).
"""

from __future__ import annotations

import re

from banger.errors import GuestUnreachable
from banger.model import Value

SCRIPT = """\
b=/run/banger/bin/busybox
echo '== date'; $b date +%s
echo '== load'; $b cat /proc/loadavg
echo '== uptime'; $b cat /proc/uptime
echo '== memory'; $b cat /proc/meminfo
echo '== disks'; $b df -kP / /root
"""
_SECTION = re.compile(r"^== ([a-z]+)\n", re.MULTILINE)
_KIB = re.compile(r"^(\w+):\s+(\d{1,15}) kB$", re.MULTILINE | re.ASCII)
_DISK = re.compile(r"^\S.*?\s(\d{1,15})\s+(\d{1,15})\s+(\d{1,15})\s+\d+%\s+(/\S*)$", re.MULTILINE | re.ASCII)


class Disk(Value):
    """A file system of a guest's: how much it holds, and how much more it would take."""

    mount: str
    used_kib: int
    free_kib: int

    @property
    def used_percent(self) -> int:
        """How full it is, for whoever fills it; what is kept for root is not free."""
        return round(100 * self.used_kib / max(1, self.used_kib + self.free_kib))


class Statistics(Value):
    """A guest at one moment, by its own words. `time_s` is its clock, in whole seconds since the epoch."""

    time_s: int
    load: tuple[float, float, float]
    uptime_s: float
    memory_kib: int
    memory_available_kib: int
    disks: tuple[Disk, ...]


def sections(said: str) -> dict[str, str]:
    """Split what a script of ours printed at its headings, `== word`."""
    _, *parts = _SECTION.split(said)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def parse(said: str) -> Statistics:
    """Read what SCRIPT prints. Raises GuestUnreachable when it is something else."""
    try:
        part = sections(said)
        memory = {key: int(value) for key, value in _KIB.findall(part["memory"])}
        one, five, fifteen = (float(word) for word in part["load"].split()[:3])
        return Statistics(
            time_s=int(part["date"]),
            load=(one, five, fifteen),
            uptime_s=float(part["uptime"].split()[0]),
            memory_kib=memory["MemTotal"],
            memory_available_kib=memory["MemAvailable"],
            disks=tuple(
                Disk(mount=mount, used_kib=int(used), free_kib=int(free))
                for _, used, free, mount in _DISK.findall(part["disks"])
            ),
        )
    except (KeyError, ValueError, IndexError):
        raise GuestUnreachable(
            "The guest does not say how it is.", hint="Its /proc, or /run/banger, is not what it was."
        ) from None
