"""Is root's installation as it promises? Whose its files are, and how closed its units."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from banger import proc
from banger.doctor.findings import Check, Host, judge
from banger.errors import BangerError

UNIT = "banger-helper.service"
UNITS = Path("/etc/systemd/system")
ENVIRONMENT = Path("/usr/lib/banger/venv")
STATE = Path("/var/lib/banger-root")
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
INSTALL = "As root, in a checkout: setup/install-root USER (docs/root-helper.md)."

# What each unit must come to, with all its drop-ins, as systemd tells it.
PROMISES = {
    UNIT: {
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "MemoryDenyWriteExecute": "yes",
        "RestrictSUIDSGID": "yes",
        "DevicePolicy": "closed",
    },
    "bangerd@{uid}.service": {
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "read-only",
        "CapabilityBoundingSet": "",
        "DevicePolicy": "closed",
    },
}


def is_installed() -> bool:
    """Tell whether the helper's unit is there."""
    return (UNITS / UNIT).exists()


def examine(host: Host) -> Iterator[Check]:
    """Look at what was installed; nothing where nothing was."""
    if is_installed():
        yield _files(Path(host.config.root_socket))
        yield from _promises()


def _files(socket: Path) -> Check:
    """Look whose the installed things are: what root runs, and where it keeps its records."""
    wrong = [
        *(
            f"{path} is not root's only"
            for path in (UNITS / UNIT, *_tree(ENVIRONMENT))
            if not _is_roots(path)
        ),
        *_mode(STATE, 0o700),
        *_mode(socket.parent, 0o755),
        *_mode(socket, 0o660),
    ]
    detail = f"{ENVIRONMENT}, {STATE} and {socket} are root's own"
    if wrong:
        detail = wrong[0] + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
    return judge("root's files", not wrong, detail, f"Find out who did that. {INSTALL}", otherwise="fail")


def _tree(top: Path) -> Iterator[Path]:
    for directory, _, files in os.walk(top):
        yield Path(directory)
        yield from (Path(directory, file) for file in files)


def _is_roots(path: Path) -> bool:
    found = path.lstat()
    return found.st_uid == 0 and (stat.S_ISLNK(found.st_mode) or not found.st_mode & OTHERS_WRITE)


def _mode(path: Path, mode: int) -> Iterator[str]:
    """Complain when a path that is there is not root's, or has not this mode."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    have = (found.st_uid, stat.S_IMODE(found.st_mode))
    if have != (0, mode):
        yield f"{path} has owner {have[0]} and mode {have[1]:04o}, not 0 and {mode:04o}"


def _promises() -> Iterator[Check]:
    """Ask systemd what the units come to: a drop-in may have taken back what they promise."""
    for template, promises in PROMISES.items():
        unit = template.format(uid=os.getuid())
        try:
            told = proc.run(["systemctl", "show", f"--property={','.join(promises)}", unit], timeout_s=10.0)
        except BangerError:
            continue  # no systemd runs here
        broken = _broken(promises, told)
        detail = f"{unit} is as closed as it promises" if not broken else f"{unit} has {', '.join(broken)}"
        hint = f"`systemctl cat {unit}` shows which drop-in says so."
        yield judge("unit", not broken, detail, hint)


def _broken(promises: dict[str, str], told: str) -> list[str]:
    have = dict(line.split("=", 1) for line in told.splitlines())
    return [f"{key}={have.get(key, '?')}" for key, value in promises.items() if have.get(key) != value]
