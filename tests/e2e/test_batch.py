"""Many at once, as a shell loop asks for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from banger.testing.home import Home

pytestmark = pytest.mark.guest

COUNT = 10
NAMES = [f"n{number}" for number in range(1, COUNT + 1)]


def shell(home: Home, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script that finds `banger` on its PATH."""
    environ = {**home.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{home.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", script],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_ten_at_once() -> None:
    """Ten VMs created at once all answer under their own names; deleted at once, nothing is left."""
    with Home() as home:
        home.configure("memory_mib = 256\n")
        each = f"for i in {{1..{COUNT}}}; do"
        created = shell(home, f"{each} banger vm create n$i --wait & done; wait")
        assert created.stdout.count("ready in ") == COUNT, created.stderr
        answers = shell(home, f"{each} banger vm exec n$i -- hostname & done; wait")
        assert sorted(answers.stdout.split()) == sorted(NAMES), answers.stderr
        vms = home.json("ps")["vms"]
        for field in ("ssh_port", "pid", "id"):
            assert len({vm[field] for vm in vms}) == COUNT, field
        deleted = shell(home, "banger vm delete $(banger ps -aq)")
        assert deleted.stdout.count(" is gone in ") == COUNT, deleted.stderr
        assert home.leftovers() == []


def test_a_hundred_at_once_in_a_host_with_room_for_four() -> None:
    """Each of a hundred creates has its own operation and end; those that do not fit wait, and say so."""
    with Home() as home:
        home.configure("memory_mib = 256\ncapacity_memory_mib = 1024\n")
        boots = "for i in {1..16}; do banger vm create n$i; done"
        disks = "for i in {17..100}; do banger vm create n$i --no-start; done"
        asked = shell(home, f"{{ {boots}; }} & {{ {disks}; }} & wait")
        assert asked.stdout.count("op: op-") == 100, asked.stderr
        waiting = [op["reason"] for op in home.json("ops", "list", "--limit", "200")["ops"] if op["reason"]]
        assert waiting, "more were asked for than there is room for"
        assert all(reason.startswith("waits for ") for reason in waiting)
        ends = [_end_of(home, f"n{number}", most=4) for number in range(1, 101)]
        assert len({op for op, _ in ends}) == 100
        assert [fate for _, fate in ends] == ["done"] * 100
        assert home.leftovers() == []


def _end_of(home: Home, name: str, *, most: int) -> tuple[str, str]:
    """Wait until a VM is made, look how many run, and delete it; give its operation and what became of it."""
    op = home.json("vm", "history", name)["ops"][0]["id"]
    home.banger("ops", "follow", op)
    assert len([vm for vm in home.json("ps")["vms"] if vm["pid"]]) <= most
    assert home.banger("vm", "delete", name).returncode == 0
    return op, home.json("ops", "show", op)["op"]["fate"]
