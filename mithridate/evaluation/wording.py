"""How a verdict is said: the same words on the page, in the card, in JUnit and at the start of a service."""

from __future__ import annotations

import math
import re

from mithridate.evaluation.findings import DefenceFindings, Entry, Gate, Paired, Ruling, Share
from mithridate.evaluation.statistics import Interval

NOT_MEASURED = "not measured"
_DASH, _MINUS, _TIMES = "\u2013", "\u2212", "\u00d7"

_UNPRINTABLE = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What neither HTML nor XML 1.0 has a way to say."""

_SAID: dict[Ruling, str] = {
    "base": "The base model, undefended",
    "gain": "Gain over its base",
    "no evidence of gain": "No evidence of gain",
    "harmful": "Harmful on this base",
    "not trustworthy": "Not trustworthy: the evaluation failed its own checks",
}


def stated_ruling(found: DefenceFindings) -> Ruling:
    """The ruling as it may be said: a gain only with an interval that excludes zero and no failed gate.

    Whoever filled the findings should have seen to that; a word that flatters is checked where it is spoken.
    """
    if found.ruling != "gain":
        return found.ruling
    if failed_gates(found):
        return "not trustworthy"
    return "gain" if found.gain is not None and found.gain.interval[0] > 0 else "no evidence of gain"


def ruling_in_words(ruling: Ruling) -> str:
    """For a heading."""
    return _SAID[ruling]


def failed_gates(found: DefenceFindings) -> tuple[Gate, ...]:
    """Those that mark the evaluation."""
    return tuple(gate for gate in found.gates if gate.passed is False)


def applied_gates(found: DefenceFindings) -> tuple[Gate, ...]:
    """Those that passed or failed."""
    return tuple(gate for gate in found.gates if gate.passed is not None)


def percent(share: float) -> str:
    """A share in [0, 1]: ``49.6 %``.

    >>> percent(0.496)
    '49.6 %'
    """
    return f"{number(share)} %" if math.isfinite(share) else NOT_MEASURED


def number(share: float) -> str:
    """The same without its unit. 100.0 and 0.0 are said of exactly that."""
    if not math.isfinite(share):
        return _DASH
    rounded = round(100 * share, 1)
    if rounded == 0 and share > 0:
        return "<0.1"
    if rounded == 100 and share < 1:
        return ">99.9"
    return f"{rounded:.1f}"


def span(interval: Interval | tuple[float, float]) -> str:
    """An interval of shares: 46.5 to 52.7 with a dash."""
    low, high = interval
    return f"{100 * low:.1f}{_DASH}{100 * high:.1f}" if math.isfinite(low + high) else _DASH


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign: minus 0.5."""
    if not math.isfinite(difference):
        return _DASH
    rounded = round(100 * difference, 1)
    return "0.0" if rounded == 0 else f"{'+' if rounded > 0 else _MINUS}{abs(rounded):.1f}"


def points_span(paired: Paired) -> str:
    """The interval of a difference: minus 1.6 to +0.6."""
    return f"{points(paired.interval[0])} to {points(paired.interval[1])}"


def p_value(p: float) -> str:
    """``p = 0.021``, ``p < 0.001``."""
    if not math.isfinite(p):
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}".rstrip("0").rstrip(".")


def factor(latency: float) -> str:
    """2.3 times the base model's time."""
    if not math.isfinite(latency):
        return NOT_MEASURED
    return f"{latency:.0f} {_TIMES}" if latency >= 20 else f"{latency:.1f} {_TIMES}"


def entry_text(entry: Entry) -> str:
    """Of a table: 12.3, 1,250, 48.0 % with its interval; small numbers in powers of ten."""
    if entry is None:
        return _DASH
    if isinstance(entry, Share):
        return f"{percent(entry.value)} ({span(entry.interval)})" if entry.n else NOT_MEASURED
    if isinstance(entry, float):
        if not math.isfinite(entry):
            return _DASH
        if entry == 0:
            return "0"
        return f"{entry:.1e}" if abs(entry) < 1e-3 else f"{entry:,.0f}" if abs(entry) >= 1000 else f"{entry:.3g}"
    return f"{entry:,}" if isinstance(entry, int) else entry


def printable(text: str) -> str:
    """``text`` with a mark in place of every control character and lone surrogate."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
