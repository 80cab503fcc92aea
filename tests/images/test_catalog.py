"""Catalogs: what they say is found, what is wrong is named, and one alone never stops the others."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import config
from banger.errors import Cancelled, InvalidRequest, NotFound, OperationFailed
from banger.images import catalog, debian
from banger.images import kernel as kernels
from banger.images.bundle import Bundle
from banger.images.catalog import Recipe, Reference
from banger.images.remote import download
from tests.images.serving import Site, serving

SHA = "0123456789abcdef" * 4


def listing(kind: str = "image", name: str = "x", **fields: object) -> str:
    lines = [f"[[{kind}]]", f'name = "{name}"']
    lines += [f"{key} = {value if isinstance(value, int) else f'{value!r}'}" for key, value in fields.items()]
    return "\n".join(lines) + "\n"


def pinned(bundle: str, name: str = "x") -> str:
    return listing(name=name, bundle=bundle, sha256=SHA, size=7)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as found:
        yield found


def test_the_embedded_catalog_names_what_banger_can_build() -> None:
    """Without any setting, each recipe is found by its name, and each name leads to a recipe."""
    found = catalog.read(())
    assert found.warnings == ()
    for kind, recipes in (("image", debian.RECIPES), ("kernel", kernels.RECIPES)):
        named = {entry.name: entry.source for entry in found.entries if entry.kind == kind}
        assert named == {name: Recipe(name=name) for name in recipes}


def test_each_kind_of_source_is_read(tmp_path: Path) -> None:
    """A bundle, a reference and a recipe are told apart; a bundle's path is relative to the catalog."""
    place = tmp_path / "c.toml"
    place.write_text(
        pinned("below/x.tar.zst", "a")
        + pinned("/elsewhere/x.tar.zst", "b")
        + pinned("https://example.org/x.tar.zst", "c")
        + listing(name="d", reference="example.org/a/b:1")
        + listing("kernel", "e", recipe="debian-12")
    )
    found = {entry.name: entry.source for entry in catalog.read([str(place)]).entries}
    assert found["a"] == Bundle(place=str(tmp_path / "below/x.tar.zst"), sha256=SHA, size=7)
    assert found["b"] == Bundle(place="/elsewhere/x.tar.zst", sha256=SHA, size=7)
    assert found["c"] == Bundle(place="https://example.org/x.tar.zst", sha256=SHA, size=7)
    assert found["d"] == Reference(text="example.org/a/b:1")
    assert found["e"] == Recipe(name="debian-12")


def test_a_later_catalog_overrides_by_kind_and_name(tmp_path: Path) -> None:
    """The last one to name an image has the say over it, and over no kernel of that name."""
    for number in (1, 2):
        (tmp_path / f"{number}.toml").write_text(
            listing(name="debian-12", reference=f"example.org/own:{number}")
        )
    found = catalog.read([str(tmp_path / "1.toml"), str(tmp_path / "2.toml")])
    assert found.find("image", "debian-12").source == Reference(text="example.org/own:2")
    assert found.find("image", "debian-12").catalog == str(tmp_path / "2.toml")
    assert found.find("kernel", "debian-12").source == Recipe(name="debian-12")


def test_a_catalog_that_is_missing_is_a_warning_and_an_error_only_for_unknown_names(tmp_path: Path) -> None:
    """What the others have is found; a name that none of them has may be in the one that is not there."""
    (tmp_path / "good.toml").write_text(listing(name="mine", reference="example.org/mine"))
    found = catalog.read([str(tmp_path / "gone.toml"), str(tmp_path / "good.toml")])
    assert found.find("image", "mine").source == Reference(text="example.org/mine")
    assert found.find("image", "debian-12").source == Recipe(name="debian-12")
    assert len(found.warnings) == 1
    assert "gone.toml" in found.warnings[0]
    with pytest.raises(OperationFailed, match=r"gone\.toml"):
        found.find("image", "unknown")
    with pytest.raises(NotFound, match="unknown"):
        catalog.read([str(tmp_path / "good.toml")]).find("image", "unknown")


