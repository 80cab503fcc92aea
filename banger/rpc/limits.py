"""How large a VM may be here, when it is made and when it is changed."""

from __future__ import annotations

from banger.config import Capacity
from banger.errors import InvalidRequest
from banger.model import VmSpec

MAX_VCPU = 64
MIN_MEMORY_MIB = 128
MIN_DISK_MIB = 64
MAX_DISK_MIB = 16 << 20


def check(spec: VmSpec, most: Capacity) -> None:
    """Raise InvalidRequest when the host could never hold such a VM."""
    _within("vcpu", spec.vcpu, 1, min(MAX_VCPU, most.vcpu))
    _within("memory", spec.memory_mib, MIN_MEMORY_MIB, most.memory_mib, "MiB")
    _within("disk-size", spec.disk_mib, MIN_DISK_MIB, MAX_DISK_MIB, "MiB")


def _within(what: str, value: int, least: int, most: int, unit: str = "") -> None:
    if not least <= value <= most:
        raise InvalidRequest(
            f"--{what} {value}{unit} is not possible.",
            hint=f"Give a number from {least} to {most}{' ' + unit if unit else ''}."
            + (" capacity_memory_mib and capacity_vcpu in config.toml bound it." if value > most else ""),
        )
