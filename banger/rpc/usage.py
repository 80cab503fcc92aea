"""What a VM takes of its host: its VMM's time and memory, and the blocks of its files."""

from __future__ import annotations

import os
import re
from pathlib import Path

from banger.model import Process, Value

_TICKS_S = os.sysconf("SC_CLK_TCK")
_KIB = re.compile(r"^(Rss|Pss):\s+(\d+) kB$", re.MULTILINE)


class Usage(Value):
    """What one VMM has used. `pss_kib` counts a page shared by n processes as the nth part of one.

    It is None where the VMM is another user's, as one in a jail is.
    """

    cpu_s: float
    rss_kib: int
    pss_kib: int | None


def of(process: Process) -> Usage | None:
    """Look at a process (proc_pid_stat(5), proc_pid_statm(5), smaps_rollup); None when it is gone."""
    place = Path(f"/proc/{process.pid}")
    try:
        # The second field is a name in brackets, which may hold spaces and brackets.
        words = (place / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        pages = int((place / "statm").read_text("ascii").split()[1])
    except (OSError, IndexError):
        return None
    rss_kib, pss_kib = pages * os.sysconf("SC_PAGE_SIZE") >> 10, None
    try:
        shares = dict(_KIB.findall((place / "smaps_rollup").read_text("ascii")))
        rss_kib, pss_kib = int(shares["Rss"]), int(shares["Pss"])
    except (OSError, KeyError):
        pass
    return Usage(cpu_s=(int(words[11]) + int(words[12])) / _TICKS_S, rss_kib=rss_kib, pss_kib=pss_kib)


def disk_bytes(directory: Path) -> int:
    """Add up the blocks that a VM's files really take: its disks are sparse. Units of 512 (stat(2))."""
    try:
        return sum(entry.stat(follow_symlinks=False).st_blocks for entry in os.scandir(directory)) * 512
    except FileNotFoundError:
        return 0
