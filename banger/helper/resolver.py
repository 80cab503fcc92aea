"""The host's resolver, as root's handlers see it."""

from __future__ import annotations

from typing import Protocol


class Resolver(Protocol):
    """Which server is asked for which names, by interface (systemd-resolved(8))."""

    def running(self) -> bool:
        """Tell whether the host has a systemd-resolved that answers."""

    def route(self, interface: str, port: int) -> None:
        """Send questions about names below `vm`, and no others, to 127.0.0.1:`port` by this interface.

        Raises ProgramFailed or TimedOut.
        """
