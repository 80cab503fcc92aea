"""`banger vm ping`, `health`, `ports`, `stats`, `touch`: how VMs are, without going inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from banger import layout
from banger.errors import GuestUnreachable
from banger_cli import wire
from banger_cli.commands import Leaf
from banger_cli.doctor import marked
from banger_cli.output import Out

Json = dict[str, Any]
_KIB = 1 << 10


@click.command("ping", cls=Leaf, epilog="Examples:\n  banger vm ping web")
@click.argument("vm", metavar="NAME")
@click.pass_obj
def ping(out: Out, vm: str) -> None:
    """Ask the agent in a VM whether it is there, a few times, and tell how long that takes."""
    found = wire.call("vm.ping", vm=vm)
    best = min(found["seconds"]) * 1000
    out.show(found, [f"{found['name']} answers in {best:.1f}ms ({found['via']})"])


@click.command("health", cls=Leaf, epilog="""\
Examples:
  banger vm health web
  banger vm health web --json | jq '.checks[] | select(.status != "pass")'""")  # fmt: skip
@click.argument("vm", metavar="NAME")
@click.pass_obj
def health(out: Out, vm: str) -> int:
    """Check whether a VM is well, and say what to do if not. Exits with 9 when a check fails."""
    found = wire.call("vm.health", vm=vm)
    out.show(found, marked(found["checks"]))
    return 0 if found["ok"] else GuestUnreachable.exit_code


@click.command("ports", cls=Leaf, epilog="""\
Examples:
  banger vm ports web
  banger vm ports web --json | jq -r '.ports[] | select(.speaks == "http").reach'

A line with ssh in it makes the port yours while it runs: see `banger ssh-config`.""")  # fmt: skip
@click.argument("vm", metavar="NAME")
@click.pass_obj
def ports(out: Out, vm: str) -> None:
    """List on which TCP ports something listens in a VM, what it speaks, and how to reach it."""
    found = wire.call("vm.ports", vm=vm)
    rows = [
        (each["port"], _listens_at(each), each["speaks"], _process(each), each["reach"])
        for each in found["ports"]
    ]
    out.show(found, layout.table(("PORT", "ADDRESS", "SPEAKS", "PROCESS", "REACH IT BY"), rows))


def _listens_at(port: Json) -> str:
    everywhere = {"0.0.0.0", "::"} & set(port["addresses"])  # noqa: S104 (nothing is bound here)
    return "all" if everywhere else ",".join(port["addresses"])


def _process(port: Json) -> str | None:
    return f"{port['process'] or '?'} ({port['pid']})" if port["pid"] else None


_HEAD = ("NAME", "CPU", "RSS", "PSS", "DISK", "AGE", "LOAD", "MEMORY", "/", "/root", "UP")


@click.command("stats", cls=Leaf, epilog="""\
Examples:
  banger vm stats                     all that run
  banger vm stats web db
  watch banger vm stats

CPU, RSS, PSS and DISK are what it takes of this host; the rest is what the guest says.""")  # fmt: skip
@click.argument("vms", metavar="[NAME...]", nargs=-1)
@click.pass_obj
def stats(out: Out, vms: tuple[str, ...]) -> None:
    """Show what VMs use. A sick one never makes it wait for more than three seconds."""
    found = wire.call("vm.stats", vms=list(vms))
    out.show(found, _stats_story(found["stats"]))


def _stats_story(stats: list[Json]) -> Iterator[str]:
    rows = [(each["name"], *_of_host(each["host"]), *_of_guest(each["guest"])) for each in stats]
    yield from layout.table(_HEAD, rows)
    for each in stats:
        if each["why"]:
            yield f"{each['name']}: {each['why']}"


def _of_host(host: Json) -> tuple[object, ...]:
    return (
        f"{host['cpu_percent']}%" if "cpu_percent" in host else None,
        layout.size(host["rss_kib"] * _KIB) if "rss_kib" in host else None,
        layout.size(host["pss_kib"] * _KIB) if host.get("pss_kib") else None,
        layout.size(host["disk_bytes"]),
        layout.ago(host["created_us"]),
    )


def _of_guest(guest: Json | None) -> tuple[object, ...]:
    if guest is None:
        return (None,) * 5
    used = (guest["memory_kib"] - guest["memory_available_kib"]) * _KIB
    disks = {disk["mount"]: layout.size(disk["used_kib"] * _KIB) for disk in guest["disks"]}
    return (
        f"{guest['load'][0]:.2f}",
        f"{layout.size(used)}/{layout.size(guest['memory_kib'] * _KIB)}",
        disks.get("/"),
        disks.get("/root"),
        layout.seconds(guest["uptime_s"]),
    )


@click.command("touch", cls=Leaf, epilog="""\
Examples:
  banger vm touch web                 `auto_stop_stale_after` counts from now""")  # fmt: skip
@click.argument("vm", metavar="NAME")
@click.pass_obj
def touch(out: Out, vm: str) -> None:
    """Say that a VM is being used, so that it is not stopped for being idle."""
    found = wire.call("vm.touch", vm=vm)
    out.show(found, [f"{found['name']} is used"])
