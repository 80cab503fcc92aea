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
