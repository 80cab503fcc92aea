"""A registry, spoken to with oras (OCI distribution-spec 1.1; Docker's token authentication).

What oras has no word for (ranges, bounds, where a redirect or a realm may lead) is in `wire`, under its
session, or here. docs/decisions/0014 says what is whose.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import msgspec
import oras.auth.utils
import requests
from oras.auth.token import TokenAuth
from oras.provider import Registry

from banger import layout
from banger.errors import (
    ImageUnknown,
    InvalidImage,
    RegistryDenied,
    RegistryError,
    RegistryUnreachable,
    RegistryUntrusted,
)
from banger.images.remote import manifest, wire
from banger.images.remote.blobs import Blob, Body
from banger.images.remote.credentials import Credentials
from banger.images.remote.reference import Reference, split_host

MAX_REDIRECTS = 5


class Client(Registry):  # type: ignore[misc]  # oras ships no type marker
    """A registry as oras knows it, over a wire of ours."""

    # oras's own retries sleep up to 83 s where nothing can wake them, and retry refusals too.
    do_request = inspect.unwrap(Registry.do_request)

    def __init__(self, reference: Reference, line: wire.Wire, login: Credentials | None):
        super().__init__(hostname=reference.registry, insecure=reference.plain)
        self._reference, self._wire = reference, line
        self.session.trust_env = False
        self.session.max_redirects = MAX_REDIRECTS
        self.session.headers["Accept-Encoding"] = "identity"
        adapter = wire.Adapter(line)
        self.session.adapters.clear()
        self.session.mount("https://", adapter)
        self.session.mount("http://", adapter)
        self.auth = Login(self.session, reference, login)

    def close(self) -> None:
        """Close its connections."""
        self.session.close()

    def document(self, name: str, limit: int) -> tuple[bytes, str]:
        """Give a manifest or index by tag or digest, unchecked, and its media type."""
        with self._get(f"manifests/{name}", {"Accept": manifest.ACCEPT}) as response:
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            data = b"".join(wire.bounded(wire.read(response, self._wire), limit + 1))
        if len(data) > limit:
            raise InvalidImage(f"Its manifest is larger than {layout.size(limit)}.")
        return data, kind

    @contextlib.contextmanager
    def blob(self, blob: Blob, offset: int) -> Iterator[Body]:
        """Open a blob at an offset, or at 0 where the registry knows no ranges."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self._get(f"blobs/{blob.digest}", headers) as response:
            start = self._start(response, offset)
            length = response.headers.get("Content-Length", "")
            if re.fullmatch(r"\d{1,19}", length, re.ASCII) and start + int(length) != blob.size:
                raise RegistryUntrusted(
                    f"{self._reference.registry} has {start + int(length)} bytes as {blob.digest[:19]},"
                    f" which is to have {blob.size}."
                )
            yield Body(start, wire.read(response, self._wire))

    def _start(self, response: requests.Response, offset: int) -> int:
        """Tell where in its blob an answer begins (RFC 9110, section 14.4)."""
        if response.status_code != 206:
            return 0
        found = re.match(r"bytes (\d{1,19})-", response.headers.get("Content-Range", ""), re.ASCII)
        if found is None or int(found.group(1)) != offset:
            raise RegistryUntrusted(f"{self._reference.registry} sent another part of a blob than was asked.")
        return offset

    @contextlib.contextmanager
    def _get(self, what: str, headers: dict[str, str]) -> Iterator[requests.Response]:
        url = f"{self.prefix}://{self._reference.registry}/v2/{self._reference.repository}/{what}"
        try:
            response = self.do_request(url, "GET", headers=headers, stream=True)
        except (requests.RequestException, ValueError) as error:  # requests lets some of urllib's through
            self._wire.check()
            raise self._told(error) from None
        try:
            self._judge(response)
            yield response
        finally:
            response.close()

    def _told(self, error: Exception) -> RegistryError:
        """Put what went wrong on the way into a sentence."""
        registry = self._reference.registry
        if isinstance(error, requests.TooManyRedirects):
            return RegistryUntrusted(f"{registry} redirects more than {MAX_REDIRECTS} times.")
        if isinstance(error, ValueError):  # what requests says of an address or header it cannot use
            return RegistryUntrusted(f"{registry} points to an address that is none.")
        return RegistryUnreachable(f"{registry} cannot be reached: {wire.tell(error)}.")

    def _judge(self, response: requests.Response) -> None:
        """Raise what an answer's status means, unless it is the thing itself."""
        status, registry = response.status_code, self._reference.registry
        if status in (200, 206):
            return
        if status in (401, 403):
            raise self.auth.denied()
        if status == 404:
            raise ImageUnknown(f"{registry} does not have {self._reference}.")
        if status == 429 or status >= 500:
            raise RegistryUnreachable(
                f"{registry} answers {status} just now.", hint="Try again in a few minutes."
            )
        raise RegistryError(f"{registry} answers {status}, which banger does not understand.")


