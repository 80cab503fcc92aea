"""The README's way to root's helper: installed on a whole host, used by an owner, and taken away again."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import proc
from banger.testing.hosted import Hosted
from banger.testing.hosted_install import PYTHON

pytestmark = [pytest.mark.guest, pytest.mark.long, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CHECKOUT = "/srv/checkout"
PARTS = ("LICENSE", "README.md", "banger", "cli", "pyproject.toml", "requirements", "setup", "systemd")
OWNER, STRANGER = 1000, 1001
SLOW_S = 300.0  # what is not compiled is compiled at each start
# An emulated CPU compiles all libraries for a minute, and most are never imported here.
INSTALL = f"PIP_NO_COMPILE=1 {CHECKOUT}/setup/install-root --wheels {CHECKOUT}/wheels"
UNINSTALL = f"{CHECKOUT}/setup/install-root --uninstall"
BANGER = "/usr/lib/banger/venv/bin/banger"
LISTING = r"""
find /etc /usr/lib/b* /usr/local /var/lib/banger* /run/banger* ! -name '*-' -printf '%p %y %m %u %l\n' | sort
cut -d: -f1,4 /etc/group
systemctl list-units --all --no-legend 'banger*'
ls /sys/class/net; losetup --list; dmsetup ls; nft list tables
"""

# As a user: what root is asked for in the life of a VM, but for a jail, which takes Firecracker.
ASK = """
import os, sys
from pathlib import Path
from banger.errors import BangerError
from banger.helper import client
from banger.helper import requests as q

def ask(asked, *fds):
    request = q.Request(op="op-unit", step="s", epoch=1, key=os.urandom(8).hex(), ask=asked)
    return client.ask(Path("/run/banger-root/helper.sock"), request, fds).facts

def disk(name):
    fd = os.open("/dev/shm/install-" + name, os.O_RDWR | os.O_CREAT)
    os.truncate(fd, 4 << 20)
    return fd

def kinds():
    return " ".join(sorted(found["kind"] for found in ask(q.Listing())["found"]))

def make():
    ask(q.TapEnsure(vm="web", bridge="br-fc", network="172.31.0.0/16"))
    ask(q.NatEnable(vm="web", address="172.31.0.2", egress="eth0"))
    print(ask(q.NamesRoute(bridge="br-fc", port=42069))["routed"])
    ask(q.SnapshotEnsure(vm="web"), disk("base"), disk("cow"))
    print(kinds())

def remove():
    print(kinds())
    for asked in (q.SnapshotRemove(vm="web"), q.NatDisable(vm="web"), q.TapRemove(vm="web")):
        ask(asked)
    print(kinds())

def hello():
    print(ask(q.Hello())["uid"])

try:
    globals()[sys.argv[1]]()
except BangerError as error:
    print(error.code)
"""


def checkout() -> bytes:
    """Pack what an installation takes of this working tree, and the packages that it pins."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for part in PARTS:
            tar.add(ROOT / part, f"{CHECKOUT[1:]}/{part}", filter=_for_root)
        for wheel in _wheels().iterdir():
            tar.add(wheel, f"{CHECKOUT[1:]}/wheels/{wheel.name}", filter=_for_root)
    return out.getvalue()


