"""Registries that break, lie, dawdle, or point to where a pull must not go."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests

from banger.errors import (
    BangerError,
    Cancelled,
    DiskFull,
    InvalidImage,
    RegistryDenied,
    RegistrySlow,
    RegistryUnreachable,
    RegistryUntrusted,
)
from banger.images.remote import blobs, registry
from banger.testing.registry import INDEX, LAYER, MANIFEST
from tests.images import hostile
from tests.images.hostile import Server, blob_path, digest

DATA = hashlib.shake_256(b"a layer").digest(10_007)
LIMITS = registry.Limits(retries=1)


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that offers nothing yet."""
    with Server() as started:
        yield started


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where blobs are kept."""
    return tmp_path / "blobs"


def pull(server: Server, place: Path, **more: Any) -> list[bytes]:
    """Pull `x:1`, logged in nowhere; give its layers."""
    more = {"limits": LIMITS, "environ": {"HOME": str(place.parent)}, **more}
    return [layer.path.read_bytes() for layer in registry.pull(f"{server.host}/x:1", place, **more).layers]


def refused(kind: type[BangerError], match: str, server: Server, place: Path, **more: Any) -> BangerError:
    """Pull what must be refused, within seconds; nothing of a layer may be left, nor a part of anything."""
    begun = time.monotonic()
    with pytest.raises(kind, match=match) as told:
        pull(server, place, **more)
    assert time.monotonic() - begun < 10
    assert not blobs.path_of(place, digest(DATA)).exists()
    assert parts(place) == []
    assert "\n" not in told.value.message
    return told.value


def parts(place: Path) -> list[int]:
    """Give the sizes of the parts that are there."""
    return [path.stat().st_size for path in place.glob("sha256/*.part")]


def until(true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Breaks


@pytest.mark.parametrize("every", [1, 97, 1000, 4096, len(DATA) - 1])
def test_a_connection_that_breaks_loses_nothing(server: Server, place: Path, every: int) -> None:
    """However often it is cut, the pull goes on where it was: each byte is sent once."""
    data = DATA[:150] if every == 1 else DATA
    (path,) = server.image(data)
    server.answers[path] = hostile.cut_after(data, every)
    assert pull(server, place) == [data]
    assert server.sent[path] == len(data)
    offsets = [headers.get("Range") for headers in server.asked_of(path)]
    assert offsets == [None, *(f"bytes={n}-" for n in range(every, len(data), every))]


def test_a_cut_at_any_byte_is_resumed_there(server: Server, place: Path) -> None:
    """For each byte of a blob: a pull that ends there for good leaves it, and the next goes on with it."""
    data = DATA[:64]
    (path,) = server.image(data)
    limits = registry.Limits(retries=0)
    for count in range(len(data)):
        server.answers[path] = first_then(hostile.cut_after(data, count), hostile.cut_after(data, 0))
        with pytest.raises(RegistryUnreachable, match=f"{count} of the 64 bytes"):
            pull(server, place, limits=limits)
        assert parts(place) == ([count] if count else [])
        server.answers[path] = hostile.whole(data)
        server.sent.clear()
        assert pull(server, place, limits=limits) == [data]
        assert server.sent[path] == len(data) - count
        blobs.path_of(place, digest(data)).unlink()


def first_then(first: hostile.Answer, then: hostile.Answer) -> hostile.Answer:
    """Answer once in one way, and from then on in another."""
    answers = [first]
    return lambda request: (answers.pop() if answers else then)(request)


PULL = """
import sys
from pathlib import Path
from banger.images.remote import registry
registry.pull(sys.argv[1], Path(sys.argv[2]), environ={"HOME": "/nonexistent"})
"""


@pytest.mark.parametrize("count", [1, 2048, len(DATA) - 1])
def test_a_killed_pull_is_resumed(server: Server, place: Path, count: int) -> None:
    """SIGKILL leaves what had come and no lock; the next pull asks for the rest only."""
    (path,) = server.image(DATA)
    server.answers[path] = hostile.held(DATA, count)
    child = subprocess.Popen([sys.executable, "-c", PULL, f"{server.host}/x:1", str(place)])
    try:
        until(lambda: parts(place) == [count])
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    server.answers[path] = hostile.whole(DATA)
    assert pull(server, place) == [DATA]
    assert server.sent[path] == len(DATA)
    assert parts(place) == []


def test_a_cancelled_pull_ends_at_once_and_is_resumed(server: Server, place: Path) -> None:
    """While the registry is silent a pull can be cancelled; what had come is not fetched again."""
    (path,) = server.image(DATA)
    server.answers[path] = hostile.held(DATA, 5000)
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        pull(server, place, cancelled=lambda: parts(place) == [5000])
    assert time.monotonic() - begun < 2
    server.answers[path] = hostile.whole(DATA)
    assert pull(server, place) == [DATA]
    assert server.sent[path] == len(DATA)


def test_a_registry_without_ranges_is_read_from_the_beginning(server: Server, place: Path) -> None:
    """What is sent from 0 again takes the place of the part, and is not appended to it."""
    (path,) = server.image(DATA)
    server.answers[path] = hostile.rangeless(DATA, 4000, 2000)
    assert pull(server, place) == [DATA]
    assert server.sent[path] == len(DATA) + 6000


def test_a_wrong_part_is_replaced(server: Server, place: Path) -> None:
    """A part that is not the beginning of its blob, or longer than it, costs one whole fetch."""
    server.image(DATA)
    part = blobs.path_of(place, digest(DATA)).with_suffix(".part")
    for wrong in (b"not the beginning", DATA + b"!", bytes(len(DATA))):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(wrong)
        assert pull(server, place) == [DATA]
        blobs.path_of(place, digest(DATA)).unlink()


def test_a_blob_that_never_comes_whole_is_told(server: Server, place: Path) -> None:
    """A registry that cuts at the same byte each time: an error that tells how far it came, and the part."""
    (path,) = server.image(DATA)
    server.answers[path] = first_then(hostile.cut_after(DATA, 700), hostile.cut_after(DATA, 0))
    with pytest.raises(RegistryUnreachable, match="700 of the 10007 bytes") as told:
        pull(server, place)
    assert "kept" in str(told.value.hint)
    assert parts(place) == [700]


def test_a_busy_registry_is_asked_again(server: Server, place: Path) -> None:
    """One 503 for a manifest and one for a blob are waited out."""
    (path,) = server.image(DATA)
    busy = hostile.plain(b"", "text/plain", 503)
    for asked in ("/v2/x/manifests/1", path):
        server.answers[asked] = first_then(busy, server.answers[asked])
    assert pull(server, place) == [DATA]
    server.answers["/v2/x/manifests/1"] = busy
    with pytest.raises(RegistryUnreachable, match="503"):
        pull(server, place)


# Two at once


def test_two_pulls_fetch_a_blob_once(server: Server, place: Path) -> None:
    """The second waits for the first, and uses what came."""
    (path,) = server.image(DATA)
    go_on = threading.Event()

    def answer(request: hostile.Request) -> None:
        assert go_on.wait(20)
        hostile.whole(DATA)(request)

    server.answers[path] = answer
    with ThreadPoolExecutor() as two:
        pulls = [two.submit(pull, server, place) for _ in range(2)]
        until(lambda: len(server.asked_of("/v2/x/manifests/1")) == 2)
        until(lambda: len(server.asked_of(path)) == 1)
        go_on.set()
        assert [future.result() for future in pulls] == [[DATA], [DATA]]
    assert len(server.asked_of(path)) == 1
    assert parts(place) == []


def test_a_cancelled_waiter_leaves_and_the_first_goes_on(server: Server, place: Path) -> None:
    """Cancelling the second pull of a blob takes nothing from the first."""
    (path,) = server.image(DATA)
    go_on, waiting = threading.Event(), threading.Event()

    def answer(request: hostile.Request) -> None:
        assert go_on.wait(20)
        hostile.whole(DATA)(request)

    server.answers[path] = answer
    with ThreadPoolExecutor() as two:
        first = two.submit(pull, server, place)
        until(lambda: len(server.asked_of(path)) == 1)
        second = two.submit(pull, server, place, cancelled=waiting.is_set)
        until(lambda: len(server.asked_of("/v2/x/manifests/1")) == 2)
        waiting.set()
        with pytest.raises(Cancelled):
            second.result()
        go_on.set()
        assert first.result() == [DATA]


@pytest.mark.parametrize("how", ["failed", "finished"])
def test_a_part_that_goes_before_it_is_locked_is_not_used(
    server: Server, place: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Between open and lock another pull may fail and remove the part, or make it the blob."""
    server.image(DATA)
    path = blobs.path_of(place, digest(DATA))
    part = path.with_suffix(".part")
    real, races = fcntl.flock, [True]

    def flock(fd: int, how_to: int) -> None:
        if races and part.exists():
            races.clear()
            if how == "finished":
                part.write_bytes(DATA)
                part.rename(path)
            else:
                part.unlink()
        real(fd, how_to)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert pull(server, place) == [DATA]
    assert races == []
    assert parts(place) == []


