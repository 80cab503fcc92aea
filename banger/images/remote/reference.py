"""Names of images in registries, read strictly.

The grammar is that of the distribution project (github.com/distribution/reference, reference.go). A name
without a registry has one only where the user's settings say which.
"""

from __future__ import annotations

import ipaddress
import re

from banger.errors import InvalidRequest
from banger.model import Value

MAX_LENGTH = 1024

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOST = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:.]{{2,45}}\])"
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_WHOLE = re.compile(
    rf"(?:(?P<registry>{_HOST}(?::[0-9]{{1,5}})?)/)?"
    rf"(?P<repository>{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)


class Reference(Value):
    """An image in a registry. `registry` is host[:port]; `tag` or `digest` or both are there."""

    registry: str
    repository: str
    tag: str | None
    digest: str | None

    def __str__(self) -> str:
        """Give the whole name, which parses to the same again."""
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"

    @property
    def default_name(self) -> str:
        """What the image is called here if nobody says otherwise: `debian-12` for `…/library/debian:12`."""
        last = self.repository.rpartition("/")[2]
        return f"{last}-{self.tag}".lower() if self.tag else last

    @property
    def plain(self) -> bool:
        """Whether it is spoken to without TLS: on this machine's own loopback only."""
        return is_loopback(split_host(self.registry))


def parse(text: str, default: str | None = None) -> Reference:
    """Read a reference; a missing registry is the `default`, a missing tag is latest.

    `default` may have the beginning of a repository's name after a `/`. Raises InvalidRequest.
    """
    found = _WHOLE.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if found is None:
        raise _invalid(text)
    registry, repository, tag, digest = found.group("registry", "repository", "tag", "digest")
    # `debian/foo` is a repository; a host has a dot or a port, or is localhost.
    if registry is not None and not _looks_like_host(registry):
        if not re.fullmatch(_PART, registry, re.ASCII):
            raise _invalid(text)
        registry, repository = None, f"{registry}/{repository}"
    if registry is None:
        return _with_default(text, default)
    registry = _canonical(registry, text)
    return Reference(
        registry=registry,
        repository=repository,
        tag=tag or (None if digest else "latest"),
        digest=digest,
    )


def _with_default(text: str, default: str | None) -> Reference:
    if default is None:
        raise InvalidRequest(
            f"{text!r} does not say which registry has it.",
            hint="Give HOST[:PORT]/NAME, or set `registry` in config.toml.",
        )
    return parse(f"{default}/{text}")


def split_host(registry: str) -> str:
    """Give the host of host[:port], an IPv6 address without its brackets, in lower case."""
    found = re.fullmatch(r"\[(.*)\](?::\d+)?|([^:]*)(?::\d+)?", registry)
    return ((found.group(1) or found.group(2) or "") if found else registry).lower()


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine's own: localhost, 127.0.0.0/8 or ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _looks_like_host(first: str) -> bool:
    return first == "localhost" or any(mark in first for mark in ".:")


def _canonical(registry: str, text: str) -> str:
    """Bring a registry's name to lower case; refuse a port or an address that cannot be."""
    registry = registry.lower()
    port = re.search(r":(\d+)\Z", registry.rpartition("]")[2], re.ASCII)
    if port and not 0 < int(port.group(1)) < 65536:
        raise _invalid(text)
    if registry.startswith("["):
        try:
            ipaddress.IPv6Address(split_host(registry))
        except ValueError:
            raise _invalid(text) from None
    return registry


def _invalid(text: str) -> InvalidRequest:
    shown = text if len(text) <= 80 else f"{text[:80]}…"
    return InvalidRequest(
        f"{shown!r} is not the name of an image in a registry.",
        hint="Use HOST[:PORT]/NAME[:TAG][@sha256:…] in lower case, for example registry.example/debian:12.",
    )
