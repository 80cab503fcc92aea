"""The daemon answers for `*.vm` from what the log tells of VMs, where that is wanted."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dns.flags
import dns.message
import dns.query
import dns.rcode
import pytest

from banger import config
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.model import Process, VmSpec
from banger.network.user import HOST_ADDRESS
from banger.rpc import dns as names
from banger.testing.home import Home


@pytest.fixture
def home() -> Iterator[Home]:
    with Home() as home:
        home.dirs.make()
        yield home


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A port, of which the UDP half is somebody else's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind((HOST_ADDRESS, 0))
        yield taken


def ask(port: int, name: str) -> dns.message.Message:
    return dns.query.udp(dns.message.make_query(name, "A"), HOST_ADDRESS, port=port, timeout=5)


def doctor(home: Home) -> dict[str, str]:
    checks: list[dict[str, str]] = home.json("doctor")["checks"]
    return next(check for check in checks if check["name"] == "names")


def log_lines(home: Home) -> list[dict[str, str]]:
    return [json.loads(line) for line in home.dirs.log_file.read_text("utf-8").splitlines()]


def test_the_daemon_answers_until_it_ends(home: Home, taken: socket.socket) -> None:
    """It answers with authority while it runs, doctor knows that it does, and the port is free afterwards."""
    port = taken.getsockname()[1]
    taken.close()
    home.configure(f"dns = true\ndns_port = {port}\n")
    assert "will answer" in doctor(home)["detail"]
    assert home.banger("daemon", "start").returncode == 0
    reply = ask(port, "nosuch.vm")
    assert (reply.rcode(), bool(reply.flags & dns.flags.AA)) == (dns.rcode.NXDOMAIN, True)
    found = doctor(home)
    assert (found["status"], found["detail"]) == (
        "pass",
        f"the daemon answers for *.vm on {HOST_ADDRESS}:{port}",
    )
    assert home.banger("daemon", "stop").returncode == 0
    assert "will answer" in doctor(home)["detail"]


def test_a_taken_port_is_told_and_survived(home: Home, taken: socket.socket) -> None:
    """Where another program has the port the daemon starts all the same; its log and doctor say so."""
    port = taken.getsockname()[1]
    home.configure(f"dns = true\ndns_port = {port}\n")
    assert home.banger("daemon", "start").returncode == 0
    assert home.banger("ps").returncode == 0
    lines = [line for line in log_lines(home) if line["event"] == "names are not answered"]
    assert [(line["port"], line["error"]) for line in lines] == [(port, "Address already in use")]
    found = doctor(home)
    assert found["status"] == "warn"
    assert f"another program has {HOST_ADDRESS}:{port}" in found["detail"]


def test_nobody_answers_where_it_is_not_wanted(home: Home, taken: socket.socket) -> None:
    """Without root's helper the daemon leaves the port alone, and doctor says that names are off."""
    home.configure(f"dns_port = {taken.getsockname()[1]}\nroot_socket = '{home.path}/none'\n")
    assert home.banger("daemon", "start").returncode == 0
    assert [line for line in log_lines(home) if "names are" in line["event"]] == []
    assert (doctor(home)["status"], doctor(home)["detail"][:4]) == ("pass", "off:")


def test_it_is_wanted_where_root_helps(tmp_path: Path) -> None:
    """Unless the user says so or otherwise, the socket of root's helper decides."""
    there, none = str(tmp_path), str(tmp_path / "none")
    assert config.dns_wanted(config.Config(root_socket=there))
    assert not config.dns_wanted(config.Config(root_socket=none))
    assert config.dns_wanted(config.Config(root_socket=none, dns=True))
    assert not config.dns_wanted(config.Config(root_socket=there, dns=False))


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_a_port_that_is_none_is_refused(home: Home, port: int) -> None:
    """A port outside of 1 to 65535 is refused by name when the configuration is read."""
    home.configure(f"dns_port = {port}\n")
    refused = home.banger("daemon", "start")
    assert refused.returncode != 0
    assert "dns_port" in refused.stderr


def test_dnspython_is_loaded_only_when_it_serves() -> None:
    """The daemon's modules do not import dnspython: an idle daemon that answers nobody stays small."""
    look = "import sys, banger.rpc.daemon; sys.exit('dns.message' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", look], check=True, timeout=60)


def test_a_vm_has_its_name_while_it_has_an_address(home: Home) -> None:
    """A VM is found by its name, not by its id, from its start to its end, and its name by its address."""
    log = EventLog(home.dirs.database, home.dirs.work_bell, home.dirs.event_bell, "test")
    seen = []

    def tell(event: ev.Event) -> None:
        with log.transaction() as tx:
            tx.append("vm-00000001", event, op="op-aaaaaa")
        seen.append((names.address(log, "web"), names.name_at(log, "172.31.0.2")))

    spec = VmSpec(name="web", image="i", kernel="k", vcpu=1, memory_mib=256, disk_mib=64)
    process = Process(pid=1, start_ticks=1, boot_id="")
    try:
        tell(ev.VmReserved(spec=spec, host="here"))
        tell(ev.VmStarted(process=process, ssh_port=22, accelerator="tcg", address="172.31.0.2"))
        assert names.address(log, "vm-00000001") is None
        tell(ev.VmStopped(reason="asked"))
    finally:
        log.close()
    assert seen == [(None, None), ("172.31.0.2", "web"), (None, None)]
