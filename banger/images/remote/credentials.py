"""What the user's container tools know of logins to registries. Nothing of it is ever logged.

The file's format is Docker's (docs.docker.com, `docker login`: config.json); podman and skopeo write the
same to auth.json (containers-auth.json(5)).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from banger import proc
from banger.errors import HostLacks, ProgramFailed, RegistryDenied, TimedOut

HELPER_TIMEOUT_S = 20.0
MAX_FILE = 1 << 20
TOKEN_USER = "<token>"  # noqa: S105 - a helper's word for "the secret is an identity token"


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """A login: a user and password, or an identity token to be exchanged (OAuth 2)."""

    user: str = ""
    password: str = ""
    identity_token: str = ""

    def __repr__(self) -> str:
        """Tell nothing: a traceback or a log line must not hold a secret."""
        return "Credentials(…)"

    @property
    def basic(self) -> str:
        """Give what follows `Basic ` in an Authorization header (RFC 7617)."""
        return base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class _Login(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""


class _File(msgspec.Struct):
    auths: dict[str, _Login | None] = {}
    credHelpers: dict[str, str] = {}  # noqa: N815 - Docker's name
    credsStore: str = ""  # noqa: N815 - Docker's name


class _Secret(msgspec.Struct):
    Username: str = ""
    Secret: str = ""


def find(
    registry: str,
    repository: str,
    environ: Mapping[str, str],
    cancelled: Callable[[], bool] = lambda: False,
) -> Credentials | None:
    """Find the login for a repository; None when the user has none.

    Raises RegistryDenied when a file or a credential helper that has it cannot be used, Cancelled.
    """
    for path in _files(environ):
        known = _read(path)
        for key in _keys(registry, repository):
            if helper := known.credHelpers.get(key):
                return _ask(helper, key, cancelled)
            if (login := known.auths.get(key)) and (found := _decode(login, path)):
                return found
        if known.credsStore and (found := _ask(known.credsStore, registry, cancelled)):
            return found
    return None


def _files(environ: Mapping[str, str]) -> Iterator[Path]:
    """Give the places to look at, the one that counts first."""
    home = Path(environ.get("HOME") or "~").expanduser()
    if given := environ.get("DOCKER_CONFIG"):
        yield Path(given) / "config.json"
    else:
        yield home / ".docker" / "config.json"
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "containers" / "auth.json"
    yield Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers" / "auth.json"


def _keys(registry: str, repository: str) -> Iterator[str]:
    """Give the names a login may be filed under, the narrowest first (containers-auth.json(5))."""
    parts = repository.split("/")
    for length in range(len(parts), 0, -1):
        yield "/".join([registry, *parts[:length]])
    yield registry
    yield f"https://{registry}"
    yield f"https://{registry}/v1/"  # as Docker has filed logins since its first registry


def _read(path: Path) -> _File:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE + 1)
        if len(text) > MAX_FILE:
            raise _unusable(path)
        return msgspec.json.decode(text, type=_File)
    except (FileNotFoundError, NotADirectoryError):
        return _File()
    except (OSError, msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise _unusable(path) from None


def _unusable(path: Path) -> RegistryDenied:
    return RegistryDenied(f"{path} cannot be read.", hint="It must be JSON as `docker login` writes it.")


def _decode(login: _Login, path: Path) -> Credentials | None:
    """Read one login; None where it is an empty entry that points to a credential store."""
    user, password = login.username, login.password
    if login.auth:
        try:
            text = base64.b64decode(login.auth, validate=True).decode("utf-8").rstrip("\0")
        except (binascii.Error, UnicodeDecodeError):
            raise _unusable(path) from None
        user, _, password = text.partition(":")
    if login.identitytoken:
        return Credentials(identity_token=login.identitytoken)
    return Credentials(user=user, password=password) if user else None


def _ask(helper: str, key: str, cancelled: Callable[[], bool]) -> Credentials | None:
    """Ask a credential helper (github.com/docker/docker-credential-helpers); None when it knows none."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", helper, re.ASCII):
        raise RegistryDenied(f"{helper!r} is not the name of a credential helper.")
    program = f"docker-credential-{helper}"
    try:
        answer = proc.run(
            [program, "get"], stdin=f"{key}\n".encode(), timeout_s=HELPER_TIMEOUT_S, cancelled=cancelled
        )
        secret = msgspec.json.decode(answer, type=_Secret)
    except ProgramFailed:
        return None  # which is also how a helper says that it has no such login
    except (HostLacks, TimedOut) as error:
        raise RegistryDenied(
            f"The login for {key} cannot be had: {error.message}",
            hint=f"Your container tools' configuration names {program}: install it, or take it out there.",
        ) from None
    except (msgspec.DecodeError, RecursionError):
        raise RegistryDenied(f"{program} answered something else than a login.") from None
    if secret.Username == TOKEN_USER:
        return Credentials(identity_token=secret.Secret)
    return Credentials(user=secret.Username, password=secret.Secret) if secret.Username else None
