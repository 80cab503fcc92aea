import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import InvalidRequest
from banger.images.remote import reference
from tests.images.hostile import digest

PINNED = digest(b"")

READ = {
    "registry.example/debian": "registry.example/debian:latest",
    "registry.example/debian:12": "registry.example/debian:12",
    "registry.example/a/b/c:v1.2-rc_3": "registry.example/a/b/c:v1.2-rc_3",
    "Registry.Example/a": "registry.example/a:latest",
    "localhost/a": "localhost/a:latest",
    "localhost:5000/a:b": "localhost:5000/a:b",
    "127.0.0.1:5000/a": "127.0.0.1:5000/a:latest",
    "[::1]:5000/a": "[::1]:5000/a:latest",
    "host:1/a": "host:1/a:latest",
    f"host:1/debian@{PINNED}": f"host:1/debian@{PINNED}",
    f"host:1/debian:12@{PINNED}": f"host:1/debian:12@{PINNED}",
    "host:1/a__b/c-d---e/f.g": "host:1/a__b/c-d---e/f.g:latest",
}

REFUSED = [
    "",
    " debian",
    "debian ",
    "debian\n",
    "debian:12\n",
    "deb\nian",
    "debian\0",
    "Debian",
    "registry.example/Debian",
    "UPPER/debian",
    "../../etc/passwd",
    "a/../b",
    "a/./b",
    "/debian",
    "debian/",
    "a//b",
    "debian:",
    "debian:.12",
    "debian:-12",
    "debian:" + "a" * 129,
    "debian:../x",
    "debian:1:2",
    "debian@",
    "debian@sha256:",
    "debian@sha256:" + "A" * 64,
    "debian@sha256:" + "a" * 63,
    "debian@sha512:" + "a" * 128,
    f"debian@{PINNED}\n",
    f"@{PINNED}",
    "https://registry.example/a",
    "user:secret@registry.example/a",
    "registry.example:0/a",
    "registry.example:65536/a",
    "registry.example:443443/a",
    "registry.example:x/a",
    "registry.example/",
    "-registry.example/a",
    "quay-.io/a",
    "quay..io/a",
    "[::1/a",
    "[::zz]/a",
    "[1.2.3.4]/a",
    "[fe80::1%25eth0]/a",
    "a._b",
    "a___b",
    "a-",
    "dëbian",
    "debian:1２",
    "debian?x=1",
    "debian#x",
    "debian%2f..",
    "debian\\x",
    "a" * 2000,
]


@pytest.mark.parametrize("text", READ)
def test_names_are_read_as_docker_does(text: str) -> None:
    """Short names, ports, tags and digests come out as one whole name, which means the same again."""
    found = reference.parse(text)
    assert str(found) == READ[text]
    assert reference.parse(str(found)) == found


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_reference_is_refused(text: str) -> None:
    """One short, escaped sentence and an example of how it is done."""
    with pytest.raises(InvalidRequest) as told:
        reference.parse(text)
    assert told.value.message.isprintable()
    assert len(told.value.message) < 200
    assert "debian:12" in str(told.value.hint)


@given(st.one_of(st.text(max_size=60), st.text("aZ0._-/:@[]\n \0%?#", max_size=30)))
def test_whatever_is_read_is_safe_in_a_url(text: str) -> None:
    """Any text is refused, or becomes a name whose parts hold nothing that means something in a URL."""
    try:
        found = reference.parse(text)
    except InvalidRequest:
        return
    assert re.fullmatch(r"[a-z0-9._/-]+", found.repository)
    assert not {"", ".", ".."} & set(found.repository.split("/"))
    assert re.fullmatch(r"[A-Za-z0-9._-]*", found.tag or "")
    assert re.fullmatch(r"[a-z0-9.:\[\]-]+", found.registry)
    assert reference.parse(str(found)) == found


@pytest.mark.parametrize(
    ("host", "plain"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("127.0.0.1", True),
        ("127.200.3.4:80", True),
        ("[::1]:5000", True),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("127.1", False),
        ("10.0.0.1:5000", False),
        ("[::2]", False),
        ("registry.example", False),
    ],
)
def test_only_loopback_is_spoken_to_without_tls(host: str, plain: bool) -> None:
    """Plain HTTP is for this machine's own addresses, and not for names that only look like them."""
    assert reference.parse(f"{host}/a").plain is plain


@pytest.mark.parametrize("name", ["debian", "debian:12", "team/app"])
def test_a_name_without_a_registry_needs_a_setting(name: str) -> None:
    """No registry is asked that nobody named: not in the reference, and not in config.toml."""
    with pytest.raises(InvalidRequest, match="which registry"):
        reference.parse(name)
    found = reference.parse(name, "registry.example:5000/mirror")
    assert str(found).startswith(f"registry.example:5000/mirror/{name.partition(':')[0]}")
