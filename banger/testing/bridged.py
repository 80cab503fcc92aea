"""A banger whose VMs are on a bridge: in a network namespace of its own, with a real root helper beside it.

Beyond the namespace there is another one, the world, which knows only the address that the first has in it.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from banger.config import ROOT_SOCKET
from banger.helper import serve, table
from banger.helper.host import SEAMS, Host
from banger.images import debian, kernel
from banger.testing.home import Home
from banger.testing.root_pool import START_S, TRUSTED, Deadly, Watched

OUTSIDE, WORLD = "192.0.2.1", "192.0.2.2"
"""The host's address in the world, and the world's own (TEST-NET-1 of RFC 5737)."""

SETTINGS = """\
memory_mib = 256
network = "bridge"
dns = true
root_socket = "{socket}"
"""


class Bridged(Home):
    """A home in a namespace, with a helper and the world; needs root, and iproute2."""

    def __init__(self, *, pipelines: str | None = None, more: str = ""):
        super().__init__(pipelines=pipelines)
        # The namespace leads to nobody who has packages.
        kernel.build(kernel.RECIPES["debian-12"], self.dirs.cache)
        debian.build(debian.RECIPES["debian-12"], self.dirs.cache)
        self.place = Path(tempfile.mkdtemp(prefix="bgb-", dir=TRUSTED))
        self.place.chmod(0o755)
        self.socket = self.place / "run" / ROOT_SOCKET.name
        name = secrets.token_hex(3)
        self.inside, self.world = f"bg-{name}", f"bgw-{name}"
        self.helper: subprocess.Popen[str] | None = None
        self.configure(SETTINGS.format(socket=self.socket) + more)
        self._lay_out()
        self.start_helper()

    def argv(self, *words: str) -> list[str]:
        """Give the command line's whole argv, in the namespace."""
        return ["ip", "netns", "exec", self.inside, *super().argv(*words)]

    def run_inside(self, *words: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run a program in the namespace."""
        return _run("ip", "netns", "exec", self.inside, *words, timeout_s=timeout_s)

    def listing(self) -> dict[str, Any]:
        """List links, addresses, routes and rules of the namespace, as other programs see them."""
        seen = {
            "links": ("ip", "-j", "-d", "link"),
            "addresses": ("ip", "-j", "address"),
            "routes": ("ip", "-j", "route", "show", "table", "all"),
            "rules": ("nft", "-j", "list", "ruleset"),
        }
        return {what: json.loads(self.run_inside(*words).stdout) for what, words in seen.items()}

    def start_helper(self, *more: str) -> None:
        """Start the helper, and wait until it listens; with `--die-at N` it dies at its Nth boundary."""
        self.helper = subprocess.Popen(
            [
                "ip", "netns", "exec", self.inside,
                sys.executable, "-I", "-m", __name__, str(self.place),
                "--owner", str(os.getuid()),
                *more,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert self.helper.stdout is not None
        line = self.helper.stdout.readline()
        assert line.startswith("listening"), line

    def end_helper(self) -> None:
        """Kill the helper, if it has not ended by itself."""
        if self.helper is not None:
            self.helper.kill()
            self.wait_helper()

    def wait_helper(self) -> int:
        """Wait for the helper's end; give its exit status, minus a signal's number."""
        assert self.helper is not None
        assert self.helper.stdout is not None
        status = self.helper.wait(START_S)
        self.helper.stdout.close()
        return status

    def close(self) -> None:
        """End what still runs here and remove the namespaces and the directories."""
        super().close()
        self.end_helper()
        for namespace in (self.inside, self.world):
            _must("ip", "netns", "delete", namespace)
        shutil.rmtree(self.place)

    def _lay_out(self) -> None:
        """Make both namespaces and the way between them; this one forwards, as root has decided."""
        for namespace in (self.inside, self.world):
            _must("ip", "netns", "add", namespace)
            _must("ip", "-n", namespace, "link", "set", "lo", "up")
        pair = ("wan", "type", "veth", "peer", "lan", "netns", self.world)
        _must("ip", "-n", self.inside, "link", "add", *pair)
        for namespace, link, address in ((self.inside, "wan", OUTSIDE), (self.world, "lan", WORLD)):
            _must("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", link)
            # An IPv6 address of its own would come a second later, into the listings.
            _must("ip", "-n", namespace, "link", "set", link, "addrgenmode", "none")
            _must("ip", "-n", namespace, "link", "set", link, "up")
        _must("ip", "-n", self.inside, "route", "add", "default", "via", WORLD)
        in_it = ("ip", "netns", "exec", self.inside)
        _must(*in_it, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")


def _run(*words: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)


def _must(*words: str) -> None:
    done = _run(*words)
    assert done.returncode == 0, f"{words}: {done.stderr}"


def main() -> None:
    """Serve over the real kernel from below a directory, and die where asked to."""
    from banger.helper.devicemapper import KernelDisks
    from banger.helper.jailer import Jailer
    from banger.helper.netlink import KernelNet
    from banger.helper.resolved import Resolved

    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--owner", action="append", type=int, default=[])
    parser.add_argument("--firecracker", default="/usr/lib/banger/firecracker")
    parser.add_argument("--die-at", type=int, default=0)
    options = parser.parse_args()
    notify = serve.settle()
    jails = Jailer(options.firecracker, str(options.directory / "jails"))
    host = Host(net=KernelNet(), disks=KernelDisks(), jails=jails, resolver=Resolved())
    deadly = Deadly(options.die_at)
    seams = {name: getattr(host, name) for name in SEAMS}
    watched: dict[str, Any] = {name: Watched(seam, options.directory, deadly) for name, seam in seams.items()}
    state, runtime = str(options.directory / "state"), str(options.directory / "run")
    serve.serve(
        serve.Place(state=state, runtime=runtime, owners=options.owner), table.verbs, Host(**watched), notify
    )


if __name__ == "__main__":
    main()
