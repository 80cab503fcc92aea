"""Manifests, indexes and configurations of images, read strictly (OCI image-spec 1.1; Docker schema 2).

A document is what its media type says and nothing else besides: one that can be read as a manifest and as
an index at the same time has two truths (CVE-2021-41190).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from banger.errors import InvalidImage
from banger.images.remote.oci import ImageConfig

MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
CONFIGS = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
LAYERS = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
)
ACCEPT = ", ".join((*MANIFESTS, *INDEXES))
OS, ARCHITECTURE = "linux", "amd64"

MAX_LAYERS = 128
MAX_ENTRIES = 1024
MAX_TEXT = 1 << 17
"""The longest string of a configuration: the kernel takes no longer argument (MAX_ARG_STRLEN)."""


class Platform(msgspec.Struct, frozen=True):
    """What an image in an index is for."""

    os: str = ""
    architecture: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """What another document or a blob must be: `digest` is `sha256:…`, `size` in bytes."""

    media_type: str
    digest: str
    size: int
    urls: list[str] | None = None
    platform: Platform | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One image: its configuration and its layers, oldest first."""

    config: Descriptor
    layers: list[Descriptor]


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """Several images, or several indexes."""

    manifests: list[Descriptor]


_ABSENT = msgspec.Raw()


class _Document(msgspec.Struct, kw_only=True, rename="camel"):
    """All that a manifest or an index may say of itself."""

    schema_version: int
    media_type: str | None = None
    config: msgspec.Raw = _ABSENT
    layers: msgspec.Raw = _ABSENT
    manifests: msgspec.Raw = _ABSENT
    fs_layers: msgspec.Raw = _ABSENT

    @property
    def looks_like_manifest(self) -> bool:
        return bool(bytes(self.config) or bytes(self.layers))

    @property
    def looks_like_index(self) -> bool:
        return bool(bytes(self.manifests))


class _Run(msgspec.Struct, rename="pascal"):
    env: list[str] | None = None
    user: str | None = None
    working_dir: str | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None


class _RootFs(msgspec.Struct, kw_only=True):
    type: str
    diff_ids: list[str]


class _Config(msgspec.Struct, kw_only=True):
    rootfs: _RootFs
    architecture: str | None = None
    os: str | None = None
    created: str | None = None
    config: _Run | None = None


_T = TypeVar("_T")


def parse(data: bytes, media_type: str) -> Manifest | Index:
    """Read a document that was sent as `media_type`; raises InvalidImage unless it is just that."""
    if media_type not in (*MANIFESTS, *INDEXES):
        raise InvalidImage(f"{media_type[:100]!r} is not a kind of image that banger knows.")
    document = decode(data, _Document, "manifest")
    if document.schema_version != 2:
        raise InvalidImage(f"Its manifest is of version {document.schema_version}, which is not 2.")
    if document.media_type not in (None, media_type):
        raise InvalidImage("Its manifest says that it is something else than the registry says.")
    is_manifest, is_index = document.looks_like_manifest, document.looks_like_index
    if bytes(document.fs_layers) or is_manifest == is_index or is_index != (media_type in INDEXES):
        raise InvalidImage("Its manifest can be read as two things at once, or is not what it says it is.")
    if is_index:
        index = decode(data, Index, "index")
        for entry in index.manifests:
            _check(entry)
        return index
    manifest = decode(data, Manifest, "manifest")
    _check_manifest(manifest)
    return manifest


def kind_of(data: bytes) -> str | None:
    """Tell what a document says it is: an OCI one need not say."""
    return decode(data, _Document, "manifest").media_type


