"""VMs on Firecracker in jails: the stand-ins of it and of its jailer, a real root helper, real guests."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import proc
from banger.helper import client
from banger.helper.jails import UIDS
from banger.helper.requests import JailConnect, JailLaunch, JailRemove, Request
from banger.tasks import root
from banger.testing import firecracker_jailed, firecracker_rules, jailer
from banger.testing.bridged import Bridged
from banger.vmm import vsock

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(not shutil.which("nft"), reason="nft, which looks at the rules, is not installed"),
    pytest.mark.skipif(
        firecracker_rules.description() is None,
        reason=f"Firecracker's API description is not here: {firecracker_rules.ENVIRON} names it",
    ),
]

FIRECRACKER = 'vmm = "firecracker"\n'
GONE_S = 20.0


class Jailing(Bridged):
    """A home whose helper has the two stand-ins."""

    @property
    def jails(self) -> Path:
        """Where the jails are, each with a directory of its own."""
        return self.place / "jails" / "firecracker"

    def start_helper(self, *more: str) -> None:
        """Start the helper with the stand-ins."""
        programs = self.place / "bin"
        if not programs.exists():
            programs.mkdir(mode=0o755)
            jailer.install(programs)
            firecracker_jailed.install(programs)
        super().start_helper("--firecracker", str(programs), *more)

    def close(self) -> None:
        """Have the jails removed that a failed test has left: no process in one has a mark of ours."""
        if self.helper is not None and self.helper.poll() is not None:
            self.start_helper()
        for made in root.made(root.Pool(self.socket)):
            if made.kind == "jail":
                ask = JailRemove(vm=made.vm)
                client.ask(self.socket, Request(op="op-end", step="end", epoch=1, key=made.id, ask=ask))
        super().close()


@pytest.fixture(scope="module")
def home() -> Iterator[Jailing]:
    with Jailing(more=FIRECRACKER) as home:
        yield home


@pytest.fixture(scope="module")
def before(home: Jailing) -> dict[str, object]:
    """What there was in the namespace before the first VM."""
    return home.listing()


@pytest.fixture(scope="module")
def made(home: Jailing, before: dict[str, object]) -> str:
    done = home.banger("vm", "create", "web", "--wait")
    assert done.returncode == 0, done.stderr
    return "web"


@pytest.fixture
def web(home: Jailing, made: str) -> str:
    """The name of a VM that runs."""
    done = home.banger("vm", "start", made)
    assert done.returncode == 0, done.stderr
    return made


def is_clean(home: Jailing) -> bool:
    audited = home.json("ops", "audit")
    return (audited["leaked"], audited["missing"], audited["unseen"]) == ([], [], None)


def test_a_guest_runs_in_a_jail(home: Jailing, web: str) -> None:
    """It answers over SSH; its VMM is the jail's user's, and its jail is in the ledger and in root's."""
    assert home.banger("vm", "exec", web, "--", "grep", "-o", "reboot=k", "/proc/cmdline").returncode == 0
    vm = home.json("vm", "show", web)["vm"]
    assert vm["vmm"] == "firecracker"
    assert "Running in background" in home.banger("vm", "logs", web).stdout, "the SSH server says so"
    assert Path(f"/proc/{vm['pid']}").stat().st_uid in UIDS
    (jail,) = [each["id"] for each in vm["resources"] if each["kind"] == "jail"]
    assert [path.name for path in home.jails.iterdir()] == [jail]
    assert is_clean(home)


def test_root_tells_of_the_jail(home: Jailing, web: str) -> None:
    """`ops show` has the launch among root's lines, under the step that asked for it."""
    (op,) = [op["id"] for op in home.json("ops", "list")["ops"] if op["kind"] == "vm.create"]
    told = home.json("ops", "show", op)["op"]["root"]
    lines = [(line["verb"], line["outcome"]) for line in told if line["step"] == "jail"]
    assert lines == [("jail.launch", "ok"), ("jail.connect", "ok")]
    assert web in home.banger("ops", "show", op).stdout


def test_the_agent_is_reached_through_root(home: Jailing, web: str) -> None:
    """The jail's vsock socket, connected by root, leads to the agent in the guest."""
    vm = home.json("vm", "show", web)["vm"]["id"]
    asked = Request(op="op-0", step="ask", epoch=1, key="ask", ask=JailConnect(vm=vm, socket="vsock"))

    def dial() -> socket.socket:
        return socket.socket(fileno=client.ask(home.socket, asked).fds[0])

    with vsock.connect(dial, vsock.AGENT_PORT, 10) as channel:
        channel.sendall(b"ping\n")
        assert channel.recv(100) == b"pong\n"


