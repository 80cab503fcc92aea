"""From a registry to an artifact: what was pruned between fetching and making is fetched again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import config
from banger.errors import InvalidImage, RegistryError
from banger.images import base, cache, pulled, seed
from banger.images.remote.oci import Pulled
from banger.testing.registry import Registry
from tests.images import tiny
from tests.images.listing import listing


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as registry:
        registry.image("tools/demo", "1", tiny.home(), b"\0" * 1024, compress=True)
        yield registry


def fetch(registry: Registry, place: Path, name: str = "demo", limits: config.Limits | None = None) -> Pulled:
    return pulled.fetch(
        f"{registry.host}/tools/{name}:1",
        place / "blobs",
        limits=limits or config.Limits(),
        progress=lambda _: None,
        cancelled=lambda: False,
    )


def make(found: Pulled, place: Path, limits: config.Limits | None = None) -> dict[str, object]:
    (staging := place / "staging").mkdir()
    made = pulled.make(
        found,
        staging,
        "demo",
        blobs=place / "blobs",
        limits=limits or config.Limits(),
        progress=lambda _: None,
        cancelled=lambda: False,
    )
    return dict(made)


def test_what_is_made_has_the_layers_and_a_seed(registry: Registry, tmp_path: Path) -> None:
    """The base file, and beside it what the image has in /root."""
    make(fetch(registry, tmp_path), tmp_path)
    assert sorted(path.name for path in (tmp_path / "staging").iterdir()) == [base.FILE, seed.FILE]
    assert listing(tmp_path / "staging" / seed.FILE)["root/.profile"] == "f tiny\n"


def test_a_cache_pruned_in_between_is_filled_again(registry: Registry, tmp_path: Path) -> None:
    """By the digest that was found first: the tag has another image by now."""
    found = fetch(registry, tmp_path)
    assert cache.prune(tmp_path, frozenset()).blobs > 0
    registry.image("tools/demo", "1", b"\0" * 10240)
    made = make(found, tmp_path)
    registry.image("tools/demo", "1", tiny.home(), b"\0" * 1024, compress=True)
    assert (made["manifest"], made["reference"]) == (found.digest, f"{registry.host}/tools/demo:1")
    assert listing(tmp_path / "staging" / seed.FILE)["root/.profile"] == "f tiny\n"


def test_nothing_is_asked_for_that_is_here(registry: Registry, tmp_path: Path) -> None:
    """Without the registry, layers that are here are made into an image; a missing one is told."""
    found = fetch(registry, tmp_path)
    elsewhere = found.reference.replace(registry.host, "127.0.0.1:1")
    gone = Pulled(reference=elsewhere, digest=found.digest, config=found.config, layers=found.layers)
    make(gone, tmp_path)
    shutil.rmtree(tmp_path / "staging")
    found.layers[0].path.unlink()
    with pytest.raises(RegistryError, match="cannot be reached"):
        make(gone, tmp_path)


@pytest.mark.parametrize("key", ["download_mib", "content_mib", "entries"])
def test_the_limits_are_the_users(registry: Registry, tmp_path: Path, key: str) -> None:
    """An image that the defaults let through is refused by a lower limit, whose name the error tells."""
    large = tiny.home(*[(tiny.file(f"root/{number}", 1 << 19), bytes(1 << 19)) for number in range(3)])
    registry.image("tools/large", "1", large)
    limits = config.Limits(**{key: 1})
    with pytest.raises(InvalidImage) as refused:
        make(fetch(registry, tmp_path, "large", limits), tmp_path, limits)
    assert key in f"{refused.value.hint}" or key == "entries"
    assert not (tmp_path / "staging" / base.FILE).exists()
