"""The page: no script, nothing to load, the same from a server, from a disk and on paper."""

from __future__ import annotations

import base64
import binascii
import math
import re
from dataclasses import dataclass
from typing import Any

from jinja2 import BaseLoader, ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mithridate.evaluation import wording
from mithridate.evaluation.findings import Cell, Evaluation, Share
from mithridate.evaluation.report import matrix, threats, verdicts
from mithridate.evaluation.report.load_section import service_section
from mithridate.evaluation.report.plots import panels

_SMALL = 96
"""Images up to so many pixels a side are shown with their pixels, larger ones smoothly."""


def render(evaluation: Evaluation) -> str:
    """The page's HTML."""
    page = environment().get_template("page.html.jinja")
    return wording.printable(page.render(content(evaluation)))


def environment(*loaders: BaseLoader) -> Environment:
    """With the sections of this page, for this one and others; templates of ``loaders`` come first."""
    # Labels and names come from data and services that may not be friends.
    environment = Environment(
        loader=ChoiceLoader([*loaders, PackageLoader("mithridate.evaluation.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    said = ("percent", "number", "span", "points", "points_span", "p_value", "factor", "stated_ruling")
    environment.globals.update(
        {name: getattr(wording, name) for name in (*said, "ruling_in_words", "failed_gates", "entry_text")}
    )
    environment.globals.update({name: getattr(verdicts, name) for name in ("difference_bar", "standing_bars")})
    environment.globals.update({name: getattr(matrix, name) for name in ("fallen", "strongest", "heat")})
    environment.globals.update(applied_gates=wording.applied_gates, share_of=_share_of, is_small=_is_small)
    environment.filters["breakable"] = _breakable
    return environment


def content(evaluation: Evaluation) -> dict[str, Any]:
    """What those sections are rendered with. ``facts``: by defence, more lines for its card: name and text."""
    base = evaluation.base
    return {
        "run": evaluation,
        "facts": {},
        "base": base,
        "others": matrix.others(evaluation),
        "headline": verdicts.headline(evaluation),
        "reach": verdicts.reach(evaluation),
        "attackers": threats.attackers(evaluation),
        "capabilities": threats.capabilities(evaluation),
        "techniques": threats.techniques(evaluation),
        "mitigations": threats.mitigations(evaluation),
        "matrix": matrix.whole(evaluation),
        "sheets": matrix.sheets(evaluation),
        "runs": _runs(evaluation),
        "plots": [panel for curve in evaluation.curves for panel in panels(curve, base=base.name)],
        "gates": _gates(evaluation),
        "service": service_section(evaluation.service) if evaluation.service else None,
        "duration": _duration(evaluation.seconds),
    }


def _breakable(name: str) -> Markup:
    """A defence's name, which may be broken after its signs rather than anywhere."""
    pieces = re.split(r"(?<=[:+,=/_])(?=[^:+,=/_])", name)
    return Markup("<wbr>").join(pieces)


def _share_of(right: tuple[bool, ...]) -> Share:
    return Share(right=sum(right), n=len(right))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """How one attack was run: over all defences."""

    attack: str
    kind: str
    configs: tuple[str, ...]
    steps: str
    queries: str
    seconds: float


def _runs(evaluation: Evaluation) -> list[_Run]:
    made = []
    for attack in matrix.attack_names(evaluation):
        cells = [cell for found in evaluation.defences if (cell := found.cell(attack)) is not None]
        made.append(
            _Run(
                attack=attack,
                kind=cells[0].kind,
                configs=tuple(dict.fromkeys(cell.config for cell in cells)),
                steps=_range([cell.steps for cell in cells if cell.steps is not None]),
                queries=_range([cell.queries for cell in cells if cell.queries is not None]),
                seconds=_total(cells),
            )
        )
    return made


def _total(cells: list[Cell]) -> float:
    return sum(cell.seconds for cell in cells if math.isfinite(cell.seconds))


def _range(values: list[int] | list[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What a check said of some defences: of all of them the same."""

    defences: tuple[str, ...]
    passed: bool | None
    evidence: str


def _gates(evaluation: Evaluation) -> list[tuple[str, str, list[_Result]]]:
    """Each check's id and name, and its results, failures first."""
    names = {gate.id: gate.name for found in evaluation.defences for gate in found.gates}
    made = []
    for id_, name in names.items():
        said: dict[tuple[bool | None, str], list[str]] = {}
        for found in evaluation.defences:
            for gate in found.gates:
                if gate.id == id_:
                    said.setdefault((gate.passed, gate.evidence), []).append(found.name)
        results = [_Result(defences=tuple(who), passed=key[0], evidence=key[1]) for key, who in said.items()]
        made.append((id_, name, sorted(results, key=lambda result: result.passed is not False)))
    return made


def _is_small(image: str) -> bool:
    """Of a PNG in base64, by its header."""
    try:
        header = base64.b64decode(image[:32], validate=True)
    except (binascii.Error, ValueError):
        return True
    return max(int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) <= _SMALL


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return wording.NOT_MEASURED
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