def _for_root(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    member.uid = member.gid = 0
    return None if member.name.endswith("__pycache__") else member


def _wheels() -> Path:
    """Fetch what runtime.txt pins; pip checks the hashes, also of those that are here already."""
    wheels = ROOT / "build" / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pinned = ["--require-hashes", "--only-binary", ":all:", "-r", str(ROOT / "requirements" / "runtime.txt")]
    proc.run([*pip, *pinned, "--find-links", str(wheels), "--dest", str(wheels)], timeout_s=300)
    return wheels


def as_user(uid: int, words: str) -> str:
    return f"setpriv --reuid={uid} --regid={uid} --init-groups env HOME=/home/u{uid} {words}"


def ask(uid: int, what: str) -> str:
    return as_user(uid, f"{PYTHON} -I /run/ask.py {what}")


@pytest.fixture(scope="module")
def users(hosted: Hosted) -> Iterator[Hosted]:
    """A host with two users, a checkout, and nothing of banger's installed by it."""
    hosted.put("/run/ask.py", ASK.encode())
    hosted.output(["tar", "x", "-C", "/"], stdin=checkout())
    for uid in (OWNER, STRANGER):
        hosted.output(f"useradd --uid {uid} --create-home u{uid}")
    yield hosted
    for uid in (OWNER, STRANGER):
        hosted.output(f"userdel --remove u{uid} 2>/dev/null")
    hosted.output(f"rm -r {CHECKOUT} /run/ask.py; sysctl --write net.ipv4.ip_forward=0")


@pytest.fixture(scope="module")
def before(users: Hosted) -> str:
    """What is on the host before the installation; forwarding is off."""
    users.output("sysctl --write net.ipv4.ip_forward=0")
    return listing(users)


@pytest.fixture(scope="module")
def installed(users: Hosted, before: str) -> Iterator[Hosted]:
    """The host, with the helper installed for one of the users, and that one's daemon."""
    users.output(f"{INSTALL} --daemon u{OWNER}", 2 * SLOW_S)
    yield users
    if users.run(f"test -e {BANGER}").returncode == 0:
        users.output(f"{ask(OWNER, 'remove')}; {UNINSTALL}")


def test_a_file_that_is_not_ours_stays(users: Hosted, before: str) -> None:
    """Where a file of another's is in the way, nothing is written, and it is named."""
    users.put("/etc/banger/root.env", b"mine\n")
    refused = users.run(f"{INSTALL} u{OWNER}")
    assert refused.returncode == 1
    assert "/etc/banger/root.env is not as banger made it" in refused.stderr
    assert users.output("cat /etc/banger/root.env; rm -r /etc/banger") == "mine\n"
    assert listing(users) == before


def test_root_does_what_an_owner_asks(installed: Hosted) -> None:
    """Under its unit the helper makes tap, NAT, names and snapshot, and they outlive it."""
    active = f"systemctl is-active banger-helper bangerd@{OWNER}"
    assert installed.output(f"{active}; cat /proc/sys/net/ipv4/ip_forward").split() == [
        "active",
        "active",
        "1",
    ]
    routed, kinds = installed.output(ask(OWNER, "make"), SLOW_S).splitlines()
    assert (routed, kinds) == ("True", "bridge loop loop nat snapshot tap")
    restart = "resolvectl dns br-fc; systemctl restart banger-helper"
    assert "127.0.0.1:42069" in installed.output(restart, SLOW_S)
    refused = installed.run(UNINSTALL)
    assert (refused.returncode, "VMs use it still" in refused.stderr) == (1, True)
    assert installed.output(ask(OWNER, "remove"), SLOW_S).splitlines() == [kinds, ""]


def test_an_owners_daemon_writes_in_its_home(installed: Hosted) -> None:
    """The unit of the owner's daemon may write where the daemon keeps its state."""
    lock = f"/home/u{OWNER}/.local/state/banger/daemon.lock"
    pid = f"systemctl show --property MainPID --value bangerd@{OWNER}"
    told = installed.output(f"until [ -s {lock} ]; do sleep 0.5; done; cat {lock}; echo; {pid}").split()
    assert told == [told[0]] * 2


def test_who_is_no_owner_is_refused(installed: Hosted) -> None:
    """A user who is not named is kept out by the group, and by the helper when he is in the group."""
    assert installed.output(ask(STRANGER, "hello")) == "helper-down\n"
    try:
        installed.output(f"usermod --append --groups banger u{STRANGER}")
        assert installed.output(ask(STRANGER, "hello")) == "refused\n"
    finally:
        installed.output(f"gpasswd --delete u{STRANGER} banger")
    assert installed.output(ask(OWNER, "hello")) == f"{OWNER}\n"


def test_doctor_knows_what_was_installed(installed: Hosted) -> None:
    """An owner's doctor finds the helper and the promises kept, and one that a drop-in takes back."""
    doctor = as_user(OWNER, f"{BANGER} doctor --json || true")
    good = checks(installed.output(doctor, SLOW_S))
    assert (good["root's helper"], good["root's files"], good["unit"]) == ("pass", "pass", "pass")
    dropped = "/etc/systemd/system/banger-helper.service.d/open.conf"
    installed.put(dropped, b"[Service]\nNoNewPrivileges=no\n")
    installed.output("systemctl daemon-reload; chmod o+w /usr/lib/banger/venv/pyvenv.cfg")
    bad = checks(installed.output(doctor, SLOW_S))
    away = f"rm -r {dropped.rpartition('/')[0]}; systemctl daemon-reload"
    installed.output(f"{away}; chmod o-w /usr/lib/banger/venv/pyvenv.cfg")
    assert (bad["root's helper"], bad["root's files"], bad["unit"]) == ("pass", "fail", "warn")


def checks(told: str) -> dict[str, str]:
    """Give each check's status; of checks with the same name the worst."""
    rows = json.loads(told)["checks"]
    worst = sorted(rows, key=lambda row: ("pass", "warn", "fail").index(row["status"]))
    return {row["name"]: row["status"] for row in worst}


def test_nothing_is_left(installed: Hosted, before: str) -> None:
    """After it was taken away the host is as it was; a second time there is nothing to take away."""
    installed.output(UNINSTALL, SLOW_S)
    assert listing(installed) == before
    assert "nothing is installed" in installed.run(UNINSTALL).stderr


def listing(host: Hosted) -> str:
    return host.output(LISTING)
