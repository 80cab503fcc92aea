from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import banger
from banger.config import Config, find_dirs
from banger.doctor import bridge, installed, root
from banger.doctor.findings import Check, Host
from banger.testing.root_pool import RootPool
from tests.helper import netns
from tests.helper.conftest import NEEDS_ROOT
from tests.helper.conftest import rooted as rooted

CHAIN = "nft add chain inet filter forward { type filter hook forward priority 0 ; policy %s ; }"


def host(tmp_path: Path, **settings: object) -> Host:
    """A host whose helper is asked at a socket that nobody has, unless the settings say otherwise."""
    dirs = find_dirs({"HOME": str(tmp_path / "home"), "XDG_RUNTIME_DIR": "/tmp/banger-none"})
    return Host(dirs=dirs, config=Config(**{"root_socket": str(tmp_path / "none"), **settings}))  # type: ignore[arg-type]


def statuses(checks: Iterator[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


@pytest.fixture
def alone() -> Iterator[None]:
    """Be in a network namespace with nothing but a loopback."""
    with netns.entered():
        yield


def test_a_host_without_the_helper_lacks_nothing(tmp_path: Path) -> None:
    """Without the helper all that is root's passes, and is said not to be needed."""
    checks = [*root.examine(host(tmp_path)), *bridge.examine(host(tmp_path))]
    assert statuses(iter(checks)) == {"root's helper": "pass", "root disks": "pass"}
    assert checks[0].detail == "not installed, not needed: VMs have QEMU's own network"


def test_a_bridge_without_the_helper_fails(tmp_path: Path) -> None:
    """Settings that put VMs on a bridge fail where nobody can make one, with the way to install it."""
    check, _ = root.examine(host(tmp_path, network="bridge"))
    assert (check.status, check.hint) == ("fail", installed.INSTALL)


def test_a_helper_that_is_gone_is_told(tmp_path: Path) -> None:
    """A socket at which nobody listens is a warning, and a failure where VMs need it."""
    (tmp_path / "none").touch()
    for network, status in (("user", "warn"), ("bridge", "fail")):
        check, _ = root.examine(host(tmp_path, network=network))
        assert (check.status, check.name) == (status, "root's helper")
        assert check.hint is not None


@NEEDS_ROOT
def test_what_the_helper_tells_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The helper is asked once; another version than ours, and an egress that is not there, are warned of."""
    with RootPool() as pool:
        asked = {"root_socket": str(pool.socket), "egress": "lo", "root_disk": "snapshot"}
        good = statuses(root.examine(host(tmp_path, **asked)))
        assert good == dict.fromkeys(good, "pass")
        assert {"tun device", "forwarding", "way out", "device-mapper", "Firecracker"} < good.keys()
        monkeypatch.setattr(banger, "__version__", "0.0.9")
        bad = statuses(root.examine(host(tmp_path, **{**asked, "egress": "none0"})))
        assert {name for name in bad if bad[name] == "warn"} == {"root's helper", "way out"}


def test_snapshots_that_cannot_be_made_fail(tmp_path: Path) -> None:
    """Root disks that take a helper fail without one; the way out is named."""
    _, check = root.examine(host(tmp_path, root_disk="snapshot"))
    assert (check.name, check.status) == ("root disks", "fail")
    assert check.hint is not None
    assert "overlay" in check.hint


@NEEDS_ROOT
def test_an_overlapping_network_is_found(tmp_path: Path, alone: None) -> None:
    """A network that another interface leads to fails; the bridge's own and half a default route pass."""
    netns.run("ip link add lan type bridge")
    netns.run("ip link set lan up")
    netns.run("ip addr add 172.31.5.1/24 dev lan")
    netns.run("ip route add 128.0.0.0/1 dev lan")
    wanted = {"network": "bridge", "bridge_network": "172.31.0.0/16"}
    check, *_ = bridge.examine(host(tmp_path, **wanted))
    assert check.status == "fail"
    assert check.detail == "172.31.0.0/16 overlaps with 172.31.5.0/24, to which lan leads"
    own, *_ = bridge.examine(host(tmp_path, **wanted, bridge="lan"))
    other, *_ = bridge.examine(host(tmp_path, **{**wanted, "bridge_network": "172.30.0.0/16"}))
    assert [own.status, other.status] == ["pass", "pass"]


@NEEDS_ROOT
def test_a_firewall_that_drops_is_found(tmp_path: Path, alone: None) -> None:
    """A chain whose policy for what is forwarded is drop is warned of, until what the hint says was done."""
    netns.run("nft add table inet filter")
    netns.run(CHAIN % "accept")
    assert named_firewalls(tmp_path) == {"none seen that drops what is forwarded": "pass"}
    netns.run(CHAIN % "drop")
    (warned,) = (check for check in bridge.examine(on_bridge(tmp_path)) if check.status != "pass")
    assert warned.detail.startswith("nftables' chain inet filter forward drops")
    assert warned.hint is not None
    subprocess.run(["sh", "-euc", warned.hint.partition("As root: ")[2]], check=True, timeout=20)
    assert set(named_firewalls(tmp_path).values()) == {"pass"}


def on_bridge(tmp_path: Path) -> Host:
    return host(tmp_path, network="bridge", bridge="br-fc-doc", bridge_network="172.29.0.0/16")


def named_firewalls(tmp_path: Path) -> dict[str, str]:
    """Give what is said of firewalls, but of those that this machine may have."""
    found = [check for check in bridge.examine(on_bridge(tmp_path)) if check.name == "firewall"]
    return {check.detail: check.status for check in found}


@pytest.mark.parametrize(
    ("settings", "defaults", "drops"),
    [
        ("ENABLED=yes\n", 'DEFAULT_FORWARD_POLICY="DROP"\n', True),
        ("ENABLED=yes\n", 'DEFAULT_FORWARD_POLICY="ACCEPT"\n', False),
        ("ENABLED=no\n", 'DEFAULT_FORWARD_POLICY="DROP"\n', False),
        ("", "", False),
    ],
)
def test_ufw_is_known_by_its_settings(settings: str, defaults: str, drops: bool) -> None:
    """An ufw that is enabled drops what is forwarded unless its default says otherwise."""
    assert bridge._ufw_drops(settings, defaults) is drops


@NEEDS_ROOT
def test_what_others_may_change_is_found(rooted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of root's that others may write to, and a state that others may read, are failures."""
    for name in ("UNITS", "ENVIRONMENT", "STATE"):
        monkeypatch.setattr(installed, name, rooted / name.lower())
        (rooted / name.lower()).mkdir(mode=0o700)
    (rooted / "units" / installed.UNIT).touch()
    (library := rooted / "environment" / "library.py").touch()
    assert files(rooted) == ("pass", None)
    library.chmod(0o666)
    assert files(rooted) == ("fail", f"{library} is not root's only")
    library.chmod(0o644)
    (rooted / "state").chmod(0o750)
    assert files(rooted) == ("fail", f"{rooted / 'state'} has owner 0 and mode 0750, not 0 and 0700")


def files(rooted: Path) -> tuple[str, str | None]:
    """Give how the check of root's files ended, and what it found wrong."""
    check = next(check for check in installed.examine(host(rooted)) if check.name == "root's files")
    return check.status, None if check.status == "pass" else check.detail


def test_a_promise_taken_back_is_found() -> None:
    """What systemd tells of a unit is compared; what it does not tell is not taken for kept."""
    promises = installed.PROMISES[installed.UNIT]
    told = "".join(f"{key}={value}\n" for key, value in promises.items())
    assert installed._broken(promises, told) == []
    opened = told.replace("ProtectSystem=strict", "ProtectSystem=no").replace("DevicePolicy=closed\n", "")
    assert installed._broken(promises, opened) == ["ProtectSystem=no", "DevicePolicy=?"]
