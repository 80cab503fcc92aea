"""The kernel's network, by netlink: rtnetlink(7), tun.txt of the kernel, and nf_tables through `nftables.py`.

Each thread has sockets of its own, opened at its first request, and anew after an error: what had not
been read when it came would be taken for an answer to the next request.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

from banger.helper import nftables
from banger.helper.net import Link, Located, Route, Rule, Wanted

Message = Any
"""A netlink message as pyroute2 gives it."""

TRIES = 5
"""How often a listing is asked for again that others changed while it was read."""

# linux/if_tun.h
TUNSETIFF, TUNSETPERSIST, TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
IFF_TAP, IFF_NO_PI, IFF_TUN_EXCL = 0x0002, 0x1000, 0x8000
IFREQ = struct.Struct("16sH22x")

RESOLV_CONF = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")
MAX_RESOLV_CONF = 64 * 1024

IFF_UP = 0x1
RT_TABLE_MAIN = 254
RTN_BROADCAST, RTN_MULTICAST = 3, 5


class KernelNet:
    """The `Net` of the network namespace in which it is used."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def close(self) -> None:
        """Close the sockets of this thread; the next request opens them anew."""
        mine = vars(self._of_thread)
        for name in list(mine):
            mine.pop(name).close()

    # -- what there is -------------------------------------------------------------------------

    def link(self, name: str) -> Link | None:
        """Give the interface with this name, if there is one."""
        with _gone_is_fine(), self._rtnl() as rtnl:
            return _link(rtnl.link("get", ifname=name)[0])
        return None

    def links(self) -> list[Link]:
        """List all interfaces."""
        return [_link(message) for message in self._dump(lambda rtnl: rtnl.get_links())]

    def addresses(self) -> list[Located]:
        """List all IPv4 addresses."""
        found = self._dump(lambda rtnl: rtnl.get_addr(family=socket.AF_INET))
        return [Located(link=message["index"], address=_address(message)) for message in found]

    def routes(self) -> list[Route]:
        """List all IPv4 routes, of all tables, without those for broadcast and multicast."""
        return [
            Route(link=message.get_attr("RTA_OIF"), network=_network(message))
            for message in self._routes()
            if message["type"] not in (RTN_BROADCAST, RTN_MULTICAST)
        ]

    def resolvers(self) -> list[IPv4Address]:
        """List the servers that this host asks for names (resolv.conf(5)), also by systemd-resolved."""
        return [address for path in RESOLV_CONF for address in _nameservers(path)]

    def default_egress(self) -> str | None:
        """Name the interface of the best default route of the main table, if there is one."""
        found = [
            (message.get_attr("RTA_PRIORITY") or 0, message.get_attr("RTA_OIF"))
            for message in self._routes()
            if message["dst_len"] == 0
            and message.get_attr("RTA_TABLE") == RT_TABLE_MAIN
            and message.get_attr("RTA_OIF")
        ]
        return socket.if_indextoname(min(found)[1]) if found else None

    def forwards(self) -> bool:
        """Tell whether this host forwards IPv4 (net.ipv4.ip_forward)."""
        with _opened("/proc/sys/net/ipv4/ip_forward", os.O_RDONLY) as fd:
            return os.read(fd, 8).strip() == b"1"

    # -- interfaces ----------------------------------------------------------------------------

    def make_bridge(self, name: str, mac: str) -> None:
        """Make a bridge with this MAC address, which it has from its first moment; it is down."""
        with self._rtnl() as rtnl:
            rtnl.link("add", ifname=name, kind="bridge", address=mac)

    def set_alias(self, index: int, alias: str) -> None:
        """Give an interface its alias."""
        with self._rtnl() as rtnl:
            rtnl.link("set", index=index, IFLA_IFALIAS=alias)

    def add_address(self, index: int, address: IPv4Interface) -> None:
        """Give an interface one more address."""
        with self._rtnl() as rtnl:
            rtnl.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)

    def set_up(self, index: int) -> None:
        """Let an interface carry packets."""
        with self._rtnl() as rtnl:
            rtnl.link("set", index=index, state="up")

    def make_tap(self, name: str, uid: int, alias: str, bridge: int) -> None:
        """Make a persistent tap; until it is marked and on the bridge, it goes when its descriptor does."""
        with _opened("/dev/net/tun", os.O_RDWR) as fd:
            fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(name.encode("ascii"), IFF_TAP | IFF_NO_PI | IFF_TUN_EXCL))
            fcntl.ioctl(fd, TUNSETOWNER, uid)
            with self._rtnl() as rtnl:
                index = socket.if_nametoindex(name)
                rtnl.link("set", index=index, IFLA_IFALIAS=alias, master=bridge, state="up")
            fcntl.ioctl(fd, TUNSETPERSIST, 1)

    def attach(self, index: int, bridge: int) -> None:
        """Put an interface of ours on a bridge, and up."""
        with self._rtnl() as rtnl:
            rtnl.link("set", index=index, master=bridge, state="up")

    def remove_link(self, index: int) -> None:
        """Remove an interface; one that is gone is no error."""
        with _gone_is_fine(), self._rtnl() as rtnl:
            rtnl.link("del", index=index)

    # -- rules ---------------------------------------------------------------------------------

    def rules(self) -> list[Rule]:
        """List the rules of our table; none when there is no table."""
        with self._nft() as nft:
            return [nftables.rule(message) for message in nft.request_get(*nftables.listing())]

    def change_rules(self, *, add: Sequence[Wanted] = (), remove: Sequence[Rule] = ()) -> None:
        """Remove rules and add others, all at once or not at all; make the table if need be."""
        with self._nft() as nft:
            nft.nlm_request_batch(nftables.change(add, remove))

    def remove_table(self) -> None:
        """Remove our table with all that is in it; one that is gone is no error."""
        with _gone_is_fine(), self._nft() as nft:
            nft.nlm_request_batch(nftables.removal())

    # -- sockets -------------------------------------------------------------------------------

    def _routes(self) -> list[Message]:
        return self._dump(lambda rtnl: rtnl.get_routes(family=socket.AF_INET))

    def _dump(self, ask: Callable[[Any], Iterable[Message]]) -> list[Message]:
        for _ in range(TRIES):
            with contextlib.suppress(NetlinkDumpInterrupted), self._rtnl() as rtnl:
                return list(ask(rtnl))
        raise OSError(errno.EAGAIN, "the network changes faster than it can be listed")

    def _rtnl(self) -> contextlib.AbstractContextManager[Any]:
        # With groups it would be sent each change on this host and keep them all, unread.
        return self._socket("rtnl", lambda: IPRoute(groups=0))

    def _nft(self) -> contextlib.AbstractContextManager[Any]:
        return self._socket("nft", nftables.opened)

    @contextlib.contextmanager
    def _socket(self, name: str, opened: Callable[[], Any]) -> Iterator[Any]:
        mine = vars(self._of_thread)
        if name not in mine:
            mine[name] = opened()
        try:
            yield mine[name]
        except BaseException as error:
            mine.pop(name).close()
            if isinstance(error, NetlinkError) and not isinstance(error, NetlinkDumpInterrupted):
                raise OSError(error.code, os.strerror(error.code)) from error
            raise


@contextlib.contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.ENOENT):
            raise


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _nameservers(path: str) -> Iterator[IPv4Address]:
    with contextlib.suppress(FileNotFoundError), _opened(path, os.O_RDONLY) as fd:
        for line in os.read(fd, MAX_RESOLV_CONF).decode("ascii", "replace").splitlines():
            with contextlib.suppress(ValueError):
                match line.split():
                    case ["nameserver", address, *_]:
                        yield IPv4Address(address)


def _link(message: Message) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=info.get_attr("IFLA_INFO_KIND") if info else None,
        mac=message.get_attr("IFLA_ADDRESS"),
        alias=message.get_attr("IFLA_IFALIAS"),
        master=message.get_attr("IFLA_MASTER"),
        up=bool(message["flags"] & IFF_UP),
    )


def _address(message: Message) -> IPv4Interface:
    # IFA_ADDRESS is the other end of a point-to-point link (rtnetlink(7)).
    own = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    return IPv4Interface(f"{own}/{message['prefixlen']}")


def _network(message: Message) -> IPv4Network:
    # A default route has no RTA_DST (rtnetlink(7)).
    first = message.get_attr("RTA_DST") or IPv4Address(0)
    return IPv4Network(f"{first}/{message['dst_len']}", strict=False)
