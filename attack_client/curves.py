"""Accuracy against queries, as SVG that stands in the page itself: nothing to load, nothing to run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from attack_client.cases import LADDER, Case
from attack_client.load import CLEAN
from attack_client.results import CampaignResult

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 44
_COLORS = 6


@dataclass(frozen=True, kw_only=True)
class Line:
    """Accuracy in [0, 1] after ``queries``, a step function given where it changes. ``control``: clean images only."""

    name: str
    points: tuple[tuple[int, float], ...]
    color: int
    control: bool = False


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One attack on all defences."""

    attack: str
    lines: tuple[Line, ...]
    svg: Markup


def draw_figures(result: CampaignResult) -> list[Figure]:
    """A figure for each black-box attack that was measured."""
    asked = result.plan.black_box
    if asked is None:
        return []
    figures = []
    for attack in asked.attacks:
        lines: list[Line] = []
        for case in result.cases:
            if case.attack == attack and case.images:
                lines.extend(_lines(case, result.right(case.defense, CLEAN), asked.queries, result.defenses))
        if lines:
            figures.append(Figure(attack=attack, lines=tuple(lines), svg=_draw(attack, lines, asked.queries)))
    return figures


def _lines(case: Case, clean: Sequence[bool], budget: int, defenses: Sequence[str]) -> list[Line]:
    color = defenses.index(case.defense) % _COLORS
    changes = [image.broken_at for image in case.images]
    points = _steps(changes, budget, lambda queries: case.standing(queries, clean))
    lines = [Line(name=case.defense, points=points, color=color)]
    null = case.null
    if null is not None:
        luck = _steps(null.broken_at, budget, lambda queries: case.standing_by_luck(queries, clean) or 0.0)
        lines.append(Line(name=f"{case.defense}, clean images", points=luck, color=color, control=True))
    return lines


def _steps(broken_at: Sequence[int], budget: int, standing: Callable[[int], float]) -> tuple[tuple[int, float], ...]:
    places = sorted({1, budget, *(number for number in broken_at if 0 < number <= budget)})
    return tuple((queries, standing(queries)) for queries in places)


def _draw(attack: str, lines: Sequence[Line], budget: int) -> Markup:
    """Logarithmic in the queries; a dashed line is the null control."""
    span = math.log10(max(budget, 2))

    def x(queries: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log10(queries) / span

    def y(share: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share)

    parts = [
        Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="accuracy against queries under {}">').format(
            _WIDTH, _HEIGHT, attack
        )
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(_LEFT, y(share), _WIDTH - _RIGHT))
        parts.append(
            Markup('<text x="{}" y="{:.1f}" text-anchor="end">{:.0f} %</text>').format(
                _LEFT - 6, y(share) + 4, 100 * share
            )
        )
    tick = Markup('<path class="grid" d="M{0:.1f} {1}V{2}"/><text x="{0:.1f}" y="{3}" text-anchor="{4}">{5}</text>')
    parts += [
        tick.format(
            x(mark), _TOP, _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM + 16, "end" if mark == budget else "middle", mark
        )
        for mark in _ticks(budget)
    ]
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">queries an image</text>').format(_WIDTH // 2, _HEIGHT - 6)
    )
    for line in lines:
        path = f"M{x(line.points[0][0]):.1f} {y(line.points[0][1]):.1f}"
        path += "".join(f"H{x(queries):.1f}V{y(share):.1f}" for queries, share in line.points[1:])
        kind = "line control" if line.control else "line"
        parts.append(
            Markup('<path class="{} color{}" d="{}"><title>{}</title></path>').format(kind, line.color, path, line.name)
        )
    return Markup("").join([*parts, Markup("</svg>")])


def _ticks(budget: int) -> list[int]:
    """Powers of ten and the ladder, and the budget where it is not next to one of them."""
    marks = {10**power for power in range(8)} | set(LADDER)
    return [mark for mark in sorted(marks) if mark < 0.7 * budget] + [budget]
