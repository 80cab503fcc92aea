"""The limits that a user may set are those of the rooms, by their defaults, and each is written down."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from banger import config
from banger.errors import InvalidRequest
from banger.images import bundle
from banger.images.layers import flatten
from banger.images.remote import registry

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"
KEYS = config.Limits.__struct_fields__


def test_the_defaults_are_one() -> None:
    """What holds without config.toml is what holds in a room that is asked without limits."""
    settings = config.Limits()
    assert registry.Limits.of(settings) == registry.Limits()
    assert flatten.Limits.of(settings) == flatten.Limits()
    assert bundle.Limits.of(settings) == bundle.Limits()


@pytest.mark.parametrize("key", KEYS)
def test_each_key_reaches_a_room(key: str) -> None:
    """Another value of any key changes what some room heeds."""
    settings = config.Limits(**{key: 7})
    rooms = (registry.Limits, flatten.Limits, bundle.Limits)
    assert sum(room.of(settings) != room() for room in rooms) == 1


@pytest.mark.parametrize("key", KEYS)
def test_each_key_is_written_down(key: str) -> None:
    """docs/configuration.md has it, with its default."""
    rows = [line.split("|") for line in DOCUMENT.read_text("utf-8").splitlines() if line.startswith("|")]
    (default,) = (row[2] for row in rows if f"`{key}`" in row[1])
    assert f"`{getattr(config.Limits(), key)}`" in default


def dirs_with(where: Path, text: str) -> config.Dirs:
    (where / "banger").mkdir()
    (where / "banger" / "config.toml").write_text(text)
    return config.find_dirs({"HOME": str(where), "XDG_CONFIG_HOME": str(where), "XDG_RUNTIME_DIR": "/run/t"})


def test_they_are_read_from_a_table(tmp_path: Path) -> None:
    """What is not named keeps its default."""
    found = config.load(dirs_with(tmp_path, "[limits]\nentries = 5\nsilence_s = 2\n")).limits
    assert found == msgspec.structs.replace(config.Limits(), entries=5, silence_s=2.0)


@pytest.mark.parametrize(
    "text",
    [
        "entries = 0",
        "download_mib = -1",
        "silence_s = 0.0",
        "parallel = 33",
        'ratio = "many"',
        "unheard_of = 1",
    ],
)
def test_a_senseless_one_is_refused_by_name(tmp_path: Path, text: str) -> None:
    """The error names the key and the file."""
    with pytest.raises(InvalidRequest, match=text.split()[0]) as refused:
        config.load(dirs_with(tmp_path, f"[limits]\n{text}\n"))
    assert "config.toml" in refused.value.message
