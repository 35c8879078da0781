"""The report's plots: every line has its name beside it, and every number its place on the paper."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from evaluation_helpers import HOSTILE, LONG, curve
from hypothesis import given
from hypothesis import strategies as st

from mithridate.evaluation.findings import Curve, Point
from mithridate.evaluation.report.labels import place, wrap
from mithridate.evaluation.report.plots import HEIGHT, LINES, WIDTH, panels


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def marks(svg: str, look: int) -> list[tuple[float, float]]:
    """Where the line of that look has its points."""
    (line,) = [e for e in drawn(svg).iter("polyline") if e.get("class") == f"line s{look}"]
    return [tuple(map(float, pair.split(","))) for pair in (line.get("points") or "").split()]  # type: ignore[misc]


def one(points: list[tuple[float, float]], *, log_x: bool = False) -> Curve:
    made = tuple(Point(x=x, y=y, low=max(0, y - 0.1), high=min(1, y + 0.1)) for x, y in points)
    return Curve(kind="steps", title="t", x_label="x", y_label="y", log_x=log_x, series={"none": made})


def test_a_line_goes_through_its_points() -> None:
    (panel,) = panels(one([(0, 1.0), (4, 0.5), (8, 0.0)]), base="none")
    (x0, y0), (x1, y1), (x2, y2) = marks(panel.svg, 0)
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y1 - y0 == pytest.approx(y2 - y1)
    assert y0 < y2
    assert panel.rows == (
        ("none", ("100.0 % (90.0 % to 100.0 %)", "50.0 % (40.0 % to 60.0 %)", "0.0 % (0.0 % to 10.0 %)")),
    )


def test_a_logarithmic_axis_has_a_place_for_nothing_asked() -> None:
    (panel,) = panels(one([(0, 1.0), (10, 0.5), (100, 0.25), (1000, 0.1)], log_x=True), base="none")
    xs = [x for x, _ in marks(panel.svg, 0)]
    assert xs == sorted(xs)
    assert xs[2] - xs[1] == pytest.approx(xs[3] - xs[2], abs=0.2)
    assert xs[1] - xs[0] > 20
    assert panel.xs == ("0", "10", "100", "1k")


@pytest.mark.parametrize(
    "points",
    [[], [(1.0, math.nan)], [(math.inf, 0.5)], [(-1.0, 0.5)]],
)
def test_what_cannot_be_drawn_is_not(points: list[tuple[float, float]]) -> None:
    assert panels(one(points, log_x=True), base="none") == []


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1)), min_size=1, max_size=12), st.booleans())
def test_nothing_leaves_the_paper(points: list[tuple[float, float]], log_x: bool) -> None:
    (panel,) = panels(one(points, log_x=log_x), base="none")
    for x, y in marks(panel.svg, 0):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT
    assert "nan" not in re.sub("<title>.*?</title>", "", panel.svg)


def test_many_lines_share_out_among_panels_each_with_the_base() -> None:
    names = [LONG, *(f"rmc:neighbors={i}" for i in range(11)), HOSTILE.replace("\x08", "")]
    made = panels(curve("epsilon", [0, 1, 2], ["none", *names]), base="none")
    shown = [[name for name, _ in panel.rows] for panel in made]
    assert all(row[0] == "none" and len(row) <= LINES for row in shown)
    assert [name for row in shown for name in row[1:]] == names
    assert [panel.title for panel in made][-1] == "Accuracy against epsilon (3 of 3)"
    for panel in made:
        looks = [e.get("stroke-dasharray") for e in drawn(panel.svg).iter("polyline") if "line s" in e.get("class", "")]
        assert len(set(looks)) == len(looks)  # told apart without colour


@given(st.lists(st.tuples(st.floats(12, 256), st.integers(1, 2)), min_size=1, max_size=6))
def test_names_do_not_lie_on_one_another(ends: list[tuple[float, int]]) -> None:
    wanted = {str(i): (y, ["line"] * lines) for i, (y, lines) in enumerate(ends)}
    placed = place(wanted, low=18, high=256)
    for upper, lower in itertools.pairwise(placed):
        assert lower.y - upper.y >= 13 * len(upper.lines) - 1e-9
    assert placed[0].y >= 18 - 1e-9
    assert placed[-1].y + 13 * (len(placed[-1].lines) - 1) <= 256
    at = {label.name: wanted[label.name][0] for label in placed}
    assert [at[label.name] for label in placed] == sorted(at.values())


@given(st.text("ab:+,= é", max_size=80), st.integers(8, 30))
def test_a_name_takes_two_lines_at_the_most(name: str, width: int) -> None:
    assert len(wrap(name, width)) <= 2


def test_a_long_name_is_broken_at_its_signs_and_shortened_in_its_middle() -> None:
    assert wrap("rmc:scope=tail", 15) == ("rmc:scope=tail",)
    assert wrap("prm+rmc:scope=tail", 15) == ("prm+rmc:", "scope=tail")
    first, second = wrap(LONG, 15)
    assert "\N{HORIZONTAL ELLIPSIS}" in first + second
    assert (first + second).startswith("prm:")
    assert second.endswith("passes=100")