WRONG = {
    "an unknown key": (listing(recipe="x", colour="red"), "colour"),
    "an unknown table": ("[[disk]]\nname = 'x'\n", "disk"),
    "an unknown setting": ("version = 2\n", "version"),
    "no name": ("[[image]]\nrecipe = 'x'\n", "name"),
    "no source": (listing(), "exactly one"),
    "two sources": (listing(recipe="x", reference="y"), "exactly one"),
    "a bundle without a hash": (listing(bundle="x.tar.zst", size=1), "sha256"),
    "a bundle without a size": (listing(bundle="x.tar.zst", sha256=SHA), "size"),
    "a hash for a reference": (listing(reference="x", sha256=SHA), "only a bundle"),
    "a hash that is none": (listing(bundle="x", sha256="abc", size=1), "sha256"),
    "a hash with a line's end": (listing(bundle="x", size=1) + f'sha256 = "{SHA}\\n"', "sha256"),
    "a size of nothing": (listing(bundle="x", sha256=SHA, size=0), "size"),
    "a size beyond all": (listing(bundle="x", sha256=SHA, size=1 << 80), "size|range"),
    "a size that is text": (listing(bundle="x", sha256=SHA) + "size = '1'\n", "size"),
    "a name with a slash": (listing(name="../x", recipe="x"), "not a valid image name"),
    "a name with a line's end": ('[[image]]\nname = "x\\n"\nrecipe = "x"', "not a valid image name"),
    "a kernel beside a recipe": (listing(recipe="x", kernel="y"), "names a `kernel`"),
    "a kernel that is no name": (listing(reference="x", kernel="../y"), "not a valid kernel name"),
    "a name twice": (listing(recipe="x") + listing(recipe="y"), "more than one"),
    "a file address": (pinned("file:///etc/passwd"), "not an http"),
    "an address of a socket": (pinned("http+unix://%2Frun%2Fx.sock/x"), "not an http"),
    "an address with a password": (pinned("https://me:secret@example.org/x"), "password"),
    "an address without a host": (pinned("https:///x"), "not an http"),
    "an address with a line's end": (listing(sha256=SHA, size=1) + 'bundle = "http://x/\\n"', "not a place"),
    "an empty place": (pinned(""), "not a place"),
    "no TOML": ("[[image", "not a catalog"),
    "control characters": ('"\\u001b]0;evil\\u0007" = 1', "evil"),
    "a NUL": ("\0", "not a catalog"),
    "nested lists": ("x = " + "[" * 100_000, "nested too deeply"),
    "a very long number": ("x = 0x" + "f" * 100_000, "not a catalog"),
    "an entry that is a list": ("image = [[]]", "not a catalog"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_catalog_is_named(tmp_path: Path, what: str) -> None:
    """It is refused in a sentence that says where the mistake is, and is a warning among others."""
    text, reason = WRONG[what]
    with pytest.raises(InvalidRequest, match=reason) as refused:
        catalog.parse(text.encode(), "/c.toml")
    assert refused.value.message.isprintable()
    (tmp_path / "c.toml").write_text(text)
    found = catalog.read([str(tmp_path / "c.toml")])
    assert len(found.missing) == 1
    assert found.find("image", "debian-12")


def test_a_catalog_that_is_no_text_is_refused() -> None:
    """Bytes that are not UTF-8 are no catalog."""
    with pytest.raises(InvalidRequest, match="not a catalog"):
        catalog.parse(b"\xff\xfe", "/c.toml")


def test_a_huge_catalog_is_not_read(tmp_path: Path, site: Site) -> None:
    """What is over the limit is left out by its size, on the disk and on the web, before it is parsed."""
    huge = b"#" * (catalog.MAX_BYTES + 1)
    (tmp_path / "c.toml").write_bytes(huge)
    site.files["/c.toml"] = huge * 100
    began = time.monotonic()
    found = catalog.read([str(tmp_path / "c.toml"), f"{site.address}/c.toml"])
    assert time.monotonic() - began < 5
    assert ["larger" in found.missing[0].reason, "more than" in found.missing[1].reason] == [True, True]
    assert site.sent < 32 << 20


def test_as_many_entries_as_fit_are_parsed_quickly() -> None:
    """The largest catalog there can be takes less than two seconds."""
    one = len(listing(name="i0000", recipe="r"))
    text = "".join(listing(name=f"i{number:04}", recipe="r") for number in range(catalog.MAX_BYTES // one))
    began = time.monotonic()
    assert len(catalog.parse(text.encode(), "/c.toml")) > 5000
    assert time.monotonic() - began < 2


def test_a_catalog_on_the_web_names_what_is_beside_it(site: Site) -> None:
    """A relative bundle is looked for where the catalog is, and remembers who named it."""
    site.files["/a/c.toml"] = pinned("x.tar.zst").encode()
    found = catalog.read([f"{site.address}/a/c.toml"]).find("image", "x").source
    assert isinstance(found, Bundle)
    assert found.place == f"{site.address}/a/x.tar.zst"
    assert found.origin == f"{site.address}/a/c.toml"


@pytest.mark.parametrize(
    ("place", "bundle", "reason"),
    [
        ("https://example.org/c.toml", "file:///etc/passwd", "not an http"),
        ("https://example.org/c.toml", "http://example.org/x", "not encrypted"),
        ("https://example.org/c.toml", "//me:secret@example.org/x", "password"),
        ("https://example.org/c.toml", "//[::1/x", "not an http"),
        ("https://example.org/c.toml", "//example.org:port/x", "not an http"),
    ],
)
def test_a_catalog_from_elsewhere_names_no_file_of_this_host(place: str, bundle: str, reason: str) -> None:
    """What it may name is at an address as safe as its own."""
    with pytest.raises(InvalidRequest, match=reason):
        catalog.parse(pinned(bundle).encode(), place)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("http://example.org/c.toml", "needs https"),
        ("https://me:secret@127.0.0.1/c.toml", "password"),
        ("https://127.0.0.1:1/c.toml", "cannot be reached"),
        ("http://[::1", "not an http"),
        ("ftp://example.org/c.toml", "No such file"),
        ("/etc", "Is a directory"),
    ],
)
def test_a_place_that_cannot_be_read_is_a_warning(place: str, reason: str) -> None:
    """Whatever config.toml names, the others are read, and the warning says why this one is not."""
    found = catalog.read([place])
    assert [lost.place for lost in found.missing] == [place]
    assert re.search(reason, found.missing[0].reason)
    assert found.find("image", "debian-12")


def test_an_absolute_path_in_a_catalog_from_elsewhere_is_on_its_own_host() -> None:
    """`/etc/passwd` in such a catalog is a path of that server."""
    (entry,) = catalog.parse(pinned("/etc/passwd").encode(), "https://example.org/a/c.toml")
    assert isinstance(entry.source, Bundle)
    assert entry.source.place == "https://example.org/etc/passwd"


def test_a_silent_server_costs_a_bounded_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalog that does not come is left out, and the others are used."""
    monkeypatch.setattr(download, "SMALL_S", 0.5)
    site.files["/c.toml"] = listing(recipe="x").encode() * 1000
    site.stall_after = 10
    began = time.monotonic()
    found = catalog.read([f"{site.address}/c.toml"])
    assert time.monotonic() - began < 5
    assert "in time" in found.missing[0].reason
    assert found.find("image", "debian-12")


def test_waiting_for_a_catalog_can_be_cancelled(site: Site) -> None:
    """Who does not want it any more gets his thread back."""
    site.files["/c.toml"] = listing(recipe="x").encode()
    site.stall_after = 10
    with pytest.raises(Cancelled):
        catalog.read([f"{site.address}/c.toml"], cancelled=site.stalled.is_set)


def test_catalogs_are_a_setting(tmp_path: Path) -> None:
    """config.toml names them in the order in which they override each other."""
    dirs = config.find_dirs({"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)})
    dirs.config.mkdir(parents=True)
    (dirs.config / "config.toml").write_text('catalogs = ["/a.toml", "https://example.org/b.toml"]')
    assert config.load(dirs).catalogs == ("/a.toml", "https://example.org/b.toml")
