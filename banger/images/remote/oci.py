"""What an image from a registry is, once it is here: verified blobs and what its maker said of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from banger.model import Value

VERSION = 2
"""Counts changes of how artifacts are made from layers; part of their digest."""


def artifact_digest(manifest: str) -> str:
    """Name the artifact that is made from a manifest (`sha256:…`): sha256 over it and how that is done."""
    return hashlib.sha256(msgspec.json.encode((VERSION, manifest))).hexdigest()


class ImageConfig(Value):
    """What the image's maker asks for (OCI image-spec 1.1, config.md): data, never control.

    Strings are as the maker wrote them, bounded in number and length; show them escaped.
    """

    env: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    created: str = ""


class Layer(Value):
    """One layer: a blob whose size and digest were checked. `diff_id` is of its uncompressed tar.

    Digests are `sha256:` and 64 hex digits; `size` is the blob's, in bytes.
    """

    media_type: str
    digest: str
    size: int
    diff_id: str
    path: Path


class Pulled(Value):
    """An image whose blobs are on the disk. `digest` pins its manifest; layers are oldest first."""

    reference: str
    digest: str
    config: ImageConfig
    layers: tuple[Layer, ...]
