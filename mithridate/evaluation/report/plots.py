"""Lines with their intervals, as SVG inside the page: labelled where they end, told apart without colour.

Colours and dark mode are the style sheet's: a line has the class ``s0`` (the base model), ``s1`` ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from mithridate.evaluation.findings import Curve, Point
from mithridate.evaluation.report.labels import Placed, place, wrap
from mithridate.evaluation.wording import percent

WIDTH, HEIGHT = 440, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 132, 12, 44
LINES = 6
"""In one panel; more are drawn in several, each with the base model."""
_MARKS = ("circle", "square", "up", "diamond", "down", "cross")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")
_TICK_PIXELS = 30


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One drawing with its words; ``rows`` are its numbers: a name, and y with interval at each of ``xs``."""

    title: str
    svg: Markup
    xs: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Where values lie on the paper."""

    x: Callable[[float], float]
    top: float
    share: bool

    def y(self, value: float) -> float:
        height = HEIGHT - _TOP - _BOTTOM
        return _TOP + height * (1 - min(max(value / self.top, 0.0), 1.0))


def panels(curve: Curve, *, base: str, share: bool = True) -> list[Panel]:
    """``curve`` drawn: y is a share in [0, 1], or with ``share`` False any number from 0. Empty where it has no point.

    ``base`` names the line that is drawn strongest and repeated in every panel.
    """
    series = {name: _usable(points, log=curve.log_x) for name, points in curve.series.items()}
    series = {name: points for name, points in series.items() if points}
    rest = [name for name in series if name != base]
    first = [base] if base in series else []
    width = LINES - 1
    groups = [rest[start : start + width] for start in range(0, len(rest), width)] or ([[]] if first else [])
    made = []
    for number, group in enumerate(groups, 1):
        looks = {**dict.fromkeys(first, 0), **{name: look for look, name in enumerate(group, 1)}}
        title = curve.title if len(groups) == 1 else f"{curve.title} ({number} of {len(groups)})"
        shown = replace(curve, title=title, series={name: series[name] for name in looks})
        made.append(_panel(shown, looks, share=share))
    return made


def _panel(curve: Curve, looks: dict[str, int], *, share: bool) -> Panel:
    xs = sorted({point.x for points in curve.series.values() for point in points})
    highest = max((point.high for points in curve.series.values() for point in points), default=1.0)
    frame = _Frame(x=_scale(xs, log=curve.log_x), top=1.0 if share else _nice(highest), share=share)
    said = percent if share else _short
    ends = {name: frame.y(points[-1].y) for name, points in curve.series.items()}
    labels = place({name: (y, wrap(name, 15)) for name, y in ends.items()}, low=_TOP + 6, high=HEIGHT - _BOTTOM)
    parts = [_axes(curve, frame, xs)]
    parts += [_band(points, looks[name], frame) for name, points in curve.series.items()]
    parts += [_line(name, points, looks[name], frame, said) for name, points in curve.series.items()]
    parts += [_label(placed, looks[placed.name], frame.x(curve.series[placed.name][-1].x), ends) for placed in labels]
    spoken = "; ".join(
        f"{name}: {said(p[0].y)} at {_short(p[0].x)}, {said(p[-1].y)} at {_short(p[-1].x)}"
        for name, p in curve.series.items()
    )
    svg = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, f"{curve.title}. {spoken}", Markup("").join(parts)
    )
    return Panel(title=curve.title, svg=svg, xs=tuple(map(_short, xs)), rows=_rows(curve, xs, said))


def _rows(curve: Curve, xs: Sequence[float], said: Callable[[float], str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    rows = []
    for name, points in curve.series.items():
        at = {p.x: f"{said(p.y)} ({said(p.low)} to {said(p.high)})" for p in points}
        rows.append((name, tuple(at.get(x, "") for x in xs)))
    return tuple(rows)


def _usable(points: Sequence[Point], *, log: bool) -> tuple[Point, ...]:
    """In order of x, without what cannot be drawn; a missing end of an interval is the point itself."""
    finite = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y) and not (log and p.x < 0)]
    return tuple(
        replace(p, low=p.low if math.isfinite(p.low) else p.y, high=p.high if math.isfinite(p.high) else p.y)
        for p in sorted(finite, key=lambda p: p.x)
    )


def _scale(xs: Sequence[float], *, log: bool) -> Callable[[float], float]:
    """From x to pixels. On a logarithmic axis 0 has a place of its own, left of the smallest."""
    left, right = _LEFT + 10.0, float(WIDTH - _RIGHT)
    positive = [x for x in xs if x > 0]
    if not log or not positive:
        low, high = min(xs, default=0.0), max(xs, default=1.0)
        return lambda x: left + (right - left) * ((x - low) / (high - low) if high > low else 0.5)
    zero = left
    left += 34.0 if 0 in xs else 0.0
    low, high = math.log10(min(positive)), math.log10(max(positive))
    return lambda x: zero if x <= 0 else left + (right - left) * ((math.log10(x) - low) / (high - low or 1.0))


def _axes(curve: Curve, frame: _Frame, xs: Sequence[float]) -> Markup:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for part in range(5):
        value = frame.top * part / 4
        text = f"{25 * part} %" if frame.share else _short(value)
        y = frame.y(value)
        parts.append(
            Markup('<line class="grid" x1="{}" y1="{:.1f}" x2="{}" y2="{:.1f}"/>').format(_LEFT, y, right + 4, y)
            + Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(_LEFT - 5, y + 4, text)
        )
    for x in _ticks(xs, frame):
        at = frame.x(x)
        parts.append(
            Markup('<line class="axis" x1="{0:.1f}" y1="{1}" x2="{0:.1f}" y2="{2}"/>').format(at, bottom, bottom + 4)
            + Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                at, bottom + 17, _short(x)
            )
        )
    middle = (_LEFT + right) / 2
    label = curve.x_label + (" (log scale)" if curve.log_x else "")
    parts.append(Markup('<line class="axis" x1="{0}" y1="{1}" x2="{2}" y2="{1}"/>').format(_LEFT, bottom, right + 4))
    parts.append(
        Markup('<text class="name" x="{}" y="{}" text-anchor="middle">{}</text>').format(middle, HEIGHT - 8, label)
    )
    return Markup("").join(parts)


def _ticks(xs: Sequence[float], frame: _Frame) -> list[float]:
    """Those of the measured places whose numbers do not touch; the last is always among them."""
    kept: list[float] = list(xs[-1:])
    for x in reversed(xs[:-1]):
        if frame.x(kept[-1]) - frame.x(x) >= _TICK_PIXELS:
            kept.append(x)
    return kept


def _band(points: Sequence[Point], look: int, frame: _Frame) -> Markup:
    if len(points) < 2:
        return Markup("")
    around = [(p.x, p.high) for p in points] + [(p.x, p.low) for p in reversed(points)]
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in around)
    return Markup('<polygon class="band s{}" points="{}"/>').format(look, path)


def _line(name: str, points: Sequence[Point], look: int, frame: _Frame, said: Callable[[float], str]) -> Markup:
    path = " ".join(f"{frame.x(p.x):.1f},{frame.y(p.y):.1f}" for p in points)
    line = Markup('<polyline class="line s{}" points="{}" stroke-dasharray="{}"/>').format(look, path, _DASHES[look])
    whiskers = Markup("").join(
        Markup('<line class="whisker s{0}" x1="{1:.1f}" y1="{2:.1f}" x2="{1:.1f}" y2="{3:.1f}"/>').format(
            look, frame.x(p.x), frame.y(p.low), frame.y(p.high)
        )
        for p in (points if len(points) == 1 else ())
    )
    marks = Markup("").join(
        Markup("<g>{}<title>{}</title></g>").format(
            _mark(_MARKS[look], frame.x(p.x), frame.y(p.y), look),
            f"{name}: {said(p.y)} ({said(p.low)} to {said(p.high)}) at {_short(p.x)}",
        )
        for p in points
    )
    return line + whiskers + marks


def _mark(kind: str, x: float, y: float, look: int) -> Markup:
    r = 3.4
    shapes = {
        "square": f"M{-r} {-r}h{2 * r}v{2 * r}h{-2 * r}z",
        "up": f"M0 {-r - 1}L{r + 1} {r}H{-r - 1}z",
        "down": f"M0 {r + 1}L{r + 1} {-r}H{-r - 1}z",
        "diamond": f"M0 {-r - 1.5}L{r + 1.5} 0L0 {r + 1.5}L{-r - 1.5} 0z",
        "cross": "M-4 -2.4L-2.4 -4L0 -1.6L2.4 -4L4 -2.4L1.6 0L4 2.4L2.4 4L0 1.6L-2.4 4L-4 2.4L-1.6 0z",
    }
    if kind == "circle":
        return Markup('<circle class="mark s{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(look, x, y, r)
    return Markup('<path class="mark s{}" transform="translate({:.1f} {:.1f})" d="{}"/>').format(
        look, x, y, shapes[kind]
    )


def _label(placed: Placed, look: int, end: float, ends: dict[str, float]) -> Markup:
    x, middle = WIDTH - _RIGHT + 22, placed.y + 6.5 * (len(placed.lines) - 1)
    leader = Markup('<polyline class="leader s{}" points="{:.1f},{:.1f} {:.1f},{:.1f} {:.1f},{:.1f}"/>').format(
        look, end + 5, ends[placed.name], x - 14, middle, x - 8, middle
    )
    lines = Markup("").join(
        Markup('<tspan x="{}" y="{:.1f}">{}</tspan>').format(x + 2, placed.y + 4 + 13 * i, line)
        for i, line in enumerate(placed.lines)
    )
    mark = _mark(_MARKS[look], x - 6, middle, look)
    return leader + mark + Markup('<text class="direct">{}<title>{}</title></text>').format(lines, placed.name)


def _nice(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten: it divides well by four."""
    if not (math.isfinite(value) and value > 0):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 4, 6, 8, 10) if power * step >= value * (1 - 1e-9))


def _short(value: float) -> str:
    """5000 as 5k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
