"""Pulls from a real registry on loopback, with images that were pushed over HTTP and with skopeo."""

from __future__ import annotations

import base64
import datetime
import gzip
import io
import os
import subprocess
import tarfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.x509.oid import NameOID

from banger.errors import ImageUnknown, InvalidImage, RegistryDenied, RegistryUnreachable
from banger.images.remote import blobs, registry
from banger.images.remote.oci import Pulled
from banger.testing.registry import CONFIG, INDEX, LAYER, MANIFEST, Registry
from tests.images import hostile
from tests.images.hostile import Server, digest

USER, PASSWORD, WRONG = "ada", "correct horse", "battery staple"
# bcrypt of the password, as `htpasswd -nB` prints it; the registry takes no other kind.
HTPASSWD = "ada:$2b$04$It5UTiRxyap1NqOD0iUNLeYByroERr5SSSTpucn6N8t0SNclneAce\n"


def tar(**files: bytes) -> bytes:
    """Make a plain tar of regular files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


LOWER, UPPER = tar(passwd=b"root" * 5000), tar(motd=os.urandom(300_000))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that lets everybody in, with one image."""
    with Registry(tmp_path_factory.mktemp("registry")) as started:
        started.image("tools/demo", "1", LOWER, UPPER, config={"Env": ["A=b"], "User": "../root"})
        yield started


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has logged in nowhere."""
    return {"HOME": str(tmp_path / "home")}


def files(place: Path) -> set[str]:
    """List the blobs and parts by name."""
    return {path.name for path in (place / "sha256").iterdir()} if (place / "sha256").exists() else set()


def contents(pulled: Pulled) -> list[bytes]:
    return [layer.path.read_bytes() for layer in pulled.layers]


def test_an_image_is_pulled_whole(server: Registry, tmp_path: Path, home: dict[str, str]) -> None:
    """Layers come oldest first, byte for byte, with what the configuration says of them and of itself."""
    found = registry.pull(f"{server.host}/tools/demo:1", tmp_path, environ=home)
    assert contents(found) == [LOWER, UPPER]
    assert [layer.diff_id for layer in found.layers] == [digest(LOWER), digest(UPPER)]
    assert (found.config.env, found.config.user) == (("A=b",), "../root")
    assert all(layer.path.stat().st_mode & 0o777 == 0o400 for layer in found.layers)
    assert not any(name.endswith(".part") for name in files(tmp_path))


def test_a_second_pull_fetches_nothing_that_is_here(
    server: Registry, tmp_path: Path, home: dict[str, str]
) -> None:
    """Blobs are kept by digest: the files of the first pull are those of the second, untouched."""
    name = f"{server.host}/tools/demo:1"
    lines: list[str] = []
    first = registry.pull(name, tmp_path, environ=home)
    before = {layer.path: layer.path.stat().st_ino for layer in first.layers}
    assert registry.pull(name, tmp_path, environ=home, progress=lines.append) == first
    assert {path: path.stat().st_ino for path in before} == before
    assert [line.endswith("here already") for line in lines] == [True, True]


def test_a_digest_pins_an_image(server: Registry, tmp_path: Path, home: dict[str, str]) -> None:
    """A tag moves on, what was resolved is named by its digest, and is still what comes for it."""
    server.image("moving", "tag", LOWER)
    old = registry.pull(f"{server.host}/moving:tag", tmp_path / "a", environ=home)
    server.image("moving", "tag", UPPER)
    new = registry.pull(f"{server.host}/moving:tag", tmp_path / "a", environ=home)
    assert (contents(old), contents(new)) == ([LOWER], [UPPER])
    again = registry.pull(f"{server.host}/moving:tag@{old.digest}", tmp_path / "b", environ=home)
    assert (again.digest, contents(again)) == (old.digest, [LOWER])


def test_an_image_that_is_here_needs_no_registry(tmp_path: Path, home: dict[str, str]) -> None:
    """By digest, what was pulled once is found when its registry is gone."""
    with Registry(tmp_path / "registry") as gone:
        gone.image("x", "1", LOWER)
        first = registry.pull(f"{gone.host}/x:1", tmp_path, environ=home)
    again = registry.pull(f"{gone.host}/x@{first.digest}", tmp_path, environ=home)
    assert (again.digest, again.layers) == (first.digest, first.layers)
    with pytest.raises(RegistryUnreachable):
        registry.pull(f"{gone.host}/x:1", tmp_path, environ=home)


def descriptor(server: Registry, name: str, layer: bytes, architecture: str) -> dict[str, Any]:
    made = server.image(name, architecture, layer, architecture=architecture)
    return {**made, "platform": {"os": "linux", "architecture": architecture}}


def test_an_index_is_read_for_this_machine(server: Registry, tmp_path: Path, home: dict[str, str]) -> None:
    """Of several platforms the one for linux/amd64 is taken, and its own digest is the one given."""
    arm, amd = descriptor(server, "multi", LOWER, "arm64"), descriptor(server, "multi", UPPER, "amd64")
    server.manifest("multi", "1", {"schemaVersion": 2, "mediaType": INDEX, "manifests": [arm, amd]})
    found = registry.pull(f"{server.host}/multi:1", tmp_path, environ=home)
    assert (found.digest, contents(found)) == (amd["digest"], [UPPER])
    assert digest(LOWER).removeprefix("sha256:") not in files(tmp_path)
    server.manifest("multi", "arm", {"schemaVersion": 2, "mediaType": INDEX, "manifests": [arm]})
    with pytest.raises(InvalidImage, match="no linux/amd64"):
        registry.pull(f"{server.host}/multi:arm", tmp_path, environ=home)
    with pytest.raises(InvalidImage, match="arm64"):
        registry.pull(f"{server.host}/multi:arm64", tmp_path, environ=home)


@pytest.mark.parametrize("options", [["--format=oci"], ["--format=v2s2"], ["--dest-compress-format=zstd"]])
def test_what_skopeo_pushes_is_pulled(
    options: list[str], server: Registry, tmp_path: Path, home: dict[str, str]
) -> None:
    """Docker's and OCI's formats, with gzip and zstd layers, as another program makes them."""
    # Layers of its own: skopeo does not push again, nor compress otherwise, what it knows is there.
    plain = [tar(data=os.urandom(50_000)), tar(data=os.urandom(10))]
    layout = lay_out(tmp_path / "layout", *plain)
    target = f"docker://{server.host}/skopeo/demo:{options[0].rpartition('=')[2]}"
    policy = ["--insecure-policy", "copy", "--dest-tls-verify=false", *options]
    subprocess.run(
        ["skopeo", *policy, f"oci:{layout}:1", target],
        check=True,
        capture_output=True,
        env={**os.environ, **home},
    )
    found = registry.pull(target.removeprefix("docker://"), tmp_path / "blobs", environ=home)
    assert [layer.diff_id for layer in found.layers] == [digest(data) for data in plain]
    for layer in found.layers:
        assert digest(layer.path.read_bytes()) == layer.digest
    if options == ["--dest-compress-format=zstd"]:
        assert all(layer.path.read_bytes().startswith(b"\x28\xb5\x2f\xfd") for layer in found.layers)
    else:
        assert [gzip.decompress(data) for data in contents(found)] == plain


def lay_out(place: Path, *layers: bytes) -> Path:
    """Write an image as an OCI image layout (image-spec, image-layout.md), tagged 1."""
    (place / "blobs/sha256").mkdir(parents=True)

    def keep(data: bytes, kind: str) -> dict[str, Any]:
        (place / "blobs/sha256" / digest(data).removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": kind, "digest": digest(data), "size": len(data)}

    ids = [digest(layer) for layer in layers]
    about = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": ids}}
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": keep(msgspec.json.encode(about), CONFIG),
        "layers": [keep(layer, LAYER) for layer in layers],
    }
    entry = keep(msgspec.json.encode(document), MANIFEST)
    entry["annotations"] = {"org.opencontainers.image.ref.name": "1"}
    (place / "index.json").write_bytes(msgspec.json.encode({"schemaVersion": 2, "manifests": [entry]}))
    (place / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return place


def test_an_unknown_image_is_told(server: Registry, tmp_path: Path, home: dict[str, str]) -> None:
    """A tag and a repository that are not there: one sentence with the name, and nothing on the disk."""
    for name in ("tools/demo:none", "nothing/here:1"):
        with pytest.raises(ImageUnknown, match=name) as told:
            registry.pull(f"{server.host}/{name}", tmp_path / "blobs", environ=home)
        assert told.value.hint
    assert files(tmp_path / "blobs") == set()


def test_an_image_over_the_limit_is_refused(server: Registry, tmp_path: Path, home: dict[str, str]) -> None:
    """The sizes that a manifest tells are added up before anything of it is fetched."""
    limits = registry.Limits(image_bytes=len(LOWER) + len(UPPER))
    with pytest.raises(InvalidImage, match="allowed"):
        registry.pull(f"{server.host}/tools/demo:1", tmp_path, environ=home, limits=limits)
    assert not any(blobs.path_of(tmp_path, digest(layer)).exists() for layer in (LOWER, UPPER))


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that wants a password, with one image."""
    place = tmp_path_factory.mktemp("locked")
    (place / "htpasswd").write_text(HTPASSWD)
    auth = {"htpasswd": {"realm": "test", "path": str(place / "htpasswd")}}
    with Registry(place, auth=auth) as started:
        started.headers["Authorization"] = f"Basic {encoded(PASSWORD)}"
        started.image("secret", "1", LOWER)
        yield started


