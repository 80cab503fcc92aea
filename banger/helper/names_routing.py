"""Root's verb about names: which resolver knows those below `vm`."""

from __future__ import annotations

from banger.errors import OperationFailed, Refused
from banger.helper.host import Host
from banger.helper.ledger import Ledger
from banger.helper.requests import NamesRoute
from banger.helper.verbs import Call, Facts, Verb


def route(host: Host, ledger: Ledger, call: Call, ask: NamesRoute) -> Facts:
    """Make it so that names below `vm` are asked of the caller's daemon, where systemd-resolved runs.

    It is a convenience: a resolver that does not do it is told of in the answer, and no failure.
    """
    bridge = ledger.get("bridge", ask.bridge)
    if bridge is None or bridge.uid != call.caller.uid or bridge.state != "held":
        raise Refused(f"The bridge {ask.bridge} is not yours.")
    if not host.resolver.running():
        return {"routed": False, "why": "systemd-resolved does not run"}
    # The resolver asks all links that it has a name's domain for, and takes who answers first.
    if any("names" in other.facts and other.uid != bridge.uid for other in ledger.of_kind("bridge")):
        return {"routed": False, "why": "another owner's daemon is asked for them"}
    ledger.hold("bridge", ask.bridge, names=ask.port)
    try:
        host.resolver.route(ask.bridge, ask.port)
    except OperationFailed as error:
        return {"routed": False, "why": error.message}
    return {"routed": True}


def listing(_: Host, __: Ledger, ___: int) -> list[dict[str, str]]:
    """List nothing: what is routed goes with its bridge."""
    return []


VERBS = (Verb(ask=NamesRoute, run=route),)
