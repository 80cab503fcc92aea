"""What the units close is nothing that banger needs: they run under the systemd of a whole host."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.testing.hosted import Hosted
from banger.testing.hosted_install import BANGER, PYTHON

pytestmark = pytest.mark.guest

UNITS = Path(__file__).parents[2] / "systemd"
SYSTEM = "/etc/systemd/system"
UID = 1000
DAEMON = f"bangerd@{UID}"
HOME = "/home/daisy"
WRITABLE = [f"{HOME}/.local/state/banger", f"{HOME}/.cache/banger", f"/run/user/{UID}"]
CLOSED = [HOME, "/root", "/etc", "/usr", "/var/lib", "/run", "/opt/banger"]
AS_DAISY = (
    f"setpriv --reuid={UID} --regid={UID} --init-groups env HOME={HOME} XDG_RUNTIME_DIR=/run/user/{UID}"
)
TAKE_AWAY = f"""
systemctl stop {DAEMON}
systemctl kill --signal=KILL {DAEMON} 2>/dev/null || true
rm -r {SYSTEM}/bangerd@*
systemctl daemon-reload
userdel --remove daisy 2>/dev/null
"""

# What the daemon does and a unit could forbid, as far as it takes no image: let QEMU translate code, know its
# process again, write. It waits to be ended, as the daemon does.
PROBE = f"""
import os, signal, subprocess, sys
from pathlib import Path
from banger import proc
from banger.images.layers import sandbox

QEMU = "qemu-system-x86_64 -machine microvm -accel tcg -nodefaults -display none -sandbox on,spawn=deny"

def may_write(place):
    try:
        (Path(place) / "probe").touch()
    except OSError:
        return False
    return True

if not proc.find_by_environ("BANGER_VM", "vm-unit"):
    environ = {{**os.environ, "BANGER_VM": "vm-unit"}}
    subprocess.run(["setsid", "--fork", *QEMU.split()], env=environ, check=True)
os.close(os.open("/dev/net/tun", os.O_RDWR))
print("writes", *(place for place in {WRITABLE + CLOSED} if may_write(place)))
print("landlock", sandbox.landlock_version() > 0)
print("guests", *(guest.pid for guest in proc.find_by_environ("BANGER_VM", "vm-unit")), flush=True)
signal.pause()
"""


@pytest.fixture
def daisy(hosted: Hosted) -> Iterator[Hosted]:
    """A host with a user daisy, whose daemon's unit is installed and not started."""
    unit = (UNITS / "bangerd@.service").read_bytes()
    mine = f"[Service]\nReadWritePaths={' '.join(WRITABLE[:2])}\n"
    hosted.output(f"useradd --uid {UID} --create-home daisy; {AS_DAISY} mkdir -p {' '.join(WRITABLE[:2])}")
    hosted.put(
        f"{SYSTEM}/bangerd@.service", unit.replace(b"/usr/lib/banger/venv/bin/python", PYTHON.encode())
    )
    hosted.put(f"{SYSTEM}/{DAEMON}.service.d/home.conf", mine.encode())
    hosted.output("systemctl daemon-reload")
    yield hosted
    hosted.output(TAKE_AWAY)


def test_the_daemon_answers_its_owner(daisy: Hosted) -> None:
    """Under its unit the daemon answers its owner, and systemd-resolved about VMs."""
    daisy.put(f"{HOME}/.config/banger/config.toml", b"dns = true\n")
    daisy.output(f"chown -R daisy: {HOME}/.config; systemctl start {DAEMON}")
    daisy.output(f"until [ -S {WRITABLE[2]}/banger/daemon.sock ]; do sleep 0.2; done")
    said = daisy.output(f"{AS_DAISY} {BANGER} vm list --json; cat {WRITABLE[0]}/daemon.lock")
    main = daisy.output(f"systemctl show --property MainPID --value {DAEMON}")
    assert said.split() == ['{"vms":', "[]}", main.strip()]
    route = "resolvectl dns br-fc 127.0.0.1:42069; resolvectl domain br-fc '~vm'"
    daisy.output(
        f"ip link add br-fc type dummy; ip addr add 172.31.0.1/16 dev br-fc; ip link set br-fc up; {route}"
    )
    try:
        assert "localhost nobody.invalid" in daisy.output("resolvectl query --type=SOA vm")
        assert "'web.vm' not found" in daisy.run("resolvectl query web.vm").stderr
    finally:
        daisy.output("ip link delete br-fc")
    assert daisy.output(f"systemctl stop {DAEMON}; systemctl is-failed {DAEMON} || true") == "inactive\n"


def test_a_guest_outlives_its_daemon(daisy: Hosted) -> None:
    """QEMU runs below the unit, goes on when that is stopped, and the next daemon knows it again."""
    probe = f"[Service]\nExecStart=\nExecStart={PYTHON} -I /run/probe.py\n"
    daisy.put("/run/probe.py", PROBE.encode())
    daisy.put(f"{SYSTEM}/{DAEMON}.service.d/probe.conf", probe.encode())
    told = f"journalctl --no-pager -o cat _PID=$(systemctl show --property MainPID --value {DAEMON})"
    wait = f"until {told} | grep guests; do sleep 0.5; done >/dev/null; {told}"
    daisy.output("systemctl daemon-reload")
    first, second = (daisy.output(f"systemctl restart {DAEMON}; {wait}") for _ in range(2))
    guest = re.findall(r"^guests (\d+)$", first, re.MULTILINE)
    assert len(guest) == 1
    assert re.findall(r"^guests (\d+)$", second, re.MULTILINE) == guest
    assert f"writes {' '.join(WRITABLE)}\nlandlock True\n" in second
    assert daisy.output(f"systemctl stop {DAEMON}; cat /proc/{guest[0]}/comm") == "qemu-system-x86\n"
    daisy.output("rm /run/probe.py")