def log_in(home: dict[str, str], host: str, password: str) -> None:
    """Log in with skopeo, which keeps logins as podman does."""
    place = Path(home["HOME"], ".config/containers/auth.json")
    place.parent.mkdir(parents=True, exist_ok=True)
    words = [
        "login",
        "--tls-verify=false",
        f"--authfile={place}",
        f"--username={USER}",
        "--password-stdin",
        host,
    ]
    subprocess.run(["skopeo", *words], input=password.encode(), check=True, capture_output=True)


def test_a_login_opens_what_is_locked(locked: Registry, tmp_path: Path, home: dict[str, str]) -> None:
    """Without a login the registry refuses, with the one that skopeo has kept it gives the image."""
    name = f"{locked.host}/secret:1"
    with pytest.raises(RegistryDenied, match="everybody") as told:
        registry.pull(name, tmp_path / "blobs", environ=home)
    assert "login" in str(told.value.hint)
    assert files(tmp_path / "blobs") == set()
    log_in(home, locked.host, PASSWORD)
    assert contents(registry.pull(name, tmp_path / "blobs", environ=home)) == [LOWER]


def test_a_wrong_password_is_told_and_not_shown(
    locked: Registry, tmp_path: Path, home: dict[str, str]
) -> None:
    """A login that the registry does not take: one sentence, without the password in any form."""
    keep_login(home, locked.host, WRONG)
    with pytest.raises(RegistryDenied, match="your login") as told:
        registry.pull(f"{locked.host}/secret:1", tmp_path, environ=home)
    trace = traceback.TracebackException.from_exception(told.value, capture_locals=True)
    shown = "".join([*trace.format(), str(told.value.to_dict())])
    assert not any(secret in shown for secret in (WRONG, encoded(WRONG)))


