"""VMs on a bridge, with a real root helper, in a network namespace that the tests make."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from banger.testing.bridged import OUTSIDE, WORLD, Bridged

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(not shutil.which("nft"), reason="nft, which looks at the rules, is not installed"),
]

PORT = 8080
# Says who it is that asks; without a client it ends by itself.
SERVER = f"""
import socket, sys
with socket.create_server(({WORLD!r}, {PORT})) as server:
    print("listening", flush=True)
    server.settimeout(280)
    while True:
        connection, (address, _) = server.accept()
        with connection:
            connection.sendall(b"you are " + address.encode() + b"\\n")
"""
REACH = f"exec 3<> /dev/tcp/{WORLD}/{PORT} && read -r -t 5 line <&3 && echo $line"


@pytest.fixture(scope="module")
def home() -> Iterator[Bridged]:
    with Bridged() as home:
        yield home


@pytest.fixture(scope="module")
def before(home: Bridged) -> dict[str, object]:
    """What there was in the namespace before the first VM."""
    return home.listing()


@pytest.fixture(scope="module")
def web(home: Bridged, before: dict[str, object]) -> str:
    done = home.banger("vm", "create", "web", "--wait")
    assert done.returncode == 0, done.stderr
    return "web"


@pytest.fixture(scope="module")
def server(home: Bridged) -> Iterator[None]:
    """A server in the world, behind the host's NAT as seen from a VM."""
    words = ["ip", "netns", "exec", home.world, sys.executable, "-c", SERVER]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        yield
        process.kill()


def reach(home: Bridged) -> subprocess.CompletedProcess[str]:
    """Have the VM ask the server in the world who it is."""
    return home.banger("vm", "exec", "web", "--", "timeout", "5", "bash", "-c", REACH)


def test_a_vm_is_reached_at_its_address_and_by_its_name(home: Bridged, web: str) -> None:
    """The daemon's name server gives the address at which the guest's SSH server answers."""
    vm = home.json("vm", "show", web)["vm"]
    asked = home.run_inside("dig", "+short", "@127.0.0.1", "-p", "42069", "web.vm")
    assert asked.stdout.split() == [vm["address"]]
    assert home.banger("vm", "exec", web, "--", "hostname", "-I").stdout.split() == [vm["address"]]
    unknown = home.run_inside("dig", "@127.0.0.1", "-p", "42069", "nobody.vm")
    assert "NXDOMAIN" in unknown.stdout


@pytest.mark.usefixtures("web", "server")
def test_nat_is_switched_while_the_vm_runs(home: Bridged) -> None:
    """Without NAT it reaches nothing, with it the world as the host, and without it nothing again."""
    assert reach(home).returncode != 0
    assert home.banger("vm", "set", "web", "--nat", "--wait").returncode == 0
    assert reach(home).stdout == f"you are {OUTSIDE}\n"
    assert home.json("vm", "show", "web")["vm"]["nat"] is True
    assert home.banger("vm", "set", "web", "--no-nat", "--wait").returncode == 0
    assert reach(home).returncode != 0


@pytest.mark.usefixtures("web")
def test_root_tells_its_part_of_an_operation(home: Bridged) -> None:
    """`ops show` has root's audit lines beside the owner's steps, under the same operation."""
    (op,) = [op["id"] for op in home.json("ops", "list")["ops"] if op["kind"] == "vm.create"]
    told = home.json("ops", "show", op)["op"]["root"]
    assert [(line["step"], line["verb"], line["outcome"]) for line in told] == [
        ("tap", "tap.ensure", "ok"),
        ("names", "names.route", "ok"),
    ]
    assert "BY ROOT" in home.banger("ops", "show", op).stdout


@pytest.mark.usefixtures("web")
def test_a_tap_that_is_nobodys_is_found_and_removed(home: Bridged) -> None:
    """What root has made for a VM that the log does not know is a leak; the VM beside it stays."""
    from banger.helper import client
    from banger.helper.requests import Request, TapEnsure

    stray = TapEnsure(vm="vm-stray000", bridge="br-fc", network="172.31.0.0/16")
    client.ask(home.socket, Request(op="op-stray", step="tap", epoch=1, key="stray", ask=stray))
    (leak,) = home.json("ops", "audit")["leaked"]
    assert (leak["kind"], leak["vm"]) == ("tap", "vm-stray000")
    assert home.banger("ops", "audit", "--fix").returncode == 0
    assert home.json("ops", "audit")["leaked"] == []
    assert home.banger("vm", "exec", "web", "--", "true").returncode == 0


@pytest.mark.usefixtures("web")
def test_a_helper_that_is_down_is_waited_for(home: Bridged) -> None:
    """An operation tries root again; when it stays away the VM is as it was, and the user is told."""
    home.end_helper()
    failed = home.banger("vm", "set", "web", "--nat", "--wait")
    assert failed.returncode in (6, 7), failed.stderr
    assert "root helper" in failed.stderr
    assert "root helper" in home.banger("ops", "audit").stdout
    home.start_helper()
    stuck = [op["id"] for op in home.json("ops", "list")["ops"] if op["fate"] == "stuck"]
    for op in stuck:
        assert home.banger("ops", "retry-undo", op).returncode == 0
        home.banger("ops", "follow", op)
    assert home.json("vm", "show", "web")["vm"]["nat"] is False
    assert home.banger("vm", "set", "web", "--nat", "--wait").returncode == 0
    assert home.json("ops", "audit")["leaked"] == []


def test_nothing_is_left_of_a_vm(home: Bridged, before: dict[str, object], web: str) -> None:
    """After `vm delete` links, addresses, routes and rules are what they were before `vm create`."""
    assert home.listing() != before
    assert home.banger("vm", "delete", web).returncode == 0
    assert home.listing() == before
    audited = home.json("ops", "audit")
    assert (audited["held"], audited["leaked"], audited["missing"]) == (0, [], [])
