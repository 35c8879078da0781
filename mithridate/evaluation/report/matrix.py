"""The matrix: attacks down, defences across, the base model always first, the worst case last."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mithridate.evaluation.findings import Cell, DefenceFindings, Evaluation, Share
from mithridate.evaluation.wording import number, span

PRINTED_COLUMNS = 6
"""Defences on one sheet of A4; more are printed as several tables, each with the base model."""

_NAMED = 5
"""So many attacks are named in a sentence; the others are counted."""

_STOPS = (
    (0.0, (0xFB, 0xFC, 0xFE)),
    (0.25, (0xCF, 0xE0, 0xF1)),
    (0.5, (0x86, 0xB4, 0xD9)),
    (0.75, (0x3A, 0x7F, 0xB9)),
    (1.0, (0x0B, 0x3C, 0x6F)),
)
"""From what fell to what stood: one hue that darkens all the way, so that it works in grey and for every eye."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One cell of the table, in words. ``images``: where they are not all that the run had."""

    accuracy: str
    interval: str
    color: str
    ink: str
    images: int | None = None
    repeated: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """``kind`` is the attacker's; ``cells`` None where an attack was not run."""

    name: str
    kind: str
    cells: tuple[Shown | None, ...]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Some of the defences under all attacks."""

    defences: tuple[DefenceFindings, ...]
    clean: Row
    attacks: tuple[Row, ...]
    worst: Row


def whole(evaluation: Evaluation) -> Matrix:
    """All of it."""
    return _matrix(evaluation, [evaluation.base, *others(evaluation)])


def sheets(evaluation: Evaluation) -> list[Matrix]:
    """The same in pieces that fit on paper; empty where the whole one does."""
    rest, width = others(evaluation), PRINTED_COLUMNS - 1
    if len(rest) <= width:
        return []
    # Pieces of about one width: a last one with a single column would look like a mistake.
    pieces = math.ceil(len(rest) / width)
    width = math.ceil(len(rest) / pieces)
    return [
        _matrix(evaluation, [evaluation.base, *rest[start : start + width]]) for start in range(0, len(rest), width)
    ]


def others(evaluation: Evaluation) -> list[DefenceFindings]:
    """All but the base model."""
    return [found for found in evaluation.defences if found is not evaluation.base]


def attack_names(evaluation: Evaluation) -> list[str]:
    """In the order in which they first appear."""
    return list(dict.fromkeys(cell.attack for found in evaluation.defences for cell in found.cells))


def fallen(found: DefenceFindings) -> str:
    """The attacks that leave it nothing, in words; empty where there are none."""
    names = [cell.attack for cell in found.cells if cell.right and not any(cell.right)]
    if len(names) > 1 and len(names) == len(found.cells):
        return f"every one of {len(names)} attacks"
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def strongest(found: DefenceFindings) -> Cell | None:
    """The attack that leaves it least."""
    return min((cell for cell in found.cells if cell.right), key=lambda cell: cell.accuracy.value, default=None)


def heat(share: float) -> tuple[str, str]:
    """Background and ink for a share in [0, 1]; their contrast is at least 4.5 to 1."""
    if not math.isfinite(share):
        return "#ffffff", "#000000"
    share = min(1.0, max(0.0, share))
    high = next(i for i, (at, _) in enumerate(_STOPS) if share <= at)
    low = max(0, high - 1)
    (start, first), (end, second) = _STOPS[low], _STOPS[high]
    part = 0.0 if end == start else (share - start) / (end - start)
    rgb = tuple(round(a + part * (b - a)) for a, b in zip(first, second, strict=True))
    light = _luminance(rgb)
    return "#{:02x}{:02x}{:02x}".format(*rgb), "#000000" if (light + 0.05) ** 2 > 0.0525 else "#ffffff"


def _luminance(rgb: Sequence[int]) -> float:
    """Relative, of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (level / 255 for level in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _matrix(evaluation: Evaluation, defences: Sequence[DefenceFindings]) -> Matrix:
    def flags(name: str, each: Iterator[tuple[bool, ...]]) -> Row:
        return Row(name=name, kind="", cells=tuple(_shown(_share(right), evaluation) for right in each))

    rows = []
    for attack in attack_names(evaluation):
        cells = [found.cell(attack) for found in defences]
        kind = next(c.kind for found in evaluation.defences if (c := found.cell(attack)) is not None)
        rows.append(
            Row(name=attack, kind=kind, cells=tuple(None if c is None else _cell(c, evaluation) for c in cells))
        )
    return Matrix(
        defences=tuple(defences),
        clean=flags("clean", (found.clean for found in defences)),
        attacks=tuple(rows),
        worst=flags("worst case", (found.worst for found in defences)),
    )


def _cell(cell: Cell, evaluation: Evaluation) -> Shown:
    repeated = []
    if cell.repeated is not None:
        # One try is what is expected already.
        tries = [(f"{m:,} tries", number(share)) for m, share in sorted(cell.repeated.persistent.items()) if m > 1]
        repeated = [
            ("expected", number(cell.repeated.expected)),
            ("majority", number(cell.repeated.majority)),
            *tries,
        ]
    return _shown(cell.accuracy, evaluation, tuple(repeated))


def _shown(share: Share, evaluation: Evaluation, repeated: tuple[tuple[str, str], ...] = ()) -> Shown:
    color, ink = heat(share.value)
    return Shown(
        accuracy=number(share.value),
        interval=span(share.interval),
        color=color,
        ink=ink,
        images=None if share.n == evaluation.images else share.n,
        repeated=repeated,
    )


def _share(right: tuple[bool, ...]) -> Share:
    return Share(right=sum(right), n=len(right))
