"""The figures of a load test as SVG: nothing to load, and they print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from markupsafe import Markup, escape

from mithridate.evaluation.service_load import CLEAN, LoadStep, LoadSummary

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 70, 14, 44
_LINES = {"p50": "p50", "p95": "p95", "p99": "p99", "p999": "p99.9"}


def latency_by_rate(summary: LoadSummary) -> Markup | None:
    """Percentiles from when requests were due against the rate; None for fewer than two rates. Logarithmic."""
    steps = _last_of_each_rate(summary.steps)
    known = [(s.set_rate or 0.0, getattr(s.latency, name)) for s in steps for name in _LINES]
    values = [value for _, value in known if value]
    if len(steps) < 2 or not values:
        return None
    x = _Scale(steps[0].set_rate or 1, steps[-1].set_rate or 1, _LEFT, _WIDTH - _RIGHT)
    y = _Scale(min(values), max(*values, summary.objective_ms), _HEIGHT - _BOTTOM, _TOP)
    parts = [_axes(x, y, "requests a second, set", "latency, ms")]
    level = y(summary.objective_ms)
    if summary.objective_ms >= min(values):
        parts.append(f'<line class="objective" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(_text(_LEFT + 6, level - 5, f"objective {summary.objective_ms:g} ms", "start"))
    if summary.knee and summary.knee.sustained:
        place = x(summary.knee.sustained)
        parts.append(f'<line class="knee" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(_text(place - 5, _TOP + 10, "knee", "end"))
    labels: list[tuple[float, str, str]] = []
    for number, (name, label) in enumerate(_LINES.items()):
        found = [(x(s.set_rate or 1), y(v)) for s in steps if (v := getattr(s.latency, name))]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in found)
        parts.append(f'<polyline class="line s{number}" points="{points}"/>')
        parts += [f'<circle class="dot s{number}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in found]
        if found:
            labels.append((found[-1][1], label, f"s{number}"))
    return _svg([*parts, *_beside(labels)], "Latency percentiles against the rate")


def histogram(step: LoadStep) -> Markup | None:
    """How often which latency occurred, clean and adversarial traffic apart; None where nothing was answered."""
    edges, counts = step.histogram.edges, step.histogram.counts
    if not edges:
        return None
    shares = {kind: [n / max(1, sum(found)) for n in found] for kind, found in counts.items()}
    top = max(max(found) for found in shares.values())
    x = _Scale(edges[0], edges[-1], _LEFT, _WIDTH - _RIGHT)
    floor = _HEIGHT - _BOTTOM
    parts = [_axes(x, None, "latency, ms", "share of requests")]
    for kind, found in shares.items():
        side = "clean" if kind == CLEAN else "attacked"
        steps = [f"M{x(edges[0]):.1f},{floor}"]
        for (low, high), share in zip(pairwise(edges), found, strict=True):
            height = floor - (floor - _TOP) * share / top
            steps.append(f"L{x(low):.1f},{height:.1f}L{x(high):.1f},{height:.1f}")
        parts.append(f'<path class="area {side}" d="{"".join(steps)}L{x(edges[-1]):.1f},{floor}Z"/>')
    for number, kind in enumerate(shares):
        side = "clean" if kind == CLEAN else "attacked"
        parts.append(
            f'<rect class="area {side}" x="{_WIDTH - _RIGHT - 120}" y="{_TOP + 18 * number}" width="12" height="12"/>'
        )
        parts.append(_text(_WIDTH - _RIGHT - 102, _TOP + 18 * number + 10, kind, "start"))
    return _svg(parts, "Histogram of latencies")


class _Scale:
    """From values to places, in equal proportion."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low, self.high = low, max(high, low * 1.001)
        self._first, self._last = first, last

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self._first + share * (self._last - self._first)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten; all ten where that leaves fewer than three."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)

        def within(digits: Sequence[float]) -> list[float]:
            every = (digit * 10.0**power for power in powers for digit in digits)
            return [value for value in every if self.low * 0.999 <= value <= self.high * 1.001]

        for digits in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
            if len(within(digits)) >= 3:
                return within(digits)
        return [float(f"{self.low:.3g}"), float(f"{self.high:.3g}")]


def _last_of_each_rate(steps: Sequence[LoadStep]) -> list[LoadStep]:
    """In ascending order: of a rate that was tried twice, what decided."""
    return [step for _, step in sorted({s.set_rate: s for s in steps if s.set_rate}.items())]


def _axes(x: _Scale, y: _Scale | None, below: str, beside: str) -> str:
    floor = _HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>']
    for value in x.ticks():
        parts.append(f'<line class="axis" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(_text(x(value), floor + 17, f"{value:g}", "middle"))
    if y is not None:
        for value in y.ticks():
            at = f'y1="{y(value):.1f}" y2="{y(value):.1f}"'
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {at}/>')
            parts.append(_text(_LEFT - 7, y(value) + 4, f"{value:g}", "end"))
    middle = (_TOP + floor) / 2
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, below, "middle"))
    parts.append(
        f'<text transform="translate(14,{middle:.0f}) rotate(-90)" text-anchor="middle">{escape(beside)}</text>'
    )
    return "".join(parts)


def _beside(labels: Sequence[tuple[float, str, str]]) -> list[str]:
    """Names at the ends of their lines, moved apart where they would lie on each other."""
    parts, last = [], -math.inf
    for place, label, line in sorted(labels):
        last = max(place, last + 13)
        parts.append(_text(_WIDTH - _RIGHT + 8, last + 4, label, "start", line))
    return parts


def _text(x: float, y: float, words: str, anchor: str, line: str = "") -> str:
    return f'<text class="{line}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(parts: Sequence[str], title: str) -> Markup:
    inside = "".join(parts)
    # Words from outside were escaped by _text; the rest is ours.
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{inside}</svg>')  # noqa: S704
