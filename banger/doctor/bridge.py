"""Would a bridge work here? Its network must be free, and a firewall let through what is forwarded."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from banger import proc
from banger.doctor.findings import Check, Host, Status, judge
from banger.errors import BangerError
from banger.helper.bridges import WIDEST
from banger.helper.requests import check_network

OTHER_NETWORK = "Set bridge_network in config.toml to a private network that is free, as 172.30.0.0/16."
OUR_TABLE = "banger"

Json = dict[str, Any]


def needed(host: Host) -> Status:
    """Give the status of what lets no VM on a bridge start: a failure where all VMs are to be on one."""
    return "fail" if host.config.network == "bridge" else "warn"


def examine(host: Host) -> Iterator[Check]:
    """Look where VMs may come to be on a bridge."""
    if host.config.network == "bridge" or Path(host.config.root_socket).exists():
        yield _overlap(host)
        yield from _firewalls(host.config.bridge)


def _overlap(host: Host) -> Check:
    name = "bridge network"
    try:
        mine = check_network(host.config.bridge_network)
    except ValueError as error:
        found = f"{host.config.bridge_network}: {error}"
        return Check(name=name, status=needed(host), detail=found, hint=OTHER_NETWORK)
    for link, network in _routes(Path("/proc/thread-self/net/route").read_text("ascii")):
        if link != host.config.bridge and network.prefixlen >= WIDEST and network.overlaps(mine):
            found = f"{mine} overlaps with {network}, to which {link} leads"
            return Check(name=name, status=needed(host), detail=found, hint=OTHER_NETWORK)
    return Check(name=name, status="pass", detail=f"{mine} on {host.config.bridge}")


def _routes(table: str) -> Iterator[tuple[str, ipaddress.IPv4Network]]:
    """Read the kernel's routes (proc(5), /proc/net/route): numbers have x86's order of bytes."""
    for line in table.splitlines()[1:]:
        link, target, _, flags, *_, mask = line.split()[:8]
        if int(flags, 16) & 1:  # RTF_UP
            address, bits = (int.from_bytes(bytes.fromhex(text), "little") for text in (target, mask))
            yield link, ipaddress.IPv4Network((address, bits.bit_count()))


# -- firewalls ---------------------------------------------------------------------------------------


def _firewalls(bridge: str) -> Iterator[Check]:
    """Look for firewalls that drop what is forwarded: our own rules cannot overrule theirs."""
    seen = _ruleset()
    found = [*_known(bridge), *_chains(seen, bridge)]
    told = _mentions(seen, bridge)
    for who, hint in found:
        detail = f"{who} drops what is forwarded unless it is told otherwise"
        detail += f"; it has rules for {bridge}" if told else ""
        yield judge("firewall", told, detail, f"Did you tell it? VMs need it for --nat. As root: {hint}")
    if not found:
        yield Check(name="firewall", status="pass", detail="none seen that drops what is forwarded")


def _known(bridge: str) -> Iterator[tuple[str, str]]:
    """Find by their traces, for everybody to see, the usual ones; give each with what to tell it."""
    if Path("/sys/class/net/docker0").exists():
        yield "Docker", "; ".join(f"iptables -I DOCKER-USER {way} {bridge} -j ACCEPT" for way in ("-i", "-o"))
    if _ufw_drops(_text(Path("/etc/ufw/ufw.conf")), _text(Path("/etc/default/ufw"))):
        yield "ufw", f"ufw route allow in on {bridge}; ufw route allow out on {bridge}"
    if any(_text(comm) == "firewalld\n" for comm in Path("/proc").glob("[0-9]*/comm")):
        zone = f"firewall-cmd --permanent --zone=trusted --add-interface={bridge}"
        yield "firewalld", f"{zone}; firewall-cmd --reload"


def _ufw_drops(settings: str, defaults: str) -> bool:
    accepts = 'DEFAULT_FORWARD_POLICY="ACCEPT"' in defaults.splitlines()
    return "ENABLED=yes" in settings.splitlines() and not accepts


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return ""


def _ruleset() -> list[Json]:
    """List nftables' chains and rules (libnftables-json(5)), which only root may see."""
    if os.getuid() != 0 or shutil.which("nft", path=proc.SEARCH_PATH) is None:
        return []
    try:
        told = proc.run(["nft", "--json", "list", "ruleset"], timeout_s=10.0)
    except BangerError:
        return []
    everything: list[Json] = json.loads(told)["nftables"]
    return everything


def _chains(seen: list[Json], bridge: str) -> Iterator[tuple[str, str]]:
    """Name the chains that see what is forwarded and drop it in the end; give each with what to tell it."""
    for chain in (each["chain"] for each in seen if "chain" in each):
        if (chain.get("hook"), chain.get("policy")) == ("forward", "drop"):
            name = f"{chain['family']} {chain['table']} {chain['name']}"
            rules = (f"nft insert rule {name} {way} {bridge} accept" for way in ("iifname", "oifname"))
            yield f"nftables' chain {name}", "; ".join(rules)


def _mentions(seen: list[Json], bridge: str) -> bool:
    rules = (each["rule"] for each in seen if "rule" in each)
    return any(rule["table"] != OUR_TABLE and f'"{bridge}"' in json.dumps(rule) for rule in rules)
