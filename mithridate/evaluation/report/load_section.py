"""The service section: a load test's summary in tables, whatever of it is there.

The shape is that of ``mithridate.evaluation.service_load.LoadSummary``; what has another shape is shown as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mithridate.evaluation.findings import Curve, Point
from mithridate.evaluation.report.plots import Panel, panels

_HIDDEN = frozenset({"schema", "steps", "knee", "notes", "command"})
_WORDS = {"p50": "p50", "p95": "p95", "p99": "p99", "p999": "p99.9", "url": "address", "objective_ms": "objective, ms"}


@dataclass(frozen=True, kw_only=True)
class ServiceSection:
    """``facts``: names and values; ``header`` and ``rows``: a line for each step of the load."""

    facts: tuple[tuple[str, str], ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    plots: tuple[Panel, ...]
    knee: str
    notes: tuple[str, ...]
    command: str


def service_section(load: Mapping[str, Any]) -> ServiceSection:
    """What can be shown of ``load``."""
    steps = [step for step in _list(load.get("steps")) if isinstance(step, Mapping)]
    columns = [(name, read) for name, read in _COLUMNS if any(read(step) for step in steps)]
    knee = load.get("knee")
    rest = {name: value for name, value in load.items() if name not in _HIDDEN}
    return ServiceSection(
        facts=tuple(_facts(rest)),
        header=tuple(name for name, _ in columns),
        rows=tuple(tuple(read(step) or "–" for _, read in columns) for step in steps),  # noqa: RUF001
        plots=tuple(_plots(steps)),
        knee=str(knee.get("words", "")) if isinstance(knee, Mapping) else "",
        notes=tuple(str(note) for note in _list(load.get("notes"))),
        command=str(load.get("command") or ""),
    )


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _facts(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flat: what is inside another is named after both."""
    found: list[tuple[str, str]] = []
    for key, value in content.items():
        name = f"{prefix}{_WORDS.get(str(key), str(key).replace('_', ' '))}"
        if isinstance(value, Mapping):
            found += _facts(value, f"{name}: ")
        elif texts := [text for inner in _list(value) if (text := _text(inner))]:
            found.append((name, ", ".join(texts)))
        elif not _list(value) and _text(value):
            found.append((name, _text(value)))
    return found


def _text(value: Any) -> str:
    """Empty for what says nothing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None or value in ([], ()) else str(value)


def _at(*path: str) -> Callable[[Mapping[str, Any]], str]:
    def read(step: Mapping[str, Any]) -> str:
        return _text(_inside(step, *path))

    return read


def _inside(step: Any, *path: str) -> Any:
    for key in path:
        step = step.get(key) if isinstance(step, Mapping) else None
    return step


def _errors(step: Mapping[str, Any]) -> str:
    errors = step.get("errors")
    if not isinstance(errors, Mapping):
        return ""
    return ", ".join(f"{count} {kind}" for kind, count in errors.items() if count) or "none"


def _share(step: Mapping[str, Any]) -> str:
    share = step.get("goodput_share")
    return f"{100 * share:.1f} %" if isinstance(share, (int, float)) and math.isfinite(share) else ""


def _ratio(step: Mapping[str, Any]) -> str:
    """The worst percentile that was measured, with its interval."""
    for name in ("p99", "p95", "p50"):
        value, low, high = (_inside(step, "adversarial_to_clean", name, part) for part in ("value", "low", "high"))
        if isinstance(value, (int, float)):
            return f"{name}: {_text(value)} ({_text(low)} to {_text(high)})"
    return ""


def _limited(step: Mapping[str, Any]) -> str:
    limited = _inside(step, "generator", "limited")
    return "" if limited is None else "yes: " + str(_inside(step, "generator", "why") or "") if limited else "no"


_COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("set rate, 1/s", _at("set_rate")),
    ("clients", _at("clients")),
    ("sent, 1/s", _at("sent_rate")),
    ("answered, 1/s", _at("answered_rate")),
    ("p50, ms", _at("latency", "p50")),
    ("p95, ms", _at("latency", "p95")),
    ("p99, ms", _at("latency", "p99")),
    ("p99.9, ms", _at("latency", "p999")),
    ("goodput, 1/s", _at("goodput_rate")),
    ("in time", _share),
    ("errors", _errors),
    ("adversarial / clean", _ratio),
    ("sustained", _at("sustained")),
    ("generator was the limit", _limited),
)


def _plots(steps: list[Mapping[str, Any]]) -> list[Panel]:
    """Latency and goodput against what was sent; of a single step there is nothing to draw."""

    def points(*path: str) -> tuple[Point, ...]:
        pairs = [(_inside(step, "sent_rate"), _inside(step, *path)) for step in steps]
        return tuple(
            Point(x=float(x), y=float(y), low=float(y), high=float(y))
            for x, y in pairs
            if isinstance(x, (int, float)) and isinstance(y, (int, float))
        )

    latency = {_WORDS[name]: points("latency", name) for name in ("p50", "p95", "p99")}
    rates = {"answered": points("answered_rate"), "within the objective": points("goodput_rate")}
    found: list[Panel] = []
    for title, y_label, series in (
        ("Latency against rate, ms", "ms", latency),
        ("Answers against rate, 1/s", "1/s", rates),
    ):
        if max(map(len, series.values())) > 1:
            curve = Curve(
                kind="rate", title=title, x_label="requests sent a second", y_label=y_label, log_x=False, series=series
            )
            found += panels(curve, base=next(iter(series)), share=False)
    return found
