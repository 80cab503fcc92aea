"""The parts of the host that root's handlers act on, each behind what they ask of it.

On a host they are the kernel; in tests of what is asked for they are records of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from banger.helper.disks import Disks
from banger.helper.jails import Jails
from banger.helper.net import Net
from banger.helper.resolver import Resolver


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Everything that a handler can reach."""

    net: Net
    disks: Disks
    jails: Jails
    resolver: Resolver
