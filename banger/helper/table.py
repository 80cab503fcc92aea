"""Everything that root does: the verbs of all areas, one for each request that there is."""

from __future__ import annotations

from banger.helper import about, jail, names_routing, network, storage
from banger.helper.pool import Verbs
from banger.helper.store import Store

AREAS = (network, storage, jail, names_routing)


def verbs(store: Store) -> Verbs:
    """Give the handler of each request."""
    own = about.verbs(store, [area.listing for area in AREAS])
    return {verb.ask: verb for verbs in (own, *(area.VERBS for area in AREAS)) for verb in verbs}
