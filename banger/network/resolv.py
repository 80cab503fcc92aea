"""Which resolver the host asks, so that guests may ask the same."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path

# The second is what systemd-resolved asks itself: the first then names only its own 127.0.0.53.
FILES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))


def nameserver(files: Iterable[Path] = FILES) -> str | None:
    """Give the first IPv4 resolver that a guest can reach as well; None when there is none."""
    return next((address for file in files for address in _addresses(file)), None)


def _addresses(file: Path) -> Iterable[str]:
    """Read the addresses of resolv.conf(5) that are not the host's own."""
    try:
        lines = file.read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver" and _reachable(words[1]):
            yield words[1]


def _reachable(text: str) -> bool:
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified)
