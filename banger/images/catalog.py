"""Find out where an image or kernel of a name comes from.

A catalog is a TOML file:

    [[image]]
    name = "debian-12-dev"
    bundle = "debian-12-dev.tar.zst"    # an address, or a path, relative to the catalog's own place
    sha256 = "9f86d081884c7d65…"
    size = 83886080                     # bytes
    kernel = "debian-12"                # of its VMs; without it they get the configured one

    [[kernel]]
    name = "debian-12"
    recipe = "debian-12"                # one of banger's own; or: reference = "…", an OCI reference

One is in this package; config.toml names more, and a later one overrides an earlier one by kind and
name. One that cannot be had is told as a warning and does not stop the others.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urljoin, urlsplit

import msgspec

from banger.errors import (
    BangerError,
    DownloadFailed,
    InvalidRequest,
    NotFound,
    OperationFailed,
    from_os_error,
)
from banger.images.bundle import Bundle
from banger.images.remote import download
from banger.images.remote.reference import is_loopback
from banger.model import Value, check_artifact_name

MAX_BYTES = 256 << 10
"""More than a thousand entries; what is longer is refused before it is parsed."""

EMBEDDED = "banger"
_HINT = "An entry has `name` and one of `bundle` (with `sha256` and `size`), `reference` or `recipe`."

Kind = Literal["image", "kernel"]


_A: dict[Kind, str] = {"image": "an image", "kernel": "a kernel"}


class Reference(Value, tag="reference"):
    """An image in a registry."""

    text: str


class Recipe(Value, tag="recipe"):
    """One of banger's own recipes."""

    name: str


class Entry(Value):
    """What a catalog says of a name. `catalog` is the catalog's place, `banger` for the embedded one.

    `vm_kernel` is the name of the kernel that an image's VMs are to have.
    """

    kind: Kind
    name: str
    source: Bundle | Reference | Recipe
    catalog: str
    vm_kernel: str | None = None


class Missing(Value):
    """A catalog that could not be had, and why, in a sentence."""

    place: str
    reason: str


