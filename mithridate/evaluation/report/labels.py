"""Names beside lines: broken where a defence's name may be, and moved apart where lines end together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LINE, _GAP = 13.0, 4.0
_LINES = 2


@dataclass(frozen=True, kw_only=True)
class Placed:
    """``lines`` from ``y`` downwards."""

    name: str
    lines: tuple[str, ...]
    y: float


def wrap(name: str, width: int) -> tuple[str, ...]:
    """``name`` in at most two lines of ``width`` characters, shortened in the middle where it must be.

    >>> wrap("prm+rmc:scope=tail", 12)
    ('prm+rmc:', 'scope=tail')
    """
    if len(name) > _LINES * width:
        half = width - 2
        name = f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
    lines = [""]
    for piece in re.findall(r"[^+,: ]+[+,: ]?|[+,: ]", name):
        for part in [piece[i : i + width] for i in range(0, len(piece), width)]:
            if len(lines[-1]) + len(part.rstrip()) > width and len(lines) < _LINES:
                lines.append("")
            lines[-1] += part
    return tuple(line.strip() for line in lines)


def place(wanted: Mapping[str, tuple[float, Sequence[str]]], *, low: float, high: float) -> list[Placed]:
    """``name -> (y, lines)`` in order of y, none over another, between ``low`` and ``high`` while they fit there."""
    order = sorted(wanted, key=lambda name: (wanted[name][0], name))
    tops: list[float] = []
    heights = [_LINE * len(wanted[name][1]) + _GAP for name in order]
    for name, height in zip(order, heights, strict=True):
        ideal = wanted[name][0] - (height - _GAP - _LINE) / 2
        tops.append(max(ideal, low, tops[-1] + heights[len(tops) - 1] if tops else low))
    limit = high + _GAP
    for i in reversed(range(len(order))):  # what was pushed below the end goes up again
        tops[i] = min(tops[i], limit - heights[i])
        limit = tops[i]
    return [Placed(name=name, lines=tuple(wanted[name][1]), y=top) for name, top in zip(order, tops, strict=True)]
