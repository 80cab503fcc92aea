"""Is root's helper there? And what it finds on this host.

A host without it lacks nothing that is needed, unless the settings ask for a bridge.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import banger
from banger.doctor.bridge import needed
from banger.doctor.findings import Check, Host, judge
from banger.doctor.installed import INSTALL, is_installed
from banger.errors import BangerError
from banger.tasks import root
from banger.vmm.firecracker import NEWEST, OLDEST


def examine(host: Host) -> Iterator[Check]:
    """Ask the helper once, and look at all that it tells."""
    if Path(host.config.root_socket).exists():
        yield from _present(host)
    else:
        yield _absent(host)
        yield _root_disks(host, {})


def _absent(host: Host) -> Check:
    if is_installed():
        return Check(
            name="root's helper",
            status=needed(host),
            detail="installed, and does not run",
            hint="As root: systemctl status banger-helper; journalctl -u banger-helper",
        )
    wanted = host.config.network == "bridge"
    detail = "not installed, not needed: VMs have QEMU's own network"
    if wanted:
        detail = 'not installed, and config.toml says `network = "bridge"`'
    return judge("root's helper", not wanted, detail, INSTALL, otherwise="fail")


def _present(host: Host) -> Iterator[Check]:
    try:
        told = root.hello(root.Pool(Path(host.config.root_socket)))
    except BangerError as error:
        yield Check(name="root's helper", status=needed(host), detail=error.message, hint=_why_not(host))
        yield _root_disks(host, {})
        return
    same = told["version"] == banger.__version__
    found = f"version {told['version']}" + ("" if same else f", and this is {banger.__version__}")
    yield judge("root's helper", same, found, f"Install the same version. {INSTALL}")
    yield from (look(host, told) for look in OFFERS)


def _why_not(host: Host) -> str:
    if not os.access(host.config.root_socket, os.R_OK | os.W_OK):
        return f"Are you an owner? Then log in anew, and run `banger daemon stop`. Else: {INSTALL}"
    return "As root: journalctl -u banger-helper tells why. " + INSTALL


# -- what it finds on the host -----------------------------------------------------------------------

Told = dict[str, Any]


def _tun(_: Host, told: Told) -> Check:
    found = "present" if told["tun"] else "absent: no VM can be on a bridge"
    return judge("tun device", told["tun"], found, "As root: modprobe tun")


def _forwarding(_: Host, told: Told) -> Check:
    found = "on" if told["forwards"] else "off: no VM on a bridge gets out with --nat"
    return judge(
        "forwarding",
        bool(told["forwards"]),
        found,
        "As root: sysctl -w net.ipv4.ip_forward=1; a file in /etc/sysctl.d makes that last.",
    )


def _egress(host: Host, told: Told) -> Check:
    name = host.config.egress or told["egress"]
    if name is None:
        return judge(
            "way out", False, "this host has no default route", "Set one, or `egress` in config.toml."
        )
    there = Path("/sys/class/net", name).exists()
    whence = "`egress` of config.toml" if host.config.egress else "the default route"
    found = f"{name}, by {whence}" if there else f"{name}, named by {whence}, is not there"
    return judge("way out", there, found, "Name an interface of `ls /sys/class/net`, or none.")


def _names(_: Host, told: Told) -> Check:
    found = (
        "told of *.vm by root" if told["resolved"] else "does not run: docs/dns.md tells how to ask others"
    )
    return Check(name="systemd-resolved", status="pass", detail=found)


def _device_mapper(_: Host, told: Told) -> Check:
    found = "can make snapshots" if told["device_mapper"] else "cannot make snapshots, not needed"
    return Check(name="device-mapper", status="pass", detail=found)


def _firecracker(_: Host, told: Told) -> Check:
    tested = f"checked for {_dotted(OLDEST)} to {_dotted(NEWEST)}"
    version = told["firecracker"]
    if version is None:
        found = f"absent or not root's own, not needed; {tested}"
        return Check(name="Firecracker", status="pass", detail=found)
    newer = tuple(int(part) for part in version.split(".")) > NEWEST
    hint = "Should VMs not start on it, install one of these versions."
    return judge("Firecracker", not newer, f"{version}, {tested}", hint)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def _root_disks(host: Host, told: Told) -> Check:
    """Tell which disks VMs get as their root, and why; without the helper nothing is told."""
    name = "root disks"
    if host.config.root_disk == "overlay":
        why = "needs no root, and when the host's disk is full loses a write and not the disk"
        return Check(name=name, status="pass", detail=f"overlay: {why}")
    can = bool(told.get("device_mapper"))
    found = "snapshot: config.toml says so" + ("" if can else ", and this host cannot make one")
    return judge(name, can, found, 'Set `root_disk = "overlay"`, which needs no root.', otherwise="fail")


OFFERS: tuple[Callable[[Host, Told], Check], ...] = (
    _tun,
    _forwarding,
    _egress,
    _names,
    _device_mapper,
    _firecracker,
    _root_disks,
)
