"""Names of VMs for programs that know nothing of banger: `NAME.vm`, answered from the projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger import config
from banger import log as logging
from banger.errors import NotFound
from banger.events import queries
from banger.events.log import EventLog

if TYPE_CHECKING:
    from banger.network.dns import Server


async def start(log: EventLog, settings: config.Config) -> Server | None:
    """Start the server if it is wanted; None when it is not, or when its port is taken.

    VMs work without their names: a daemon that cannot have the port says so in its log and goes on.
    """
    if not config.dns_wanted(settings):
        return None
    from banger.network import dns  # dnspython takes 3 MB, of a daemon that may never be asked

    server = dns.Server(dns.Names(address=lambda name: address(log, name), name=lambda at: name_at(log, at)))
    try:
        await server.listen(settings.dns_port)
    except OSError as error:
        logging.get().warning("names are not answered", port=settings.dns_port, error=error.strerror)
        return None
    logging.get().info("names are answered", port=settings.dns_port)
    return server


def address(log: EventLog, name: str) -> str | None:
    """Give the IPv4 address of the VM with this name; None when there is no such VM, or it has none."""
    try:
        vm = queries.find_vm(log, name)
    except NotFound:
        return None
    if vm.spec.name != name:
        return None  # it was found by its id
    return vm.address


def name_at(log: EventLog, ip: str) -> str | None:
    """Give the name of the VM that has this IPv4 address."""
    return next((vm.spec.name for vm in queries.vms(log) if vm.address == ip), None)
