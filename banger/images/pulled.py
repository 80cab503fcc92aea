"""From an image's layers to the artifact that VMs boot from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from banger.images import base, cache
from banger.images.layers import flatten
from banger.images.remote import registry
from banger.images.remote.oci import Pulled

Details = dict[str, str | int | list[str]]
MAX_WARNINGS = 20


def fetch(
    reference: str, blobs: Path, *, progress: Callable[[str], None], cancelled: Callable[[], bool]
) -> Pulled:
    """Make it so that the blobs of an image are here; see `registry.pull`."""
    with cache.using(blobs.parent):
        return registry.pull(reference, blobs, progress=progress, cancelled=cancelled)


def make(
    pulled: Pulled,
    staging: Path,
    name: str,
    *,
    progress: Callable[[str], None],
    cancelled: Callable[[], bool],
) -> Details:
    """Fill an artifact's staging directory from layers, and say what it is made of.

    Raises InvalidImage for what no honest image has, and what `flatten` and `base.make` raise.
    """
    archive = staging / "root.tar"
    progress(f"joining {len(pulled.layers)} layers")
    flat = flatten.flatten(pulled.layers, archive, progress=progress, cancelled=cancelled)
    progress(f"writing the file system: {flat.entries} entries")
    made = base.make(archive, staging / base.FILE, label=name, cancelled=cancelled)
    archive.unlink()
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
