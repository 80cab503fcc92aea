"""Root's pool: what a request costs, through socket, checks, queue, kernel and audit log."""

from __future__ import annotations

import itertools
import os
import shutil
import time

from banger.helper import client
from banger.helper.requests import AnyAsk, Hello, Request, TapEnsure, TapRemove
from banger.testing.bridged import Bridged
from bench.figures import Figures, median, percentile

ROUNDS = 100
BRIDGE, NETWORK = "br-fc", "172.31.0.0/16"
NETWORK_STEPS = ("address", "tap", "names", "nat")


def measure(figures: Figures) -> None:
    """Time requests one after another, then what a VM's place on a bridge adds to its creation."""
    if os.getuid() != 0 or not shutil.which("ip"):
        figures.skip("root's pool", "it needs root and iproute2")
        return
    with Bridged(more="nat = true\n") as home:
        _requests(home, figures)
        _creation(home, figures)


def _requests(home: Bridged, figures: Figures) -> None:
    numbers = itertools.count()

    def ask(what: AnyAsk) -> float:
        request = Request(op="op-bench", step="bench", epoch=1, key=f"bench/{next(numbers)}", ask=what)
        began = time.perf_counter()
        client.ask(home.socket, request)
        return (time.perf_counter() - began) * 1e3

    ask(TapEnsure(vm="vm-stays", bridge=BRIDGE, network=NETWORK))  # so that the bridge stays, too
    hello = [ask(Hello()) for _ in range(ROUNDS)]
    ensured, removed = [], []
    for _ in range(ROUNDS):
        ensured.append(ask(TapEnsure(vm="vm-bench", bridge=BRIDGE, network=NETWORK)))
        removed.append(ask(TapRemove(vm="vm-bench")))
    ask(TapRemove(vm="vm-stays"))
    figures.add("root's helper: a question, p50", median(hello), "ms")
    figures.add("root's helper: tap made, p50", median(ensured), "ms")
    figures.add("root's helper: tap made, p99", percentile(ensured, 99), "ms")
    figures.add("root's helper: tap removed, p50", median(removed), "ms", note="the kernel waits some 10 ms")


def _creation(home: Bridged, figures: Figures) -> None:
    op = home.json("vm", "create", "web", "--wait")["op"]
    steps = home.json("ops", "show", op)["op"]["steps"]
    network = sum(step["seconds"] for step in steps if step["name"] in NETWORK_STEPS)
    home.banger("vm", "delete", "web")
    figures.add("vm create: address, tap, names and NAT", network * 1e3, "ms")
