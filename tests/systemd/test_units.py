"""The units are what systemd understands, and as closed as they promise."""

from __future__ import annotations

import configparser
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "systemd"
FILES = [UNITS / "banger-helper.service", UNITS / "bangerd@.service"]
PROGRAM = "/usr/lib/banger/venv/bin/python"

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")


def installed(file: Path, directory: Path) -> Path:
    """Put a unit where systemd-analyze can look at it: a template as user 1000's, with this Python."""
    copy = directory / file.name.replace("@.", "@1000.")
    text = file.read_text("utf-8")
    assert text.count(f"ExecStart={PROGRAM} ") == 1
    copy.write_text(text.replace(PROGRAM, sys.executable), "utf-8")
    return copy


def analyze(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "--no-pager", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def exposure(unit: Path, threshold: int) -> tuple[int, str]:
    """Rate a unit without a running systemd: the exit code, not 0 above the threshold, and the verdict."""
    done = analyze("security", "--offline=true", f"--threshold={threshold}", unit)
    return done.returncode, done.stdout.rstrip().rpartition("\n")[2]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_systemd_understands_a_unit(file: Path, tmp_path: Path) -> None:
    """Systemd finds nothing to say of the unit, and does of one that has a misspelt directive."""
    unit = installed(file, tmp_path)
    done = analyze("verify", "--man=no", unit)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(unit.read_text("utf-8").replace("\nKillMode=", "\nKilMode="))
    assert "KilMode" in analyze("verify", "--man=no", unit).stderr


@pytest.mark.parametrize(("file", "threshold"), [(FILES[0], 38), (FILES[1], 16)], ids=["helper", "daemon"])
def test_a_unit_is_as_closed_as_it_promises(file: Path, threshold: int, tmp_path: Path) -> None:
    """Systemd rates the helper 3.8 or less and the daemon 1.6 or less, but not when they are opened up."""
    unit = installed(file, tmp_path)
    code, verdict = exposure(unit, threshold)
    assert code == 0, verdict
    opened = unit.read_text("utf-8").replace("NoNewPrivileges=yes", "").replace("ProtectSystem=strict", "")
    unit.write_text(re.sub(r"^SystemCallFilter=.*", "", opened, flags=re.MULTILINE))
    assert exposure(unit, threshold)[0] != 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_relaxed_has_its_reason(file: Path) -> None:
    """A directive that says no, or names what stays open, has a comment right above it or above its group."""
    relaxed = re.compile(r"(\w+=(no|all|default|read-only)|(DevicePolicy|RestrictAddressFamilies)=.*)")
    lines = file.read_text("utf-8").splitlines()
    bare = [
        line
        for above, line in itertools.pairwise(lines)
        if relaxed.fullmatch(line) and not above.startswith("#") and not relaxed.fullmatch(above)
    ]
    assert bare == []
    assert sum(line.startswith("# Relaxed: ") for line in lines) >= 5


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_guests_outlive_their_unit(file: Path) -> None:
    """Only the unit's own process is ended with it, and a guest without memory does not end it."""
    unit = configparser.RawConfigParser(strict=False)
    unit.read(file)
    assert unit["Service"]["KillMode"] == "process"
    assert unit["Service"]["OOMPolicy"] == "continue"


def test_the_host_forwards_and_has_the_group(tmp_path: Path) -> None:
    """The one kernel setting is a key that this kernel has, and systemd-sysusers makes the one group."""
    setting = (UNITS / "sysctl.d/60-banger.conf").read_text("utf-8")
    (key,) = re.findall(r"^([\w.]+) = 1$", setting, re.MULTILINE)
    assert Path("/proc/sys", *key.split(".")).exists()
    (tmp_path / "etc").mkdir()
    command = ["systemd-sysusers", f"--root={tmp_path}", str(UNITS / "sysusers.d/banger.conf")]
    subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert re.match(r"banger:!?[x*]:\d+:$", (tmp_path / "etc/group").read_text("utf-8"))
