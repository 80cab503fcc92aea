"""Events of older versions in today's shapes. The log itself is never rewritten: its hashes stand.

A function takes the data of one event, as schema N had it, and gives it as schema N + 1 has it.
An event type that did not change between two schemas is not in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from banger.errors import LogTooNew
from banger.events import vocabulary as ev

Data = dict[str, Any]
Upcaster = Callable[[Data], Data]


def _claimed_1(data: Data) -> Data:
    """Add the boot: schema 1 did not tell one boot of the host from another."""
    return data | {"worker": data["worker"] | {"boot_id": ""}}


def _started_1(data: Data) -> Data:
    """See `_claimed_1`."""
    return data | {"process": data["process"] | {"boot_id": ""}}


UPCASTERS: dict[tuple[int, str], Upcaster] = {
    (1, "op.claimed"): _claimed_1,
    (1, "vm.started"): _started_1,
}


def upcast(schema: int, kind: str, data: str) -> str:
    """Give the JSON of an event of an older schema as this version's.

    Raises LogTooNew for a schema that this version does not know.
    """
    if schema > ev.SCHEMA:
        raise LogTooNew(f"An event has schema {schema}; this version of banger knows {ev.SCHEMA}.")
    steps = [UPCASTERS[(n, kind)] for n in range(schema, ev.SCHEMA) if (n, kind) in UPCASTERS]
    if not steps:
        return data
    value: Data = msgspec.json.decode(data)
    for step in steps:
        value = step(value)
    return msgspec.json.encode(value).decode()