class _Token(msgspec.Struct):
    token: str = ""
    access_token: str = ""


class Login(TokenAuth):  # type: ignore[misc]  # oras ships no type marker
    """Answers a registry's challenges (RFC 9110, section 11.6; Docker's token specification).

    A login goes to the registry that it is for, and to the realm which that registry itself names.
    """

    def __init__(self, session: requests.Session, reference: Reference, login: Credentials | None):
        super().__init__()
        self.session = session
        self._reference, self._login = reference, login
        self._header: str | None = None

    def get_auth_header(self) -> dict[str, str]:
        """Give the header that the last challenge was answered with."""
        return {"Authorization": self._header} if self._header else {}

    def authenticate_request(
        self, original: requests.Response, headers: dict[str, str], **_: bool
    ) -> tuple[dict[str, str], bool]:
        """Answer a 401 or 403; oras then asks again, and keeps what `token` says for the next request.

        Raises RegistryDenied.
        """
        original.close()
        challenge = original.headers.get("Www-Authenticate", "")
        scheme = challenge.partition(" ")[0].lower()
        # A host that was redirected to must not say where this registry's login is to be sent.
        if split_host(self._reference.registry) != urlsplit(original.url).hostname:
            raise self.denied()
        if scheme == "basic":
            self._header = self._basic()
        elif scheme == "bearer":
            self._header = f"Bearer {self._bearer(oras.auth.utils.parse_auth_header(challenge))}"
        else:
            raise self.denied()
        self.token = self._header  # oras asks only whether it is there
        return {**headers, **self.get_auth_header()}, True

    def denied(self) -> RegistryDenied:
        """Say that the user has no right to this image."""
        if self._login is None:
            return RegistryDenied(f"{self._reference.registry} does not give {self._reference} to everybody.")
        return RegistryDenied(f"{self._reference.registry} does not give {self._reference} to your login.")

    def _basic(self) -> str:
        if self._login is None or self._login.identity_token:
            raise self.denied()
        return f"Basic {self._login.basic}"

    def _bearer(self, challenge: Any) -> str:
        """Get a token from the realm of a challenge; one that goes on is not followed with a login."""
        if not challenge.realm:
            raise self.denied()
        about = {"service": challenge.service, "scope": challenge.scope}
        asked = {key: value for key, value in about.items() if value}
        login = self._login
        if login is not None and login.identity_token:
            form = {"grant_type": "refresh_token", "client_id": "banger", **asked}
            answer = self.session.post(
                challenge.realm, data={**form, "refresh_token": login.identity_token}, allow_redirects=False
            )
        else:
            headers = {"Authorization": f"Basic {login.basic}"} if login else {}
            answer = self.session.get(
                challenge.realm, params=asked, headers=headers, allow_redirects=login is None
            )
        return self._token_in(answer)

    def _token_in(self, answer: requests.Response) -> str:
        if answer.status_code != 200:
            raise self.denied()
        try:
            found = msgspec.json.decode(answer.content, type=_Token)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = _Token()
        token = found.token or found.access_token
        if not re.fullmatch(r"[\x21-\x7e]+", token, re.ASCII):
            raise RegistryUntrusted(f"{self._reference.registry} gives tokens that are none.")
        return token