def test_layers_come_in_parallel(server: Server, place: Path) -> None:
    """Three layers are asked for before the first of them has come, and the fourth is not."""
    layers = [bytes([number]) * 100 for number in range(4)]
    paths = server.image(*layers)
    together = threading.Barrier(3)
    for path, layer in zip(paths, layers, strict=True):
        server.answers[path] = meeting(together if path != paths[3] else None, layer)
    assert pull(server, place) == layers


def meeting(point: threading.Barrier | None, data: bytes) -> hostile.Answer:
    def answer(request: hostile.Request) -> None:
        if point is not None:
            point.wait(10)
        hostile.whole(data)(request)

    return answer


def test_a_layer_that_is_there_twice_is_fetched_once(server: Server, place: Path) -> None:
    """An image may have one blob as two of its layers."""
    (path, _) = server.image(DATA, DATA)
    assert pull(server, place) == [DATA, DATA]
    assert len(server.asked_of(path)) == 1


# Lies


LIES: dict[str, tuple[hostile.Answer, str]] = {
    "another blob": (hostile.whole(bytes(len(DATA))), "digest is not that"),
    "one bit": (hostile.whole(bytes([DATA[0] ^ 1]) + DATA[1:]), "digest is not that"),
    "a byte less": (hostile.whole(DATA[:-1]), "which is to have 10007"),
    "a byte more": (hostile.whole(DATA + b"!"), "which is to have 10007"),
    "a byte more, of no length": (hostile.endless(DATA + b"!"), "More came"),
    "no end, of no length": (hostile.endless(DATA * 100), "More came"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_blob_that_is_not_what_was_promised_is_refused(server: Server, place: Path, lie: str) -> None:
    """Digest and size are both checked, and what is proven wrong does not stay."""
    answer, told = LIES[lie]
    (path,) = server.image(DATA)
    server.answers[path] = answer
    refused(RegistryUntrusted, told, server, place)


def test_a_range_that_was_not_asked_for_is_refused(server: Server, place: Path) -> None:
    """A 206 from another offset is not written where it does not belong."""
    (path,) = server.image(DATA)
    shifted = hostile.plain(DATA[10:], "x/y", 206, **{"Content-Range": f"bytes 10-{len(DATA) - 1}/*"})
    server.answers[path] = first_then(hostile.cut_after(DATA, 100), shifted)
    refused(RegistryUntrusted, "another part", server, place)


def test_a_manifest_with_another_digest_is_refused(server: Server, place: Path) -> None:
    """What comes for a digest must have it, whatever the registry says."""
    server.image(DATA)
    name = f"{server.host}/x@{digest(b'something else')}"
    server.answers[f"/v2/x/manifests/{digest(b'something else')}"] = server.answers["/v2/x/manifests/1"]
    with pytest.raises(RegistryUntrusted, match="digest is not that"):
        registry.pull(name, place, environ={"HOME": "/nonexistent"})


# Slowness


def slow(**more: Any) -> registry.Limits:
    return registry.Limits(inactivity_s=0.5, retries=0, **more)


def test_silence_is_ended(server: Server, place: Path) -> None:
    """No byte for the time of the setting: one sentence, and what had come stays."""
    (path,) = server.image(DATA)
    server.answers[path] = hostile.held(DATA, 5000)
    begun = time.monotonic()
    limits = registry.Limits(inactivity_s=2.0)
    with pytest.raises(RegistrySlow) as told:
        pull(server, place, limits=limits)
    # From the last byte on: not twice as long, because there were enough bytes before it.
    assert 2.0 <= time.monotonic() - begun < 3.5
    assert told.value.hint
    assert parts(place) == [5000]


@pytest.mark.parametrize("asked", ["manifest", "layer"])
def test_a_trickle_is_ended(server: Server, place: Path, asked: str) -> None:
    """A byte now and then is no silence, and still too slow: for a layer, and for a manifest."""
    (path,) = server.image(DATA)
    path = path if asked == "layer" else "/v2/x/manifests/1"
    server.answers[path] = hostile.trickle(DATA, 0.1)
    begun = time.monotonic()
    with pytest.raises(RegistrySlow, match="less than 1024 bytes a second"):
        pull(server, place, limits=slow())
    assert time.monotonic() - begun < 3


def test_a_trickle_of_headers_is_ended(server: Server, place: Path) -> None:
    """An answer whose headers never end is too slow, though it is never silent."""

    def answer(request: hostile.Request) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not request.server.over.wait(0.1):
            request.wfile.write(b"X: y\r\n")

    server.answers["/v2/x/manifests/1"] = answer
    with pytest.raises(RegistrySlow):
        pull(server, place, limits=slow())


def test_a_slow_but_steady_registry_is_not_ended(server: Server, place: Path) -> None:
    """Three times the time of inactivity, with enough bytes in each, is no reason to end."""
    (path,) = server.image(DATA[:150])
    server.answers[path] = hostile.trickle(DATA[:150], 0.01)
    assert pull(server, place, limits=slow(min_bytes_s=10)) == [DATA[:150]]


def test_progress_is_told_now_and_then(server: Server, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer has a line every so often and one at its end, told in the caller's thread."""
    monkeypatch.setattr(registry, "PROGRESS_S", 0.4)
    data = bytes(3 << 20)
    (path,) = server.image(data, DATA)[:1]

    def answer(request: hostile.Request) -> None:
        request.begin(200, {"Content-Length": len(data)})
        for start in range(0, len(data), 1 << 16):
            request.send(data[start : start + (1 << 16)])
            request.server.over.wait(0.03)

    server.answers[path] = answer
    lines: list[tuple[str, int]] = []
    pull(server, place, progress=lambda line: lines.append((line, threading.get_ident())))
    of_first = [line for line, _ in lines if line.startswith("layer 1 of 2: ")]
    assert 2 <= len(of_first) <= 6
    assert of_first[-1] == "layer 1 of 2: 3MiB of 3MiB"
    assert sum(line.startswith("layer 2 of 2") for line, _ in lines) == 1
    assert {thread for _, thread in lines} == {threading.get_ident()}


# Full disks


def test_no_room_is_told_before_anything_is_fetched(server: Server, place: Path) -> None:
    """An image larger than what is free: its size and the room are told, and no layer is asked for."""
    (path,) = server.image(DATA, layers=[layer_of(1 << 60)])
    limits = registry.Limits(image_bytes=1 << 61)
    refused(DiskFull, "GiB are free", server, place, limits=limits)
    assert server.asked_of(path) == []


def layer_of(size: int) -> dict[str, Any]:
    return {"mediaType": LAYER, "digest": digest(DATA), "size": size}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_fills_up_is_told_and_not_kept_full(server: Server, tmp_path: Path) -> None:
    """ENOSPC in the midst of a layer: the part is gone, so its room is there for others."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], check=True)
    try:
        data = os.urandom(200_000)
        (path,) = server.image(data)

        def answer(request: hostile.Request) -> None:
            hostile.cut_after(data, 50_000)(request)
            (small / "somebody else's").write_bytes(bytes(100_000))

        server.answers[path] = first_then(answer, hostile.whole(data))
        with pytest.raises(DiskFull) as told:
            pull(server, small / "blobs")
        assert told.value.hint
        assert parts(small / "blobs") == []
    finally:
        subprocess.run(["umount", small], check=True)


# Where a registry may point to


@pytest.fixture
def elsewhere() -> Iterator[Server]:
    """Where a login must not go."""
    with Server() as started:
        yield started


def test_a_redirect_is_followed_without_the_login(
    server: Server, elsewhere: Server, place: Path, tmp_path: Path
) -> None:
    """Blobs may come from another host, which does not see what the registry does; ranges go with it."""
    log_in(tmp_path, server)
    (path,) = server.image(DATA)
    elsewhere.answers["/signed"] = first_then(hostile.cut_after(DATA, 5000), hostile.whole(DATA))
    pointed = hostile.redirect(f"http://localhost:{elsewhere.server_port}/signed?key=secret")
    server.answers[path] = pointed
    for asked, answer in server.answers.items():
        server.answers[asked] = hostile.challenged('Basic realm="x"', BASIC, answer)
    assert pull(server, place) == [DATA]
    assert [headers.get("Authorization") for headers in elsewhere.asked_of("/signed")] == [None, None]
    assert elsewhere.sent["/signed?key=secret"] == len(DATA)
    assert {headers.get("Authorization") for headers in server.asked_of(path)} == {BASIC}


BASIC = "Basic YWRhOnNlY3JldA=="


def log_in(home: Path, server: Server, **login: str) -> None:
    """Keep a login for the server: ada, with the password secret, unless told otherwise."""
    (home / ".docker").mkdir()
    entry = login or {"auth": BASIC.removeprefix("Basic ")}
    (home / ".docker/config.json").write_bytes(msgspec.json.encode({"auths": {server.host: entry}}))


ASTRAY = {
    "the cloud's metadata": "http://169.254.169.254/latest/meta-data",
    "the same, encrypted": "https://169.254.169.254/latest",
    "a private network": "https://10.0.0.1/x",
    "another one": "https://192.168.1.1:8443/x",
    "a shared network": "https://100.64.0.1/x",
    "IPv6 inside": "https://[fd00::1]/x",
    "link-local IPv6": "https://[fe80::1]/x",
    "IPv4 in IPv6": "https://[::ffff:10.0.0.1]/x",
    "IPv4 behind NAT64": "https://[64:ff9b::a00:1]/x",
    "a number": "https://2852039166/x",
    "octal": "https://0251.0376.0251.0376/x",
    "everywhere": "https://0.0.0.0/x",
    "multicast": "https://224.0.0.1/x",
    "plain http": "http://example.com/x",
    "a file": "file:///etc/passwd",
    "a socket": "http+unix://%2Frun%2Fdocker.sock/x",
    "ftp": "ftp://example.com/x",
    "gopher": "gopher://127.0.0.1:25/x",
    "nonsense": "https://[::1",
    "no host": "https:///x",
    "a port that is none": "https://example.com:99999/x",
}


@pytest.mark.parametrize("way", ["manifest", "layer", "realm"])
@pytest.mark.parametrize("where", ASTRAY)
def test_a_registry_cannot_point_inside(server: Server, place: Path, where: str, way: str) -> None:
    """A redirect of a manifest, one of a layer and a realm lead to public hosts over TLS, or nowhere."""
    (path,) = server.image(DATA)
    url = ASTRAY[where]
    if way == "realm":
        challenge = f'Bearer realm="{url}",service="x"'
        server.answers["/v2/x/manifests/1"] = hostile.challenged(challenge, "none", hostile.missing)
    else:
        server.answers[path if way == "layer" else "/v2/x/manifests/1"] = hostile.redirect(url)
    refused(RegistryUntrusted, "points to", server, place)


def test_redirects_end(server: Server, place: Path) -> None:
    """A registry that redirects to itself for ever is left after a few."""
    (path,) = server.image(DATA)
    server.answers[path] = hostile.redirect(path)
    refused(RegistryUntrusted, "redirects more than", server, place)
    assert len(server.asked_of(path)) <= 7


@pytest.mark.parametrize("status", [200, 302, 401, 404])
def test_an_endless_answer_is_not_read(server: Server, place: Path, status: int) -> None:
    """A token, a redirect and an error are read up to a mebibyte, however much is sent."""
    sent = []

    def answer(request: hostile.Request) -> None:
        request.begin(status, {"Connection": "close", "Location": "/v2/other"})
        while not request.server.over.is_set():
            sent.append(request.wfile.write(bytes(1 << 16)))

    server.answers["/token"] = answer
    realm = f'Bearer realm="http://{server.host}/token"'
    server.answers["/v2/x/manifests/1"] = hostile.challenged(realm, "none", hostile.missing)
    with pytest.raises((RegistryDenied, RegistryUntrusted, InvalidImage)):
        pull(server, place)
    assert sum(sent) < 16 << 20


# Tokens


def tokens(wanted: str | None, token: str) -> hostile.Answer:
    """A realm that gives a token to whom has the header that is wanted."""
    given = hostile.plain(msgspec.json.encode({"token": token}), "application/json")
    return given if wanted is None else hostile.challenged("Basic", wanted, given)


def guard(server: Server, token: str, realm: str | None = None) -> None:
    """Ask for a token before anything is given."""
    realm = realm or f"http://{server.host}/token"
    challenge = f'Bearer realm="{realm}",service="here",scope="repository:x:pull"'
    for path, answer in list(server.answers.items()):
        server.answers[path] = hostile.challenged(challenge, f"Bearer {token}", answer)


def test_everybody_gets_a_token(server: Server, place: Path) -> None:
    """Without a login a realm is asked without one, for what the registry said."""
    server.image(DATA)
    guard(server, "abc")
    server.answers["/token"] = tokens(None, "abc")
    assert pull(server, place) == [DATA]
    (asked,) = {path for path, _ in server.asked if path.startswith("/token")}
    assert asked == "/token?service=here&scope=repository%3Ax%3Apull"
    assert {headers.get("Authorization") for headers in server.asked_of("/token")} == {None}
    assert {headers["Accept-Encoding"] for _, headers in server.asked} == {"identity"}


def test_a_login_goes_to_the_realm_and_only_its_token_to_the_registry(
    server: Server, elsewhere: Server, place: Path, tmp_path: Path
) -> None:
    """The password is for the realm which the registry names; the registry gets the token."""
    log_in(tmp_path, server)
    server.image(DATA)
    guard(server, "abc", f"http://{elsewhere.host}/token")
    elsewhere.answers["/token"] = tokens(BASIC, "abc")
    assert pull(server, place) == [DATA]
    assert {headers.get("Authorization") for _, headers in server.asked} == {None, "Bearer abc"}


def test_an_identity_token_is_exchanged(server: Server, place: Path, tmp_path: Path) -> None:
    """A login that is a refresh token is posted to the realm, and is in no header."""
    log_in(tmp_path, server, identitytoken="refresh-me")
    server.image(DATA)
    guard(server, "abc")
    posted = []

    def answer(request: hostile.Request) -> None:
        posted.append(request.body())
        hostile.plain(b'{"access_token":"abc"}', "application/json")(request)

    server.answers["/token"] = answer
    assert pull(server, place) == [DATA]
    assert b"grant_type=refresh_token" in posted[0]
    assert b"refresh_token=refresh-me" in posted[0]
    assert "refresh-me" not in str(server.asked)


@pytest.mark.parametrize("login", [{}, {"identitytoken": "refresh-me"}])
def test_a_realm_that_goes_on_does_not_take_the_login_along(
    server: Server, elsewhere: Server, place: Path, tmp_path: Path, login: dict[str, str]
) -> None:
    """A realm that redirects is not followed with a password or a refresh token."""
    log_in(tmp_path, server, **login)
    server.image(DATA)
    guard(server, "abc")
    server.answers["/token"] = hostile.redirect(f"http://{elsewhere.host}/token")
    elsewhere.answers["/token"] = tokens(None, "abc")
    refused(RegistryDenied, "your login", server, place)
    assert elsewhere.asked == []


def test_a_host_that_was_redirected_to_cannot_ask_for_the_login(
    server: Server, elsewhere: Server, place: Path, tmp_path: Path
) -> None:
    """A 401 from where blobs are kept, with a realm of its own, does not get the registry's password."""
    log_in(tmp_path, server)
    (path,) = server.image(DATA)
    away = f"http://localhost:{elsewhere.server_port}"
    server.answers[path] = hostile.redirect(f"{away}/blob")
    for challenge in (f'Bearer realm="{away}/token"', 'Basic realm="x"'):
        elsewhere.answers["/blob"] = hostile.challenged(challenge, BASIC, hostile.whole(DATA))
        elsewhere.answers["/token"] = tokens(None, "abc")
        refused(RegistryDenied, "your login", server, place)
    assert {headers.get("Authorization") for _, headers in elsewhere.asked} == {None}


def test_a_token_that_ends_is_renewed(server: Server, place: Path) -> None:
    """When the registry no longer takes a token, another is fetched and the layer comes."""
    (path,) = server.image(DATA)
    layer = server.answers[path]
    guard(server, "first")
    challenge = f'Bearer realm="http://{server.host}/token"'
    server.answers[path] = hostile.challenged(challenge, "Bearer second", layer)
    server.answers["/token"] = first_then(tokens(None, "first"), tokens(None, "second"))
    assert pull(server, place) == [DATA]


@pytest.mark.parametrize("token", ["a\r\nX-Evil: 1", "", "ü", "a b"])
def test_a_token_that_is_none_is_refused(server: Server, place: Path, token: str) -> None:
    """Nothing is put into a header that could end it."""
    server.image(DATA)
    guard(server, "abc")
    server.answers["/token"] = tokens(None, token)
    refused(RegistryUntrusted, "tokens that are none", server, place)


def test_a_netrc_is_not_sent(
    server: Server, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other programs' logins are for is not a registry's to have."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ada password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    server.image(DATA)
    assert pull(server, place) == [DATA]
    assert {headers.get("Authorization") for _, headers in server.asked} == {None}


# Documents


def index_of(*entries: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"schemaVersion": 2, "mediaType": INDEX, "manifests": list(entries)})


def entry(data: bytes, kind: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest(data), "size": len(data), **more}


def nested(server: Server, depth: int) -> None:
    """Offer x:1 as an image below so many indexes."""
    server.image(DATA)
    (data, kind) = (offered(server, "1"), MANIFEST)
    for level in range(depth):
        data, kind = index_of(entry(data, kind)), INDEX
        server.document("1" if level == depth - 1 else "other", data, kind)


def offered(server: Server, tag: str) -> bytes:
    """Give the manifest that the server offers."""
    return requests.get(f"http://{server.host}/v2/x/manifests/{tag}", timeout=5).content


@pytest.mark.parametrize("depth", [1, 2, 3, 100])
def test_indexes_may_be_nested_twice(server: Server, place: Path, depth: int) -> None:
    """An index of indexes is read; one more is refused, and so are a hundred."""
    nested(server, depth)
    if depth <= 2:
        assert pull(server, place) == [DATA]
    else:
        refused(InvalidImage, "index of indexes", server, place)


def test_an_index_that_names_itself_ends(server: Server, place: Path) -> None:
    """A registry that gives an index for each digest cannot make a pull go in circles."""
    server.image(DATA)
    data = index_of(entry(b"me", INDEX))
    server.document("1", data, INDEX)
    server.answers[f"/v2/x/manifests/{digest(b'me')}"] = hostile.plain(data, INDEX)
    refused(RegistryUntrusted, "digest is not that", server, place)


def test_an_index_cannot_lie_about_what_it_names(server: Server, place: Path) -> None:
    """An index in the place of a manifest, and a size that is not the document's, are refused."""
    server.image(DATA)
    inner = index_of(entry(offered(server, "1"), MANIFEST))
    server.document("inner", inner, INDEX)
    server.document("1", index_of(entry(inner, MANIFEST)), INDEX)
    refused(InvalidImage, "something else than its index says", server, place)
    image = offered(server, "inner")
    server.document("1", index_of({**entry(image, INDEX), "size": len(image) + 1}), INDEX)
    refused(InvalidImage, "something else than its index says", server, place)


def test_a_large_manifest_is_not_read(server: Server, place: Path) -> None:
    """Reading stops at the limit, also where no length is told."""
    server.image(DATA)
    server.answers["/v2/x/manifests/1"] = hostile.endless(b" " * (5 << 20))
    refused(InvalidImage, "larger than 4MiB", server, place)


def test_a_large_configuration_is_not_fetched(server: Server, place: Path) -> None:
    """A mebibyte is enough for any configuration."""
    config = b'{"x":"' + b" " * (1 << 20) + b'"}'
    server.image(DATA, config=config)
    refused(InvalidImage, "configuration is larger", server, place)
    assert server.asked_of(blob_path(config)) == []


@pytest.mark.parametrize("what", ["manifest", "configuration"])
def test_deep_documents_are_refused(server: Server, place: Path, what: str) -> None:
    """A hundred thousand brackets are an invalid image, not a crash."""
    deep = b'{"schemaVersion":2,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    server.image(DATA, config=deep)
    if what == "manifest":
        server.document("1", deep, MANIFEST)
    refused(InvalidImage, f"{what} is not the JSON", server, place)


@pytest.mark.parametrize("link", [True, False])
def test_what_is_in_the_way_of_a_part_is_not_written_to(server: Server, place: Path, link: bool) -> None:
    """A symbolic link where a part is to be is not followed."""
    server.image(DATA)
    target = place.parent / "target"
    target.write_bytes(b"precious")
    part = blobs.path_of(place, digest(DATA)).with_suffix(".part")
    part.parent.mkdir(parents=True)
    part.symlink_to(target) if link else part.mkdir()
    with pytest.raises(BangerError):
        pull(server, place)
    assert target.read_bytes() == b"precious"
