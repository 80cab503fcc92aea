from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger import proc
from banger.errors import Cancelled, RegistryDenied
from banger.images.remote import credentials
from banger.images.remote.credentials import Credentials


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has logged in nowhere."""
    return {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}


def encoded(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def keep(place: Path, **content: Any) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(msgspec.json.encode(content))


def login(user: str) -> dict[str, Any]:
    return {"host:5000": {"auth": encoded(user, "pass:word")}}


def user_of(home: dict[str, str], registry: str = "host:5000", repository: str = "a/b") -> str | None:
    found = credentials.find(registry, repository, home)
    return found.user if found else None


def test_each_place_is_looked_at_in_turn(tmp_path: Path, home: dict[str, str]) -> None:
    """Docker's file counts before podman's two, and DOCKER_CONFIG takes the place of the first."""
    assert user_of(home) is None
    keep(tmp_path / ".config/containers/auth.json", auths=login("fourth"))
    assert user_of(home) == "fourth"
    keep(tmp_path / "run/containers/auth.json", auths=login("third"))
    assert user_of(home) == "third"
    keep(tmp_path / ".docker/config.json", auths=login("second"))
    assert user_of(home) == "second"
    keep(tmp_path / "elsewhere/config.json", auths=login("first"))
    assert user_of({**home, "DOCKER_CONFIG": str(tmp_path / "elsewhere")}) == "first"
    assert user_of(home, registry="other") is None


def test_a_password_may_hold_anything(tmp_path: Path, home: dict[str, str]) -> None:
    """Only the first colon parts user and password, and the header is what was filed."""
    keep(tmp_path / ".docker/config.json", auths=login("ada"))
    found = credentials.find("host:5000", "a", home)
    assert found == Credentials(user="ada", password="pass:word")  # noqa: S106
    assert found.basic == encoded("ada", "pass:word")


def test_the_narrowest_login_counts(tmp_path: Path, home: dict[str, str]) -> None:
    """Podman files logins for parts of a registry; a longer one counts before a shorter."""
    names = ("host", "host/team", "host/team/app")
    keep(tmp_path / ".docker/config.json", auths={name: {"auth": encoded(name, "x")} for name in names})
    assert user_of(home, "host", "team/app") == "host/team/app"
    assert user_of(home, "host", "team/other") == "host/team"
    assert user_of(home, "host", "teamwork/x") == "host"


@pytest.mark.parametrize("key", ["https://host/v1/", "https://host", "host"])
def test_a_registry_has_several_names(tmp_path: Path, home: dict[str, str], key: str) -> None:
    """Docker files logins under an old URL, too."""
    keep(tmp_path / ".docker/config.json", auths={key: {"auth": encoded("ada", "x")}})
    assert user_of(home, "host", "library/debian") == "ada"


def test_an_identity_token_counts_before_a_password(tmp_path: Path, home: dict[str, str]) -> None:
    """What docker files after a login in a browser is a token to be exchanged."""
    entry = {"auth": encoded("ada", "x"), "identitytoken": "refresh"}
    keep(tmp_path / ".docker/config.json", auths={"host": entry})
    assert credentials.find("host", "a", home) == Credentials(identity_token="refresh")  # noqa: S106


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"auths": 1}', b"[" * 100_000, b'{"auths": {"host": {"auth": "%"}}}', b"\xff"]
)
def test_a_broken_file_is_told_by_name(tmp_path: Path, home: dict[str, str], content: bytes) -> None:
    """What cannot be read is not passed over in silence, and its content is not shown."""
    place = tmp_path / ".docker/config.json"
    place.parent.mkdir()
    place.write_bytes(content)
    with pytest.raises(RegistryDenied, match=r"config\.json cannot be read") as told:
        credentials.find("host", "a", home)
    assert told.value.__cause__ is None


def test_secrets_are_not_shown() -> None:
    """What a log line or a traceback shows of a login says nothing."""
    shown = repr(Credentials(user="ada", password="secret", identity_token="refresh"))  # noqa: S106
    assert shown == "Credentials(…)"


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A credential helper called `vault` that knows one host, and keeps what it was asked."""
    place = tmp_path / "bin/docker-credential-vault"
    place.parent.mkdir()
    place.write_text(
        "#!/bin/sh\n"
        f'read key; echo "$1 $key" >>{tmp_path}/asked\n'
        'case $key in slow) sleep 60;; odd) echo "hello"; exit;; token) user="<token>";; known) user=ada;;\n'
        '*) echo "credentials not found in native keychain"; exit 1;; esac\n'
        'printf \'{"ServerURL":"%s","Username":"%s","Secret":"hidden"}\' "$key" "$user"\n'
    )
    place.chmod(0o755)
    monkeypatch.setattr(proc, "SEARCH_PATH", os.pathsep.join([str(place.parent), proc.SEARCH_PATH]))
    return tmp_path / "asked"


def test_a_store_is_asked(tmp_path: Path, home: dict[str, str], helper: Path) -> None:
    """`credsStore` names the program for every registry; one that it does not know is no error."""
    keep(tmp_path / ".docker/config.json", credsStore="vault", auths={"known": {}})
    assert credentials.find("known", "a", home) == Credentials(user="ada", password="hidden")  # noqa: S106
    assert credentials.find("token", "a", home) == Credentials(identity_token="hidden")  # noqa: S106
    assert credentials.find("unknown", "a", home) is None
    assert helper.read_text().splitlines() == ["get known", "get token", "get unknown"]


def test_a_helper_is_asked_for_its_registry_only(tmp_path: Path, home: dict[str, str], helper: Path) -> None:
    """`credHelpers` names programs for some registries; the others are not told to them."""
    keep(tmp_path / ".docker/config.json", credHelpers={"known": "vault"})
    assert user_of(home, "known") == "ada"
    assert user_of(home, "other") is None
    assert helper.read_text().splitlines() == ["get known"]


def test_a_slow_helper_can_be_left(
    tmp_path: Path, home: dict[str, str], helper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A helper that waits for a key of the keyboard ends with the pull, or with its time."""
    keep(tmp_path / ".docker/config.json", credsStore="vault")
    with pytest.raises(Cancelled):
        credentials.find("slow", "a", home, lambda: True)
    monkeypatch.setattr(credentials, "HELPER_TIMEOUT_S", 0.2)
    with pytest.raises(RegistryDenied, match="did not end within"):
        credentials.find("slow", "a", home)


@pytest.mark.parametrize(
    ("store", "told"),
    [("no-such", "not installed"), ("../../bin/sh", "not the name"), ("vault", "else than")],
)
def test_a_helper_that_cannot_be_used_is_told(
    tmp_path: Path, home: dict[str, str], helper: Path, store: str, told: str
) -> None:
    """A missing program, a path in the place of a name, an answer that is none: one sentence each."""
    keep(tmp_path / ".docker/config.json", credsStore=store)
    with pytest.raises(RegistryDenied, match=told):
        credentials.find("odd", "a", home)