def encoded(password: str) -> str:
    return base64.b64encode(f"{USER}:{password}".encode()).decode()


def keep_login(home: dict[str, str], host: str, password: str) -> None:
    """Keep a login as `docker login` does."""
    place = Path(home["HOME"], ".docker/config.json")
    place.parent.mkdir(parents=True)
    place.write_bytes(msgspec.json.encode({"auths": {host: {"auth": encoded(password)}}}))


def test_no_registry_is_told(tmp_path: Path, home: dict[str, str]) -> None:
    """Nobody listens, and a name that is none: told with the host, at once."""
    for host, reason in (("127.0.0.1:1", "refused"), ("no-such-host.invalid", "cannot be found")):
        with pytest.raises(RegistryUnreachable, match=reason) as told:
            registry.pull(f"{host}/x:1", tmp_path, environ=home)
        assert host.partition(":")[0] in told.value.message


class Realm:
    """Gives tokens that a real registry takes (distribution's token specification; RFC 7519, RFC 7515)."""

    def __init__(self, place: Path):
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "realm")])
        now = datetime.datetime.now(datetime.UTC)
        self._certificate = (
            x509.CertificateBuilder(name, name, self._key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = place / "realm.pem"
        self.certificate.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def token(self, name: str) -> str:
        """Allow to pull and push one repository, for a minute."""
        der = self._certificate.public_bytes(serialization.Encoding.DER)
        header = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
        now = int(time.time())
        access = [{"type": "repository", "name": name, "actions": ["pull", "push"]}]
        times = {"exp": now + 60, "nbf": now - 60, "iat": now, "jti": "1"}
        claims = {"iss": "realm", "aud": "test", "sub": USER, "access": access, **times}
        signed = b".".join(url64(msgspec.json.encode(part)) for part in (header, claims))
        r, s = utils.decode_dss_signature(self._key.sign(signed, ec.ECDSA(hashes.SHA256())))
        return (signed + b"." + url64(r.to_bytes(32, "big") + s.to_bytes(32, "big"))).decode()


def url64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def test_a_token_opens_a_real_registry(tmp_path: Path, home: dict[str, str]) -> None:
    """The registry names its realm, the realm gets the login, and its token opens manifest and layers."""
    realm = Realm(tmp_path)
    with Server() as tokens:
        given = hostile.plain(msgspec.json.encode({"token": realm.token("secret")}), "application/json")
        tokens.answers["/token"] = hostile.challenged("Basic", f"Basic {encoded(PASSWORD)}", given)
        about = {"issuer": "realm", "service": "test", "rootcertbundle": str(realm.certificate)}
        auth = {"token": {"realm": f"http://{tokens.host}/token", **about}}
        with Registry(tmp_path / "registry", auth=auth) as guarded:
            guarded.headers["Authorization"] = f"Bearer {realm.token('secret')}"
            guarded.image("secret", "1", LOWER, UPPER)
            with pytest.raises(RegistryDenied, match="everybody"):
                registry.pull(f"{guarded.host}/secret:1", tmp_path / "blobs", environ=home)
            keep_login(home, guarded.host, PASSWORD)
            pulled = registry.pull(f"{guarded.host}/secret:1", tmp_path / "blobs", environ=home)
    assert contents(pulled) == [LOWER, UPPER]
    asked = {path for path, _ in tokens.asked}
    assert asked == {"/token?service=test&scope=repository%3Asecret%3Apull"}
