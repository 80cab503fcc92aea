"""Does KVM work here? Running guest code is the only answer.

That /dev/kvm exists, opens and tells its version proves nothing: there are nested hosts on which
64-bit code runs until its first exception. So a small guest does what every kernel does while it
boots (`kvm_guest`).

It runs in a process of its own, started afresh. A fork of a worker would inherit its open
database, locks and threads, and KVM_RUN may hang in the kernel: then that process is left behind
to die of its SIGKILL, and the worker goes on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from banger import proc
from banger.errors import BangerError
from banger.model import Value

DEVICE = Path("/dev/kvm")
GUEST_PROGRAM = Path(__file__).with_name("kvm_guest.py")
# The guest takes 10 to 70 ms and gives itself 2 s; this bound is for one that cannot be stopped.
TIMEOUT_S = 5.0


class KvmVerdict(Value):
    """Whether KVM runs guests, why (not), and how far the guest came."""

    usable: bool
    why: str
    stages: tuple[str, ...] = ()


def accessible() -> bool:
    """Tell whether this user may open /dev/kvm; costs nothing and proves little."""
    return os.access(DEVICE, os.R_OK | os.W_OK)


def probe() -> KvmVerdict:
    """Run the guest and judge; never raises, never takes longer than 10 s."""
    if not DEVICE.exists():
        return KvmVerdict(usable=False, why="There is no /dev/kvm.")
    if not accessible():
        return KvmVerdict(usable=False, why="This user may not open /dev/kvm.")
    try:
        # -I: the program needs only the standard library, and nothing of its surroundings.
        answer = proc.run([sys.executable, "-I", GUEST_PROGRAM], timeout_s=TIMEOUT_S)
        return msgspec.json.decode(answer, type=KvmVerdict)
    except BangerError as error:
        return KvmVerdict(usable=False, why=f"The KVM probe failed: {error.message}")
    except msgspec.DecodeError:
        return KvmVerdict(usable=False, why="The KVM probe gave no answer.")
