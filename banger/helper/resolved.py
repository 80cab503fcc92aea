"""systemd-resolved, told by its own program which server knows the names below `vm`."""

from __future__ import annotations

from pathlib import Path

from banger.helper import program

RUNTIME = Path("/run/systemd/resolve")
"""systemd-resolved makes it when it starts (systemd-resolved.service(8))."""


class Resolved:
    """The host's systemd-resolved; see `Resolver`."""

    def running(self) -> bool:
        """Tell whether the host has a systemd-resolved that answers."""
        return (RUNTIME / "io.systemd.Resolve").exists()

    def route(self, interface: str, port: int) -> None:
        """Send questions about names below `vm`, and no others, to 127.0.0.1:`port`.

        `~vm` routes only: it is no search domain (resolvectl(1)).
        """
        program.run(["resolvectl", "dns", interface, f"127.0.0.1:{port}"])
        program.run(["resolvectl", "domain", interface, "~vm"])
        program.run(["resolvectl", "default-route", interface, "false"])