def choose(index: Index) -> Descriptor:
    """Pick what an index has for linux/amd64; raises InvalidImage when there is none.

    An entry without a platform is taken when nothing better is there: its configuration tells later.
    """
    known = [entry for entry in index.manifests if entry.media_type in (*MANIFESTS, *INDEXES)]
    fit = [entry for entry in known if _fits(entry.platform)]
    fit.sort(key=lambda entry: entry.platform is not None and entry.platform.variant not in ("", "v1"))
    unsaid = [entry for entry in known if entry.platform is None]
    for entry in (*fit, *unsaid):
        return entry
    there = sorted({f"{p.os}/{p.architecture}" for entry in known if (p := entry.platform)})
    raise InvalidImage(
        f"There is no {OS}/{ARCHITECTURE} image in it.",
        hint=f"There is one for: {', '.join(there)[:200]!r}" if there else None,
    )


def parse_config(data: bytes, layers: int) -> tuple[ImageConfig, list[str]]:
    """Read a configuration; give it and the digest of each layer's tar, oldest first.

    Raises InvalidImage unless it is for linux/amd64 and tells of just that many layers.
    """
    found = decode(data, _Config, "configuration")
    platform = (found.os or OS, found.architecture or ARCHITECTURE)
    if platform != (OS, ARCHITECTURE):
        raise InvalidImage(f"The image is for {'/'.join(platform)[:80]!r}, not for {OS}/{ARCHITECTURE}.")
    ids = found.rootfs.diff_ids
    if found.rootfs.type != "layers" or len(ids) != layers or not all(map(is_digest, ids)):
        raise InvalidImage("Its configuration does not tell the digest of each of its layers.")
    run = found.config or _Run()
    return ImageConfig(
        env=_texts(run.env),
        user=_text(run.user),
        working_dir=_text(run.working_dir),
        entrypoint=_texts(run.entrypoint),
        cmd=_texts(run.cmd),
        created=_text(found.created),
    ), ids


def decode(data: bytes, kind: type[_T], what: str) -> _T:
    """Read JSON of an image; raises InvalidImage when it is malformed or too deep."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidImage(f"Its {what} is not the JSON that it must be.") from None


def is_digest(text: str) -> bool:
    """Tell whether this is a digest that banger knows: `sha256:` and 64 hex digits."""
    return re.fullmatch(r"sha256:[0-9a-f]{64}", text, re.ASCII) is not None


def _fits(platform: Platform | None) -> bool:
    return platform is not None and (platform.os, platform.architecture) == (OS, ARCHITECTURE)


def _check(descriptor: Descriptor) -> None:
    if not is_digest(descriptor.digest):
        raise InvalidImage(f"It names a blob {descriptor.digest[:80]!r}, which is not a sha256 digest.")
    if descriptor.size < 0:
        raise InvalidImage("It names a blob of less than no bytes.")


def _check_manifest(manifest: Manifest) -> None:
    if manifest.config.media_type not in CONFIGS:
        raise InvalidImage(f"It holds {manifest.config.media_type[:100]!r}, which is no image of a system.")
    if not 0 < len(manifest.layers) <= MAX_LAYERS:
        raise InvalidImage(f"It has {len(manifest.layers)} layers; there may be 1 to {MAX_LAYERS}.")
    for blob in (manifest.config, *manifest.layers):
        _check(blob)
        if blob.urls:
            raise InvalidImage("It wants a layer to be fetched from somewhere else than its registry.")
    for layer in manifest.layers:
        if layer.media_type not in LAYERS:
            raise InvalidImage(f"{layer.media_type[:100]!r} is not a kind of layer that banger knows.")
    sizes: dict[str, tuple[int, str]] = {}
    for layer in manifest.layers:
        if sizes.setdefault(layer.digest, (layer.size, layer.media_type)) != (layer.size, layer.media_type):
            raise InvalidImage("It names one layer twice and says different things of it.")


def _texts(values: Sequence[str] | None) -> tuple[str, ...]:
    if values is not None and len(values) > MAX_ENTRIES:
        raise InvalidImage(f"Its configuration has a list of more than {MAX_ENTRIES} entries.")
    return tuple(_text(value) for value in values or ())


def _text(value: Any) -> str:
    text = str(value or "")
    if len(text) > MAX_TEXT or "\0" in text:
        raise InvalidImage("Its configuration holds a text that no program could be given.")
    return text
