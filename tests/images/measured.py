"""Flatten in a process of its own. It imports little: a child counts as large as its parent was."""

from __future__ import annotations

import resource
import time
from pathlib import Path

from banger.errors import InvalidImage
from banger.images.layers.flatten import Limits, flatten
from banger.images.remote.oci import Layer


def attempt(layers: list[Layer], out: Path, limits: Limits) -> tuple[str | None, float, float, int]:
    """Flatten; give the refusal, the seconds, the processor's, and the most KiB of any child so far."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    refusal = None
    try:
        flatten(layers, out, limits=limits)
    except InvalidImage as error:
        refusal = error.message
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took_cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return refusal, time.monotonic() - begun, took_cpu_s, after.ru_maxrss
