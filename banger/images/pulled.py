"""From an image's layers to the artifact that VMs boot from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from banger import config
from banger.images import base, cache, seed
from banger.images.layers import flatten
from banger.images.remote import registry
from banger.images.remote.blobs import Blob, find
from banger.images.remote.oci import Pulled
from banger.images.remote.reference import parse

Details = dict[str, str | int | list[str]]
MAX_WARNINGS = 20


def fetch(
    reference: str,
    blobs: Path,
    *,
    limits: config.Limits,
    progress: Callable[[str], None],
    cancelled: Callable[[], bool],
) -> Pulled:
    """Make it so that the blobs of an image are here; see `registry.pull`."""
    bounds = registry.Limits.of(limits)
    with cache.using(blobs.parent):
        return registry.pull(reference, blobs, limits=bounds, progress=progress, cancelled=cancelled)


def make(
    pulled: Pulled,
    staging: Path,
    name: str,
    *,
    blobs: Path,
    limits: config.Limits,
    progress: Callable[[str], None],
    cancelled: Callable[[], bool],
) -> Details:
    """Fill an artifact's staging directory from layers, and say what it is made of.

    Layers that were pruned since they came are fetched again. Raises InvalidImage for what no honest
    image has, and what `fetch`, `flatten` and `base.make` raise.
    """
    archive, bounds = staging / "root.tar", flatten.Limits.of(limits)
    with cache.using(blobs.parent):
        if any(find(blobs, Blob(digest=layer.digest, size=layer.size)) is None for layer in pulled.layers):
            fetch(_pinned(pulled), blobs, limits=limits, progress=progress, cancelled=cancelled)
        progress(f"joining {len(pulled.layers)} layers")
        flat = flatten.flatten(pulled.layers, archive, limits=bounds, progress=progress, cancelled=cancelled)
    progress(f"writing the file system: {flat.entries} entries")
    made = base.make(archive, staging / base.FILE, label=name, cancelled=cancelled)
    archive.unlink()
    seed.take_of_ours(staging / base.FILE, staging / seed.FILE, cancelled=cancelled)
    return {
        "reference": pulled.reference,
        "manifest": pulled.digest,
        "layers": [layer.digest for layer in pulled.layers],
        "entries": flat.entries,
        "format": made.format,
        "env": list(pulled.config.env),
        "user": pulled.config.user,
        "working_dir": pulled.config.working_dir,
        "entrypoint": list(pulled.config.entrypoint),
        "cmd": list(pulled.config.cmd),
        "warnings": list(flat.warnings[:MAX_WARNINGS]),
    }


def _pinned(pulled: Pulled) -> str:
    """Name exactly this image: its tag may have another by now."""
    return str(msgspec.structs.replace(parse(pulled.reference), digest=pulled.digest))
