"""Pull images from registries: what a reference means is found, then what is missing of it is fetched.

Workers fetch; the thread that called looks after them. It alone calls the caller's functions, and it ends
the workers' connections when they are silent, when one of them has failed, or when it is told to.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from banger import config, layout
from banger.errors import (
    Cancelled,
    InvalidImage,
    RegistrySlow,
    RegistryUnreachable,
    RegistryUntrusted,
)
from banger.images.remote import blobs, credentials, manifest
from banger.images.remote import reference as references
from banger.images.remote.blobs import Blob
from banger.images.remote.manifest import Descriptor, Manifest
from banger.images.remote.oci import ImageConfig, Layer, Pulled
from banger.images.remote.reference import Reference
from banger.model import Value

if TYPE_CHECKING:
    from banger.images.remote.client import Client
    from banger.images.remote.wire import Wire

LOOK_S = 0.1
PROGRESS_S = 2.0
MAX_NESTING = 2

_T = TypeVar("_T")


class Limits(Value):
    """What a pull may take.

    A registry that is silent for `inactivity_s`, or slower than `min_bytes_s` a second for as long, ends it.
    `image_bytes` bounds the blobs as they are sent; `retries` are those of a blob without any progress.
    """

    image_bytes: int = 20 << 30
    manifest_bytes: int = 4 << 20
    config_bytes: int = 1 << 20
    inactivity_s: float = 30.0
    min_bytes_s: int = 1024
    parallel: int = 3
    retries: int = 5

    @classmethod
    def of(cls, settings: config.Limits) -> Limits:
        """Give those that the user has set."""
        return cls(
            image_bytes=settings.download_mib << 20,
            manifest_bytes=settings.manifest_kib << 10,
            config_bytes=settings.image_config_kib << 10,
            inactivity_s=settings.silence_s,
            min_bytes_s=settings.slowest_bytes_s,
            parallel=settings.parallel,
            retries=settings.retries,
        )


def pull(
    reference: str,
    blobs_dir: Path,
    *,
    limits: Limits | None = None,
    environ: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Pulled:
    """Make it so that an image's blobs are in `blobs_dir`, checked; give what it is.

    `progress` and `cancelled` are called in this thread only. Raises InvalidRequest (not a reference),
    a RegistryError, InvalidImage, DiskFull or Cancelled; what came whole stays, and beginnings that help.
    """
    # 130 ms and 25 MB, which a process that pulls nothing does not pay.
    from banger.images.remote.client import Client
    from banger.images.remote.wire import Policy, Wire

    wanted = references.parse(reference)
    limits = limits or Limits()
    environ = os.environ if environ is None else environ
    login = credentials.find(wanted.registry, wanted.repository, environ, cancelled)
    line = Wire(Policy(wanted), inactivity_s=limits.inactivity_s, min_bytes_s=limits.min_bytes_s)
    with contextlib.closing(Client(wanted, line, login)) as client:
        errand = _Errand(client, line, blobs_dir, limits, progress, cancelled)
        try:
            return errand.run(wanted)
        finally:
            errand.end()


class _Errand:
    """One pull: workers that fetch, and the caller's thread that looks after them."""

    def __init__(
        self,
        client: Client,
        line: Wire,
        blobs_dir: Path,
        limits: Limits,
        progress: Callable[[str], None],
        cancelled: Callable[[], bool],
    ):
        self._client, self._wire = client, line
        self._blobs, self._limits = blobs_dir, limits
        self._cancelled = cancelled
        self._board = _Board(progress)
        self._workers = ThreadPoolExecutor(limits.parallel, thread_name_prefix="pull")

    def run(self, wanted: Reference) -> Pulled:
        """Resolve the reference, then fetch what is missing of it."""
        (found,) = self._attend([self._workers.submit(self._resolve, wanted)])
        digest, image, config, diff_ids = found
        parts = {layer.digest: Blob(digest=layer.digest, size=layer.size) for layer in image.layers}
        blobs.check_room(self._blobs, sum(blobs.missing(self._blobs, blob) for blob in parts.values()))
        paths = self._attend([self._workers.submit(self._layer, blob) for blob in self._numbered(parts)])
        place = dict(zip(parts, paths, strict=True))
        layers = tuple(
            Layer(
                media_type=layer.media_type,
                digest=layer.digest,
                size=layer.size,
                diff_id=diff_id,
                path=place[layer.digest],
            )
            for layer, diff_id in zip(image.layers, diff_ids, strict=True)
        )
        return Pulled(reference=str(wanted), digest=digest, config=config, layers=layers)

    def end(self) -> None:
        """Cut what is still under way, and wait for it."""
        self._wire.interrupt(Cancelled())
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _attend(self, futures: Sequence[Future[_T]]) -> list[_T]:
        """Wait for workers; the first failure, silence or cancellation ends them all."""
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=LOOK_S, return_when=FIRST_COMPLETED)
            self._board.tell()
            for future in done:
                future.result()
            if self._cancelled():
                raise Cancelled
            if self._wire.slow():
                raise RegistrySlow(
                    f"{self._wire.policy.host} sent less than {self._limits.min_bytes_s} bytes a second"
                    f" for {self._limits.inactivity_s:g} s."
                )
        self._board.tell(last=True)
        return [future.result() for future in futures]

    def _numbered(self, parts: Mapping[str, Blob]) -> Sequence[Blob]:
        for number, blob in enumerate(parts.values(), 1):
            here = blobs.find(self._blobs, blob) is not None
            self._board.expect(blob, f"layer {number} of {len(parts)}", here=here)
        return list(parts.values())

    def _resolve(self, wanted: Reference) -> tuple[str, Manifest, ImageConfig, list[str]]:
        """Find the one manifest that a reference means on this machine, and its configuration."""
        name, digest = wanted.digest or wanted.tag or "latest", wanted.digest
        entry: Descriptor | None = None
        for _ in range(1 + MAX_NESTING):
            data, media_type = self._document(name, digest, entry)
            found, digest = manifest.parse(data, media_type), blobs.digest_of(data)
            blobs.put(self._blobs, digest, data, self._wire.pause)
            if isinstance(found, Manifest):
                return digest, found, *self._configuration(found)
            entry = manifest.choose(found)
            name = digest = entry.digest
        raise InvalidImage(f"It is an index of indexes, more than {MAX_NESTING} deep.")

    def _document(self, name: str, digest: str | None, entry: Descriptor | None) -> tuple[bytes, str]:
        """Get a manifest or index, which must have the digest and be what an index's entry says, if any."""
        limit, kind = self._limits.manifest_bytes, entry.media_type if entry else None
        kept = blobs.get(self._blobs, digest, limit) if digest else None
        if kept is not None and (known := kind or manifest.kind_of(kept)):
            return kept, known
        data, media_type = self._patiently(lambda: self._client.document(name, limit))
        if digest is not None and blobs.digest_of(data) != digest:
            raise RegistryUntrusted(f"What came as {digest[:19]} is something else: its digest is not that.")
        if entry is not None and (media_type, len(data)) != (entry.media_type, entry.size):
            raise InvalidImage("Its manifest is something else than its index says.")
        return data, media_type

    def _configuration(self, found: Manifest) -> tuple[ImageConfig, list[str]]:
        limits, total = self._limits, sum(blob.size for blob in (found.config, *found.layers))
        if found.config.size > limits.config_bytes:
            raise InvalidImage(f"Its configuration is larger than {layout.size(limits.config_bytes)}.")
        if total > limits.image_bytes:
            raise InvalidImage(
                f"The image has {layout.size(total)}; {layout.size(limits.image_bytes)} are allowed.",
                hint="`download_mib` of `[limits]` in config.toml is the limit.",
            )
        path = self._blob(_blob(found.config), lambda _: None)
        return manifest.parse_config(path.read_bytes(), len(found.layers))

    def _layer(self, blob: Blob) -> Path:
        return self._blob(blob, lambda have: self._board.note(blob, have))

    def _blob(self, blob: Blob, report: Callable[[int], None]) -> Path:
        source = blobs.Source(
            read=lambda offset: self._client.blob(blob, offset),
            pause=self._wire.pause,
            report=report,
            retries=self._limits.retries,
        )
        return blobs.obtain(self._blobs, blob, source)

    def _patiently(self, ask: Callable[[], _T]) -> _T:
        """Ask a second time when the connection broke: a registry that is being restarted, say."""
        try:
            return ask()
        except RegistryUnreachable:
            self._wire.pause(blobs.FIRST_DELAY_S)
            return ask()


