"""What a person asks of VMs all day, on a real guest: whether one is well, what it serves, what it uses."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from banger.rpc.inside import DEADLINE_S
from banger.testing.home import Home
from tests.cli.conftest import Terminal

pytestmark = pytest.mark.guest

BUSYBOX = "/run/banger/bin/busybox"
SERVE = f"""
mkdir -p /srv/www && cd /srv/www && echo hello > index.html
{BUSYBOX} httpd -p 8000 -h /srv/www
{BUSYBOX} httpd -p 127.0.0.1:8001 -h /srv/www
openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 1 -subj /CN=web 2> /dev/null
setsid openssl s_server -quiet -www -accept 8443 -key key -cert cert < /dev/null > /dev/null 2>&1 &
{BUSYBOX} telnetd -p 8002 -l /bin/cat
for port in 20FB 1F42; do
    until grep -q ":$port .* 0A " /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done
done
"""


def guest(home: Home, script: str) -> str:
    """Run a script in the VM with the ssh program."""
    done = home.banger("vm", "ssh", "web", "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def hung(home: Home, web: str) -> Iterator[float]:
    """The VM's processors stand still; the value is when they did from."""
    pid = home.vmm(web).pid
    os.kill(pid, signal.SIGSTOP)
    yield time.monotonic()
    os.kill(pid, signal.SIGCONT)


def test_ping(home: Home, web: str) -> None:
    """`vm ping` times round trips to the agent, not the second in which that wakes."""
    answer = home.json("vm", "ping", web)
    assert (answer["via"], len(answer["seconds"])) == ("agent", 3)
    assert all(0 < seconds < 0.5 for seconds in answer["seconds"])


def test_health_of_a_well_one(home: Home, web: str) -> None:
    """`vm health` passes all its checks on a fresh guest."""
    done = home.banger("vm", "health", web)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["agent", "ssh", "disk", "disk", "memory", "clock"]
    assert {line[0] for line in lines} == {"✓"}


def test_health_names_what_is_wrong(home: Home, web: str) -> None:
    """A full disk fails, a wrong clock warns, each with what to do; the exit code says so."""
    fill = "fallocate -l $(df -kP /root | awk 'END {print $4}')k /root/big"
    guest(home, f"{fill}; date -s @$(($(date +%s) - 300))")
    checks = {check["name"]: check for check in home.json("vm", "health", web)["checks"]}
    try:
        assert checks["disk /root"]["status"] == "fail"
        assert "--disk-size" in checks["disk /root"]["hint"]
        assert checks["clock"]["status"] == "warn"
        assert re.fullmatch(r"5m0[0-4]s behind the host's", checks["clock"]["detail"])
        assert checks["disk /"]["status"] == checks["memory"]["status"] == "pass"
        assert home.banger("vm", "health", web).returncode == 9
    finally:
        guest(home, f"rm /root/big; date -s @{time.time():.0f}")


def test_ports(home: Home, web: str) -> None:
    """`vm ports` tells http, https and others apart, who listens, where, and how to get there."""
    guest(home, SERVE)
    ports = {port["port"]: port for port in home.json("vm", "ports", web)["ports"]}
    assert {number: port["speaks"] for number, port in ports.items()} == {
        22: "ssh",
        8000: "http",
        8001: "http",
        8002: "other",
        8443: "https",
    }
    assert [ports[number]["process"] for number in (22, 8000, 8443)] == ["dropbear", "busybox", "openssl"]
    assert {number for number, port in ports.items() if port["only_inside"]} == {8001}
    assert ports[8000]["reach"] == "ssh -N -L 8000:127.0.0.1:8000 web.vm"
    assert ports[22]["reach"] == "banger vm ssh web"


def test_stats(home: Home, web: str) -> None:
    """`vm stats` shows what the VM takes of the host beside what the guest says of itself."""
    (row,) = home.json("vm", "stats", web)["stats"]
    host, inside = row["host"], row["guest"]
    assert 0 < host["pss_kib"] <= host["rss_kib"]
    assert host["cpu_s"] > 0
    directory = home.dirs.vm(row["vm"]).directory
    assert host["disk_bytes"] == sum(path.stat().st_blocks * 512 for path in directory.iterdir())
    assert 128 << 10 < inside["memory_available_kib"] < inside["memory_kib"] < 256 << 10
    assert {disk["mount"] for disk in inside["disks"]} == {"/", "/root"}
    assert 0 < inside["uptime_s"] < time.time() - host["started_us"] / 1e6
    head, line = home.banger("vm", "stats").stdout.splitlines()
    assert (head.split()[0], line.split()[0]) == ("NAME", web)


