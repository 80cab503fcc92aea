from __future__ import annotations

from ipaddress import IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import HostLacks
from banger.helper.requests import NARROWEST, PRIVATE, WIDEST, check_address, check_network
from banger.network import plan, user

VM = "vm-1"


@st.composite
def networks(draw: st.DrawFn) -> IPv4Network:
    """Any network that a bridge may have."""
    private = draw(st.sampled_from(PRIVATE))
    prefix_length = draw(st.integers(max(WIDEST, private.prefixlen), NARROWEST))
    number = draw(st.integers(0, 2 ** (prefix_length - private.prefixlen) - 1))
    return IPv4Network((private[number * 2 ** (32 - prefix_length)], prefix_length))


@st.composite
def places(draw: st.DrawFn) -> tuple[IPv4Network, int]:
    network = draw(networks())
    return network, draw(st.integers(0, plan.room(network) - 1))


@given(places())
def test_a_place_is_inside_and_nobody_elses(where: tuple[IPv4Network, int]) -> None:
    """A VM's address is in the network, and neither that's own, the host's nor the broadcast address."""
    network, index = where
    place = plan.place(network, index)
    assert place.address in network
    assert place.address not in (network.network_address, place.gateway, network.broadcast_address)
    assert (place.gateway, place.prefix_length) == (network[1], network.prefixlen)


@given(places())
def test_an_address_tells_its_place(where: tuple[IPv4Network, int]) -> None:
    """The number of a place follows from its address."""
    network, index = where
    assert plan.index_of(network, plan.place(network, index).address) == index


@given(places())
def test_root_takes_what_the_plan_gives(where: tuple[IPv4Network, int]) -> None:
    """The helper's checks let every planned network and address through."""
    network, index = where
    assert check_network(str(network)) == network
    assert check_address(str(plan.place(network, index).address)) == plan.place(network, index).address


@given(networks().filter(lambda network: network.prefixlen >= 22))
def test_a_network_is_used_up(network: IPv4Network) -> None:
    """The places of a network differ, and with the host's address they are all of its hosts."""
    addresses = [plan.place(network, index).address for index in range(plan.room(network))]
    assert [network[1], *addresses] == list(network.hosts())


@given(networks(), st.sampled_from(["below", "above"]))
def test_there_are_no_other_places(network: IPv4Network, side: str) -> None:
    """A number that a network has no place for is an error."""
    with pytest.raises(ValueError, match="no place"):
        plan.place(network, -1 if side == "below" else plan.room(network))


@given(networks().filter(lambda network: network.prefixlen >= 24), st.data())
def test_a_picked_number_is_free(network: IPv4Network, data: st.DataObject) -> None:
    """A number is picked as long as there is one, and never one that is taken."""
    free = data.draw(st.sets(st.integers(0, plan.room(network) - 1)))
    taken = set(range(plan.room(network))) - free
    if free:
        assert plan.pick_index(network, VM, taken) in free
    else:
        with pytest.raises(HostLacks):
            plan.pick_index(network, VM, taken)


def test_a_vm_gets_its_number_again() -> None:
    """A VM's number follows from its id, so it keeps its address, and VMs seldom want the same one."""
    network = IPv4Network("10.20.0.0/16")
    picked = [plan.pick_index(network, f"vm-{number}", ()) for number in range(100)]
    assert picked == [plan.pick_index(network, f"vm-{number}", ()) for number in range(100)]
    assert len(set(picked)) > 95


def test_a_mac_is_the_same_in_every_network() -> None:
    """A guest keeps its MAC address when its network is another one."""
    assert plan.mac("vm-1") == user.mac("vm-1")
