"""The root helper: `python -I -m banger.workers.root`. It imports nothing that acts for an owner."""

from __future__ import annotations

import argparse
import grp
import os
import sys
import traceback
from ipaddress import IPv4Network
from pathlib import Path

import banger
from banger.errors import BangerError, HostLacks
from banger.helper import serve, table
from banger.helper.host import Host
from banger.helper.pool import CRASHED
from banger.helper.requests import check_network
from banger.helper.store import Store
from banger.helper.trusted import check_trusted, check_trusted_file

BRIDGES = IPv4Network("172.31.0.0/16")
"""A network that this host reaches by its default route would be the owner's to imitate: root chooses."""

PACKAGES = ("site-packages", "dist-packages")


def main() -> None:
    """Check where this runs from, then serve until SIGTERM."""
    options = _options()
    try:
        notify = serve.settle()
        _check_rights()
        if options.verify:
            _verify(options.state)
            return
        host = _host(options.firecracker, options.jails, tuple(options.network or [BRIDGES]))
        if options.from_checkout:
            serve.say("running from a checkout: what is run is not checked to be root's own")
        else:
            _check_code()
        place = serve.Place(
            state=options.state,
            runtime=options.runtime,
            owners=options.owner,
            gid=grp.getgrnam(options.group).gr_gid if options.group else None,
        )
        serve.serve(place, table.verbs, host, notify)
    except (BangerError, KeyError) as error:
        raise SystemExit(f"banger root helper: {error}") from None
    except BaseException:
        # The thread that carries out requests would keep a process alive that serves nobody.
        traceback.print_exc()
        os._exit(CRASHED)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="banger.workers.root", description="Do what only root can.")
    parser.add_argument("--state", required=True, metavar="DIR", help="made 0700 if need be")
    parser.add_argument("--runtime", required=True, metavar="DIR", help="holds the socket; made 0755")
    parser.add_argument("--owner", action="append", type=int, default=[], metavar="UID", help="who may ask")
    parser.add_argument("--group", metavar="NAME", help="only its members can connect")
    parser.add_argument(
        "--network",
        action="append",
        type=check_network,
        metavar="CIDR",
        help=f"what bridges may have parts of; {BRIDGES} unless given",
    )
    parser.add_argument("--firecracker", metavar="DIR", default="/usr/lib/banger/firecracker")
    parser.add_argument("--jails", metavar="DIR", default="/srv/banger-jails")
    parser.add_argument("--from-checkout", action="store_true", help="for tests: do not check the code")
    parser.add_argument("--verify", action="store_true", help="check the audit log, and end")
    return parser.parse_args()


def _check_rights() -> None:
    if os.getuid() != 0 or os.geteuid() != 0:
        raise HostLacks("The root helper must run as root.")


def _check_code() -> None:
    """Raise HostLacks unless all that was imported, and the interpreter, can only be root's own doing."""
    parent = Path(banger.__path__[0]).parent.name
    if parent not in PACKAGES:
        raise HostLacks(
            "The root helper does not run from a checkout: its owner could change it.",
            hint="Install the package for root, or, in tests only, give --from-checkout.",
        )
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    for file in sorted(file for file in files if file):
        check_trusted_file(file)  # Debian's sitecustomize.py is a link
    check_trusted(str(Path("/proc/self/exe").readlink()))


def _verify(state: str) -> None:
    count, bad = Store(state).verify()
    if bad is not None:
        raise SystemExit(f"banger root helper: audit line {bad} is not what was written")
    serve.say(f"{count} audit lines, each as it was written")


def _host(firecracker: str, jails: str, networks: tuple[IPv4Network, ...]) -> Host:
    """Give the real one. It is imported here: nobody else needs pyroute2, which is slow to import."""
    from banger.helper.devicemapper import KernelDisks
    from banger.helper.jailer import Jailer
    from banger.helper.netlink import KernelNet
    from banger.helper.resolved import Resolved

    return Host(
        net=KernelNet(),
        disks=KernelDisks(),
        jails=Jailer(firecracker, jails),
        resolver=Resolved(),
        networks=networks,
    )


if __name__ == "__main__":
    main()
