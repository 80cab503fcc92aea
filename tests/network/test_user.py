from __future__ import annotations

import socket
from pathlib import Path

import pytest

from banger.errors import HostLacks
from banger.network import user


def ephemeral() -> range:
    low, high = (int(number) for number in user.EPHEMERAL_RANGE.read_text().split())
    return range(low, high + 1)


def claim_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low: int, high: int) -> None:
    """Let the kernel's ephemeral range seem to be this one."""
    file = tmp_path / "ip_local_port_range"
    file.write_text(f"{low}\t{high}\n")
    monkeypatch.setattr(user, "EPHEMERAL_RANGE", file)


def test_a_picked_port_can_be_listened_on() -> None:
    """The port is free, and no outgoing connection will be given it."""
    port = user.pick_port(set())
    assert port not in ephemeral()
    socket.create_server(("127.0.0.1", port)).close()


def test_a_taken_port_is_not_picked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ports, one in the ledger and one in use, neither is picked; then there is none."""
    free = user.pick_port(set())
    with socket.create_server(("127.0.0.1", free)):
        monkeypatch.setattr(user, "LOWEST_PORT", free)
        claim_range(tmp_path, monkeypatch, free + 1, 60_999)
        with pytest.raises(HostLacks):
            user.pick_port(set())
    assert user.pick_port(set()) == free
    with pytest.raises(HostLacks):
        user.pick_port({free})


def test_a_port_of_all_addresses_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener on every address has the port of 127.0.0.1 too."""
    with socket.create_server(("0.0.0.0", 0)) as listener:  # noqa: S104 (this is the case in question)
        port = listener.getsockname()[1]
        monkeypatch.setattr(user, "LOWEST_PORT", port)
        claim_range(tmp_path, monkeypatch, port + 1, port + 2)
        with pytest.raises(HostLacks):
            user.pick_port(set())


@pytest.mark.parametrize(
    ("low", "high", "first", "last"),
    [
        (32_768, 60_999, 20_000, 32_767),
        (1_024, 60_999, 61_000, 65_535),
        (1_024, 65_535, 20_000, 65_535),
    ],
)
def test_ports_are_outside_of_the_ephemeral_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low: int, high: int, first: int, last: int
) -> None:
    """Ports come from below the ephemeral range, else from above, else from anywhere."""
    claim_range(tmp_path, monkeypatch, low, high)
    assert first <= user.pick_port(set()) <= last
    with pytest.raises(HostLacks):
        user.pick_port(range(first, last + 1))


def test_a_mac_is_derived_and_local() -> None:
    """A MAC is the same for the same VM, differs between VMs, is unicast and locally administered."""
    macs = {user.mac(f"vm-{number:08x}") for number in range(5000)}
    assert len(macs) == 5000
    assert user.mac("vm-1") == user.mac("vm-1")
    assert all(int(mac[:2], 16) & 0b11 == 0b10 for mac in macs)
    assert all(len(mac.split(":")) == 6 for mac in macs)