class Catalog(Value):
    """What all catalogs say together."""

    entries: tuple[Entry, ...]
    missing: tuple[Missing, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Tell which catalogs are not part of this, a sentence each."""
        return tuple(f"The catalog {lost.place!r} is left out: {lost.reason}" for lost in self.missing)

    def find(self, kind: Kind, name: str) -> Entry:
        """Find an entry. Raises NotFound; OperationFailed when a catalog that is missing may have it."""
        for entry in self.entries:
            if (entry.kind, entry.name) == (kind, name):
                return entry
        if self.missing:
            raise OperationFailed(
                f"No {kind} {name!r} in the catalogs that could be read, and {len(self.missing)} could not"
                f" be read: {self.warnings[0]}",
                hint="`catalogs` in config.toml names them.",
            )
        known = ", ".join(entry.name for entry in self.entries if entry.kind == kind)
        raise NotFound(f"No catalog has {_A[kind]} named {name!r}.", hint=f"They have: {known}.")


def read(places: Sequence[str], *, cancelled: Callable[[], bool] = lambda: False) -> Catalog:
    """Read the embedded catalog, then those at `places` (paths and addresses); later ones override.

    Raises Cancelled.
    """
    found = {(entry.kind, entry.name): entry for entry in _embedded()}
    missing = []
    for place in places:
        try:
            text = _content(place, cancelled)
            found.update(((entry.kind, entry.name), entry) for entry in parse(text, place))
        except OSError as error:
            missing.append(Missing(place=place, reason=f"{from_os_error(error).message}."))
        except (InvalidRequest, DownloadFailed) as error:
            missing.append(Missing(place=place, reason=error.message))
    return Catalog(entries=tuple(found.values()), missing=tuple(missing))


def parse(content: bytes, place: str) -> tuple[Entry, ...]:
    """Read a catalog that is (or was) at `place`. Raises InvalidRequest, naming what is wrong."""
    try:
        text = content.decode("utf-8")
        document = msgspec.convert(tomllib.loads(text), _Document)
    except (ValueError, RecursionError, OverflowError) as error:  # msgspec's and tomllib's are ValueErrors
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else _printable(str(error))
        raise InvalidRequest(f"It is not a catalog: {reason}.", hint=_HINT) from None
    entries = tuple(_entries(document, place))
    twice = [what for what, times in Counter((e.kind, e.name) for e in entries).items() if times > 1]
    if twice:
        raise InvalidRequest("It has more than one {} {!r}.".format(*twice[0]))
    return entries


class _Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    bundle: str | None = None
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")] | None = None
    size: Annotated[int, msgspec.Meta(ge=1, lt=1 << 53)] | None = None
    reference: Annotated[str, msgspec.Meta(min_length=1, max_length=512)] | None = None
    recipe: str | None = None
    kernel: str | None = None


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    image: list[_Line] = []
    kernel: list[_Line] = []


def _embedded() -> tuple[Entry, ...]:
    return parse(resources.files("banger.images").joinpath("catalog.toml").read_bytes(), EMBEDDED)


def _content(place: str, cancelled: Callable[[], bool]) -> bytes:
    if download.is_address(place):
        download.check_address(place)
        parts = urlsplit(place)
        if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
            raise InvalidRequest("Nobody vouches for what comes over plain http: a catalog needs https.")
        return download.read(place, max_bytes=MAX_BYTES, cancelled=cancelled)
    with Path(place).expanduser().open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise InvalidRequest(f"It is larger than {MAX_BYTES >> 10} KiB.")
    return content


def _entries(document: _Document, place: str) -> Iterator[Entry]:
    kinds: tuple[tuple[Kind, list[_Line]], ...] = (("image", document.image), ("kernel", document.kernel))
    for kind, lines in kinds:
        for line in lines:
            try:
                check_artifact_name(line.name, kind)
                source, vm_kernel = _source(line, place), _vm_kernel(line, kind)
                yield Entry(kind=kind, name=line.name, source=source, catalog=place, vm_kernel=vm_kernel)
            except BangerError as error:
                raise InvalidRequest(f"{kind} {line.name!r}: {error.message}", hint=error.hint) from None


def _source(line: _Line, place: str) -> Bundle | Reference | Recipe:
    ways = [way for way in (line.bundle, line.reference, line.recipe) if way is not None]
    pinned = line.sha256 is not None and line.size is not None
    if len(ways) != 1:
        raise InvalidRequest(
            "It must come from exactly one of `bundle`, `reference` and `recipe`.", hint=_HINT
        )
    if line.bundle is not None and pinned:
        assert line.sha256 is not None
        assert line.size is not None
        origin = place if download.is_address(place) else None
        where = _resolved(line.bundle, place)
        return Bundle(place=where, sha256=line.sha256, size=line.size, origin=origin)
    if line.bundle is not None or line.sha256 is not None or line.size is not None:
        raise InvalidRequest("A bundle, and only a bundle, has both `sha256` and `size`.", hint=_HINT)
    if line.reference is not None:
        return Reference(text=line.reference)
    assert line.recipe is not None
    return Recipe(name=check_artifact_name(line.recipe, "recipe"))


def _vm_kernel(line: _Line, kind: Kind) -> str | None:
    if line.kernel is None:
        return None
    if kind == "kernel" or line.recipe is not None:
        raise InvalidRequest("Only an image from a bundle or a registry names a `kernel`.")
    return check_artifact_name(line.kernel, "kernel")


def _resolved(bundle: str, place: str) -> str:
    """Give a bundle's place; what a catalog from elsewhere names is elsewhere, never a file of this host."""
    if not bundle or not bundle.isprintable():
        raise InvalidRequest(f"{bundle!r} is not a place for a bundle.")
    if download.is_address(place):
        try:
            address = urljoin(place, bundle)
        except ValueError as error:
            raise InvalidRequest(f"{bundle!r} is not an http or https address: {error}.") from None
        download.check_address(address, came_from=place)
        return address
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", bundle):
        download.check_address(bundle)
        return bundle
    return str(Path(place).expanduser().absolute().parent / Path(bundle).expanduser())


def _printable(text: str) -> str:
    """Show a parser's message, which quotes the catalog, with its control characters escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text).rstrip(".")