def test_a_vm_is_stopped_by_what_it_was_started_with(home: Jailing, web: str) -> None:
    """After the configuration says QEMU it still powers off by itself, and its jail is gone."""
    settings = home.dirs.config / "config.toml"
    was = settings.read_text()
    try:
        settings.write_text(was.replace(FIRECRACKER, 'vmm = "qemu"\n'))
        assert home.banger("daemon", "stop").returncode == 0
        op = home.json("vm", "stop", web)["op"]
        assert home.banger("ops", "follow", op).returncode == 0
        steps = home.json("ops", "show", op)["op"]["steps"]
        (how,) = [step["facts"]["how"] for step in steps if step["name"] == "shut-down"]
        assert how == "power-off over SSH"
        assert list(home.jails.iterdir()) == []
        assert is_clean(home)
        assert "reboot: " in home.banger("vm", "logs", web).stdout
    finally:
        settings.write_text(was)
        home.banger("daemon", "stop")


def test_a_vm_outlives_the_helper(home: Jailing, web: str) -> None:
    """Without the helper a guest goes on, and nothing of its own is called missing; a new helper knows it."""
    was = home.vmm(web)
    home.end_helper()
    assert home.banger("vm", "exec", web, "--", "true").returncode == 0
    audited = home.json("ops", "audit")
    assert (audited["leaked"], audited["missing"]) == ([], [])
    assert "root helper" in audited["unseen"]
    home.start_helper()
    assert is_clean(home)
    assert home.vmm(web) == was


def test_a_vmm_that_is_killed_is_buried(home: Jailing, web: str) -> None:
    """What a Firecracker held that died by itself is released: jail, loop devices, tap."""
    proc.kill(home.vmm(web))
    assert home.banger("vm", "list", "-a").returncode == 0
    for _ in range(int(GONE_S)):
        bury = next((op for op in home.json("ops", "list")["ops"] if op["kind"] == "vm.bury"), None)
        if bury is not None:
            home.banger("ops", "follow", bury["id"])
            break
        home.run_inside("sleep", "1")
    vm = home.json("vm", "show", web)["vm"]
    assert (vm["state"], vm["vmm"]) == ("stopped", None)
    assert "its VMM ended by itself" in vm["reason"]
    assert list(home.jails.iterdir()) == []
    assert is_clean(home)


def test_a_jail_that_is_nobodys_is_found_and_removed(home: Jailing) -> None:
    """A Firecracker that root runs for a VM that the log does not know is a leak, and is ended."""
    launch = Request(
        op="op-stray", step="jail", epoch=1, key="stray", ask=JailLaunch(vm="vm-stray000", disks=0)
    )
    with tempfile.NamedTemporaryFile(dir=home.path) as file:
        file.write(b"a kernel")
        file.flush()
        facts = client.ask(home.socket, launch, [file.fileno(), file.fileno()]).facts
    (leak,) = home.json("ops", "audit")["leaked"]
    assert (leak["kind"], leak["vm"]) == ("jail", "vm-stray000")
    assert home.banger("ops", "audit", "--fix").returncode == 0
    assert is_clean(home)
    assert proc.identify(facts["pid"]) is None


def test_the_doctor_tells_its_version(home: Jailing) -> None:
    """`doctor` has the helper's Firecracker, and the versions that the requests were checked for."""
    (check,) = [each for each in home.json("doctor")["checks"] if each["name"] == "Firecracker"]
    assert check["detail"].startswith("1.13.2, checked for 1.5.0 to ")


def test_a_network_of_its_own_is_refused(home: Jailing) -> None:
    """Firecracker has taps only: a VM on QEMU's own network is refused at once, with the way out."""
    done = home.banger("vm", "create", "--network", "user")
    assert done.returncode == 2, done.stderr
    assert "--network bridge" in done.stderr


def test_nothing_is_left_of_a_vm(home: Jailing, before: dict[str, object], web: str) -> None:
    """After `vm kill` and `vm delete` there is no jail, and links and rules are what they were."""
    assert home.banger("vm", "kill", web).returncode == 0
    assert home.banger("vm", "delete", web).returncode == 0
    assert home.listing() == before
    assert list(home.jails.iterdir()) == []
    audited = home.json("ops", "audit")
    assert (audited["held"], audited["leaked"], audited["missing"]) == (0, [], [])