def _blob(descriptor: Descriptor) -> Blob:
    return Blob(digest=descriptor.digest, size=descriptor.size)


class _Board:
    """How far each layer is: workers note it, the caller's thread tells it, each layer every two seconds."""

    def __init__(self, progress: Callable[[str], None]):
        self._progress = progress
        self._names: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._have: dict[str, int] = {}
        self._told: dict[str, tuple[float, int]] = {}

    def expect(self, blob: Blob, name: str, *, here: bool) -> None:
        """Give a layer its name; one that is here already needs no more words."""
        if here:
            self._progress(f"{name}: {layout.size(blob.size)}, here already")
            return
        self._names[blob.digest], self._sizes[blob.digest] = name, blob.size
        self._told[blob.digest] = (time.monotonic(), 0)

    def note(self, blob: Blob, have: int) -> None:
        """Note how many bytes of a layer are here."""
        self._have[blob.digest] = have

    def tell(self, *, last: bool = False) -> None:
        """Tell what is new and was not told for a while; `last` tells what came in since."""
        now = time.monotonic()
        for digest, name in self._names.items():
            have, size, (when, told) = self._have.get(digest, 0), self._sizes[digest], self._told[digest]
            if have != told and (last or have == size or now - when >= PROGRESS_S):
                self._progress(f"{name}: {layout.size(have)} of {layout.size(size)}")
                self._told[digest] = (now, have)
