from __future__ import annotations

import time
import unicodedata

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger import layout
from banger_cli import output
from banger_cli.escape import escape, escape_lines
from banger_cli.spec import size


@given(st.text())
def test_escaped_text_moves_nothing(text: str) -> None:
    """Escaped text holds no control character and none that changes direction or line."""
    shown = escape(text)
    assert not [char for char in shown if unicodedata.category(char) in ("Cc", "Zl", "Zp")]
    marks = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    assert not [char for char in shown if unicodedata.bidirectional(char) in marks]
    assert escape_lines(text).replace("\n", "\\x0a") == shown


@pytest.mark.parametrize(
    ("text", "mib"),
    [("512", 512), ("512M", 512), ("2G", 2048), ("1.5g", 1536), ("1T", 1048576), ("3GiB", 3072)],
)
def test_sizes(text: str, mib: int) -> None:
    """A size is MiB unless it says otherwise."""
    assert size(text) == mib


@pytest.mark.parametrize("text", ["", "0", "-1", "0.1M", "G", "2X", "2 G B", "1e3", "\u0663G\u0663"])
def test_no_sizes(text: str) -> None:
    """What is not a positive size is refused with an example."""
    with pytest.raises(click.BadParameter, match="for example 512M or 2G"):
        size(text)


def test_table_aligns() -> None:
    """Columns are as wide as their widest cell, nothing trails, None is a dash."""
    assert layout.table(("A", "LONG"), [("aaaa", None), ("b", 12)]) == ["A     LONG", "aaaa  -", "b     12"]


@pytest.mark.parametrize(
    ("spent", "shown"),
    [(0.0204, "0.02s"), (9.999, "10.0s"), (59.94, "59.9s"), (123.4, "2m03s"), (59.99, "1m00s")],
)
def test_durations(spent: float, shown: str) -> None:
    """A duration reads the same width whatever its size, and never as sixty seconds."""
    assert layout.seconds(spent) == shown


def test_ages() -> None:
    """An age is told in its largest unit; a clock that was set back gives no negative one."""
    now_us = int(time.time() * 1e6)
    ages = [-60, 5, 200, 8000, 200000]
    assert [layout.ago(now_us - int(age * 1e6)) for age in ages] == ["0s", "5s", "3m", "2h", "2d"]


@pytest.mark.parametrize(
    ("words", "asks"),
    [
        ("vm list --json", True),
        ("-o json vm list", True),
        ("vm list --output=json", True),
        ("vm list -o text", False),
        ("vm exec web -- jq --json", False),
        ("vm exec web -- x -o json", False),
    ],
)
def test_wants_json(words: str, asks: bool) -> None:
    """JSON is asked for by our own words only, not by those of the guest's command."""
    assert output.wants_json(words.split()) is asks