def test_a_sick_one_makes_nobody_wait(home: Home, web: str, hung: float) -> None:
    """`vm list` and `vm stats` answer within the deadline when a guest is hung, and say which it is."""
    assert home.banger("ps").returncode == 0
    assert time.monotonic() - hung < 1.0, "`ps` asks no guest"
    done = home.banger("vm", "stats")
    assert time.monotonic() - hung < DEADLINE_S + 2.0
    assert f"{web}: {web} is sick" in done.stdout
    for verb in ("ping", "health"):
        assert home.banger("vm", verb, web).returncode == 9


def test_after_the_sickness(home: Home, web: str) -> None:
    """A VM that was hung while it was asked answers again as soon as it can."""
    (row,) = home.json("vm", "stats", web)["stats"]
    assert row["guest"] is not None, row["why"]
    assert home.banger("vm", "health", web).returncode == 0


def test_one_that_is_off_is_told_at_once(home: Home) -> None:
    """A stopped VM has a line in `vm stats` when it is named; `ping`, `health` and `ports` refuse it."""
    assert home.banger("vm", "create", "cold", "--no-start", "--wait").returncode == 0
    (row,) = home.json("vm", "stats", "cold")["stats"]
    assert (row["guest"], row["why"]) == (None, "it is not running")
    assert row["host"]["disk_bytes"] > 0
    for verb in ("ping", "health", "ports"):
        assert home.banger("vm", verb, "cold").returncode == 4
    assert home.banger("vm", "delete", "cold").returncode == 0


# -- put away ------------------------------------------------------------------------------


def test_prune(home: Home, web: str) -> None:
    """`vm prune` shows what is at rest, asks a person, refuses to guess, and leaves running VMs alone."""
    for name in ("one", "two"):
        assert home.banger("vm", "create", name, "--no-start", "--wait").returncode == 0
    shown = home.banger("vm", "prune", "--dry-run")
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["NAME", "one", "two"]
    assert home.banger("vm", "prune").returncode == 2, "there is nobody to ask"
    own = [f"{name}={value}" for name, value in home.environ.items() if name.startswith("XDG_")]
    person = Terminal(["env", *own, *home.argv("vm", "prune")])
    person.expect("Delete these 2 VMs and their disks? [y/N]: ")
    person.type(b"n\n")
    person.expect("Nothing was deleted.")
    assert person.end() == 0
    pruned = home.json("vm", "prune", "-f")
    assert sorted((op["name"], op["fate"]) for op in pruned["ops"]) == [("one", "done"), ("two", "done")]
    assert home.banger("ps", "-aq").stdout.split() == [web]


def test_auto_stop() -> None:
    """A VM that nobody uses is stopped; commands, `vm touch` and an open session keep it running."""
    with Home() as home:
        home.configure('memory_mib = 256\nauto_stop_stale_after = "5s"\n')
        assert home.banger("vm", "create", "web", "--wait").returncode == 0
        shown = home.banger("vm", "show", "web").stdout
        assert re.search(r"^idle: +for .*; stopped in .* if nobody uses it$", shown, re.MULTILINE)
        with home.start("vm", "ssh", "web", "--", "sleep", "7") as session:
            time.sleep(6.5)
            assert state(home) == "running", "someone is inside"
        assert session.returncode == 0
        for _ in range(2):
            time.sleep(3)
            assert home.banger("vm", "touch", "web").returncode == 0
        assert state(home) == "running", "it was touched"
        deadline = time.monotonic() + 20
        while state(home) != "stopped":
            home.json("vm", "stats")  # to look is not to use
            assert time.monotonic() < deadline
            time.sleep(0.5)
        stop = home.json("ops", "list")["ops"][0]
        assert (stop["kind"], stop["fate"]) == ("vm.stop", "done")


def state(home: Home) -> Any:
    return home.json("vm", "show", "web")["vm"]["state"]
