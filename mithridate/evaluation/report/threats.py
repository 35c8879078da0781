"""The threat model of a run: who attacked, what they knew, and what MITRE ATLAS calls it.

Identifiers are those of ATLAS 5.6.0 (https://atlas.mitre.org). Only what the run really exercised is listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mithridate.evaluation.findings import AttackKind, Cell, DefenceFindings, Evaluation, ExtraKind

KNOWLEDGE: dict[AttackKind, str] = {
    "noise": "nothing: random points inside the ball",
    "transfer": "the base model's weights; not the defence",
    "black-box": "answers only: scores or labels, counted query by query",
    "white-box": "weights and gradients of the defence, its randomness but for the seed of a request",
    "adaptive": "everything: weights, exemplars, index, the defence and its settings; not the seed of a request",
}
"""What an attacker of each kind is given, the weakest first."""

_STAGES = {
    "AML.M0003": ("Model hardening", ("rmc", "knn-oat")),
    "AML.M0006": ("Use ensemble methods", ("sap", "region")),
    "AML.M0010": ("Input restoration", ("prm", "randomization", "pixel-deflection")),
}
"""Mitigations by the stages of a defence that do it."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One technique or mitigation, and by what this run exercised it."""

    id: str
    name: str
    by: str


def attackers(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Kind, what it knows, and its attacks in this run."""
    cells = _cells(evaluation)
    return [
        (kind, knows, _names(cell.attack for cell in cells if cell.kind == kind))
        for kind, knows in KNOWLEDGE.items()
        if any(cell.kind == kind for cell in cells)
    ]


def capabilities(evaluation: Evaluation) -> list[str]:
    """What the attackers of this run could do, and could not."""
    cells = _cells(evaluation)
    steps = [cell.steps for cell in cells if cell.steps is not None]
    queries = [cell.queries for cell in cells if cell.queries is not None]
    said = [f"change every pixel by up to {evaluation.epsilon}, in whole levels of 0 to 255"]
    if steps:
        said.append(f"take up to {max(steps):,} gradient steps an image")
    if queries:
        said.append(f"ask up to {max(queries):,.0f} times an image (the largest median of an attack)")
    said.append("keep, image by image, the best that any of their attacks found")
    return said


def techniques(evaluation: Evaluation) -> list[Entry]:
    """Of MITRE ATLAS."""
    cells = _cells(evaluation)
    asks = _of_kind(cells, "black-box") if "url" in evaluation.bundle else ""
    found = {
        ("AML.T0040", "AI model inference API access"): asks,
        ("AML.T0043.000", "Craft adversarial data: white-box optimization"): _of_kind(cells, "white-box", "adaptive"),
        ("AML.T0043.001", "Craft adversarial data: black-box optimization"): _of_kind(cells, "black-box"),
        ("AML.T0043.002", "Craft adversarial data: black-box transfer"): _of_kind(cells, "transfer"),
        ("AML.T0042", "Verify attack"): "every example, scored again on the defence" if cells else "",
        ("AML.T0015", "Evade AI model"): "every attack" if cells else "",
        ("AML.T0031", "Erode AI model integrity"): _asked(evaluation, "contamination"),
        ("AML.T0034", "Cost harvesting"): _asked(evaluation, "cost"),
        ("AML.T0029", "Denial of AI service"): _names(
            said for said in (_asked(evaluation, "cost"), "the load test" if evaluation.service else "") if said
        ),
    }
    return [Entry(id=id_, name=name, by=by) for (id_, name), by in found.items() if by]


def mitigations(evaluation: Evaluation) -> list[Entry]:
    """Of MITRE ATLAS: what the defences of this run do, and the run itself."""
    found = [
        Entry(id=id_, name=name, by=by)
        for id_, (name, families) in _STAGES.items()
        if (by := _names(d.name for d in evaluation.defences if families_of(d).intersection(families)))
    ]
    abstaining = _names(d.name for d in evaluation.defences if "abstain=" in d.name and "abstain=0" not in d.name)
    if abstaining:
        found.append(Entry(id="AML.M0015", name="Adversarial input detection", by=abstaining))
    return [*found, Entry(id="AML.M0008", name="Validate AI model", by="this evaluation")]


def families_of(found: DefenceFindings) -> set[str]:
    """The names of its stages, without their options."""
    return {stage.split(":")[0] for stage in re.split(r"\+(?=[^\W\d_])", found.name)}


def _cells(evaluation: Evaluation) -> list[Cell]:
    return [cell for found in evaluation.defences for cell in found.cells]


def _of_kind(cells: list[Cell], *kinds: AttackKind) -> str:
    return _names(cell.attack for cell in cells if cell.kind in kinds)


def _asked(evaluation: Evaluation, kind: ExtraKind) -> str:
    """Beside the matrix: the title of what was asked."""
    return _names(extra.title for extra in evaluation.extras if extra.kind == kind)


def _names(names: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(names))
