"""The bench judges its figures as it says."""

from __future__ import annotations

import pytest

from bench.figures import Figures


@pytest.mark.parametrize(
    ("value", "targets", "printed"),
    [
        (2.0, {}, "name 2.000 s"),
        (2.0, {"target": 2.0}, "name 2.000 s at most 2 s ok"),
        (2.1, {"target": 2.0}, "name 2.100 s at most 2 s MISSED"),
        (2.0, {"at_least": 2.0}, "name 2.000 s at least 2 s ok"),
        (1.9, {"at_least": 2.0}, "name 1.900 s at least 2 s MISSED"),
    ],
)
def test_a_figure_is_shown_and_judged(
    capsys: pytest.CaptureFixture[str], value: float, targets: dict[str, float], printed: str
) -> None:
    """A figure is ok up to its `target`, and from its `at_least` on; one without either is not judged."""
    figures = Figures()
    figures.add("name", value, "s", **targets)  # type: ignore[arg-type]  # no note among them
    assert " ".join(capsys.readouterr().out.split()) == printed
    assert {**figures.all[0], **targets} == figures.all[0]


def test_what_is_not_measured_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A figure that is left out is printed with the reason."""
    figures = Figures()
    figures.skip("name", "no room")
    assert "not measured: no room" in capsys.readouterr().out
    assert figures.all == [{"name": "name", "value": None, "note": "no room"}]
