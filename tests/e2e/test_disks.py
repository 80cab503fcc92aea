"""A disk that was used and left in disorder is mended before its VM starts again."""

from __future__ import annotations

import pytest

from banger.testing.home import Home

pytestmark = pytest.mark.guest


def test_a_killed_vm_starts_with_its_disks_in_order() -> None:
    """Killed while it wrote, it comes back with what was flushed, and the start says what was mended."""
    with Home() as home:
        home.configure("memory_mib = 256\n")
        assert home.banger("vm", "create", "web", "--wait").returncode == 0
        written = home.banger(
            "vm", "exec", "web", "--", "sh", "-c", "echo kept > /etc/kept; sync; rm /etc/hostname"
        )
        assert written.returncode == 0, written.stderr
        assert home.banger("vm", "kill", "web").returncode == 0
        started = home.json("vm", "start", "web")
        check = home.json("ops", "show", started["op"])["op"]["steps"][0]
        assert (check["name"], check["facts"].get("mended")) == ("check", ["overlay.ext4", "work.ext4"])
        assert home.banger("vm", "exec", "web", "--", "cat", "/etc/kept").stdout == "kept\n"
        assert home.banger("vm", "delete", "web").returncode == 0
        assert home.leftovers() == []
