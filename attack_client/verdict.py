"""What an attack over HTTP says of a defence beside its base: never that it gains.

Whoever only asks, or sends what was made on another model, does not know the defence. That it holds against them is no
evidence that it holds. That it keeps less than the base model is evidence all the same. Words and statistics are those
of ``mithridate evaluate`` (docs/verdict.md), as are the objects, so that the same pages show them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from attack_client.cases import Case
from attack_client.checks import checks
from attack_client.load import CLEAN
from mithridate.attacks import parse_attack
from mithridate.evaluation import percentile
from mithridate.evaluation.environment import environment
from mithridate.evaluation.findings import Cell, DefenceFindings, Evaluation, Gate, Paired, Repeated, Ruling
from mithridate.evaluation.paired import compare, is_gain, is_harm, worst_case
from mithridate.evaluation.repeated import Scored
from mithridate.evaluation.verdict import describe
from mithridate.evaluation.wording import applied_gates, factor, failed_gates, points

if TYPE_CHECKING:
    from attack_client.plan import CampaignPlan
    from attack_client.results import CampaignResult

WHO_KNOWS = "the attacks that know the defence are those of mithridate evaluate"


def find(result: CampaignResult) -> Evaluation:
    """The campaign as an evaluation: the base model first, and every defence compared with it."""
    plan, service = result.plan, result.service
    return Evaluation(
        command=plan.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=math.nan,
        environment={key: str(value) for key, value in environment().items()},
        bundle={"name": service.name, "digest": service.digest, "arch": service.arch, "url": plan.url},
        dataset={"spec": plan.data.spec, "fingerprint": plan.data.fingerprint()},
        classes=tuple(plan.data.classes),
        images=len(plan.data),
        labels=tuple(plan.data.labels.tolist()),
        epsilon=str(plan.epsilon),
        seed=plan.seed,
        suite=", ".join(plan.names),
        defences=tuple(_findings(result, defense) for defense in result.defenses),
    )


def only(plan: CampaignPlan) -> str:
    """What the attackers were: ``black box only``."""
    kinds = ["static transfer"] if plan.attacks else []
    kinds += ["black box"] if plan.black_box and plan.black_box.attacks else []
    return f"{' and '.join(kinds)} only"


def in_a_line(result: CampaignResult, found: DefenceFindings) -> str:
    """The verdict on one defence, for a terminal: beside the base, and with what it rests on."""
    why = "" if found.ruling == "harmful" else f": {only(result.plan)}; {WHO_KNOWS}"
    worst = "not compared with its base" if found.gain is None else f"{describe(found.gain)} over its base"
    cost = "not compared" if found.clean_cost is None else f"{points(found.clean_cost.difference)} points"
    applied, failed = applied_gates(found), failed_gates(found)
    missed = f", failed {', '.join(gate.id for gate in failed)}" if failed else ""
    return "; ".join(
        [
            f"{found.name}: {found.ruling}{why}",
            f"worst case {worst}",
            f"clean {cost}, time {factor(found.latency_factor)} the base's",
            f"checks {len(applied) - len(failed)} of {len(applied)} passed{missed}",
            f"its own card: {result.own_card.said_of(found.name)}",
        ]
    )


def to_json(result: CampaignResult) -> list[dict[str, Any]]:
    """One object a defence, without the base model."""
    return [
        {
            "defense": found.name,
            "ruling": found.ruling,
            "reasons": list(found.reasons),
            "worst_case": _numbers(found.gain),
            "clean_cost": _numbers(found.clean_cost),
            "latency_factor": found.latency_factor if math.isfinite(found.latency_factor) else None,
            "gates": [asdict(gate) for gate in found.gates],
            "own_card": result.own_card.to_json(found.name),
        }
        for found in result.verdict.defences
        if found.ruling != "base"
    ]


def _numbers(paired: Paired | None) -> dict[str, Any] | None:
    return None if paired is None else {**asdict(paired), "interval": list(paired.interval)}


def _findings(result: CampaignResult, defense: str) -> DefenceFindings:
    base, plan = result.defenses[0], result.plan
    cases = [case for case in result.cases if case.defense == defense and case.error is None]
    gates = checks(result, defense)
    compared = None if defense == base else _compare(result, defense)
    ruling, reasons = _rule(plan, compared, gates, gates if defense == base else checks(result, base))
    return DefenceFindings(
        name=defense,
        description=result.descriptions.get(defense, ""),
        random=any(case.random for case in cases),
        clean=tuple(result.right(defense, CLEAN)),
        cells=(*(_transferred(result, defense, kind) for kind in plan.attacks), *map(_asked, cases)),
        worst=result.standing(defense),
        latency_factor=result.row(defense, CLEAN).p50_ms / result.row(base, CLEAN).p50_ms,
        gates=gates,
        clean_cost=None if compared is None else compared.clean_cost,
        gain=None if compared is None else compared.gain,
        ruling=ruling,
        reasons=reasons,
    )


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """A defence beside its base; None where nothing was answered by both. ``left_out``: of what was asked, in words."""

    gain: Paired | None
    clean_cost: Paired | None
    left_out: tuple[str, ...]


def _compare(result: CampaignResult, defense: str) -> _Compared:
    """On images that both answered, under attacks that were measured on both: what one of them alone was spared would
    otherwise count for it."""
    plan, both = result.plan, (result.defenses[0], defense)
    cases = {(case.defense, case.attack): case for case in result.cases if case.error is None}
    names = plan.black_box.attacks if plan.black_box else ()
    asked = [name for name in names if all((side, name) in cases for side in both)]
    answered = {kind: _answered(result, both, kind) for kind in (CLEAN, *plan.attacks)}
    images = sorted(set.intersection(*answered.values())) if asked or plan.attacks else []

    def stood(side: str) -> list[bool]:
        rows: list[Sequence[bool]] = [result.right(side, kind) for kind in answered]
        rows += [[image.stands for image in cases[side, name].images] for name in asked]
        worst = worst_case(rows)
        return [worst[image] for image in images]

    def clean(side: str) -> list[bool]:
        right = result.right(side, CLEAN)
        return [right[image] for image in sorted(answered[CLEAN])]

    left_out = [f"{name}, not measured on both" for name in names if name not in asked]
    if lost := len(plan.data) - len(images):
        left_out.append(f"{lost} of {len(plan.data)} images, not answered by both")
    return _Compared(
        gain=compare(stood(defense), stood(both[0]), seed=plan.seed) if images else None,
        clean_cost=compare(clean(defense), clean(both[0]), seed=plan.seed + 1) if answered[CLEAN] else None,
        left_out=tuple(left_out),
    )


def _answered(result: CampaignResult, sides: Sequence[str], kind: str) -> set[int]:
    """Images that every one of ``sides`` answered."""
    return set.intersection(
        *({o.image for o in result.outcomes if (o.defense, o.kind) == (side, kind) and not o.error} for side in sides)
    )


def _rule(
    plan: CampaignPlan, compared: _Compared | None, gates: Sequence[Gate], base_gates: Sequence[Gate]
) -> tuple[Ruling, tuple[str, ...]]:
    """The word, and why. There is none for a gain: whatever was left standing was not attacked by who knows it. So a
    check that failed has nothing to take away, and stands among the reasons."""
    failed = [f"{gate.id} failed, {gate.name}: {gate.evidence}." for gate in gates if gate.passed is False]
    if compared is None:
        return "base", tuple(failed)
    gain = compared.gain
    notes = [f"Left out of the comparison: {'; '.join(compared.left_out)}."] if compared.left_out else []
    if missed := ", ".join(gate.id for gate in base_gates if gate.passed is False):
        notes.append(f"The base failed {missed}: its own worst case may be lower than stated.")
    if gain is not None and is_harm(gain):
        below = "The interval lies below zero: the defence takes away what its base had"
        return "harmful", (f"{below}, even against attackers who do not know it.", *failed, *notes)
    attackers = only(plan)
    known = f"{attackers[0].upper()}{attackers[1:]}: {WHO_KNOWS}. What stands against the others is no evidence."
    if gain is None:
        what = "It was not compared with its base: no attack was answered by both."
    elif is_gain(gain):
        what = "The interval lies above zero, against attackers who do not know the defence."
    else:
        what = "The interval includes zero, or too few images decide it: not even that is shown."
    return "no evidence of gain", (what, known, *failed, *notes)


def _transferred(result: CampaignResult, defense: str, kind: str) -> Cell:
    mine = [o for o in result.outcomes if (o.defense, o.kind) == (defense, kind)]
    attack = parse_attack(kind, epsilon=result.plan.epsilon)
    return Cell(
        attack=kind,
        kind="transfer",
        config=repr(attack),
        right=tuple(result.right(defense, kind)),
        seconds=sum(o.latency_ms for o in mine) / 1000,
        steps=attack.steps,
    )


def _asked(case: Case) -> Cell:
    return Cell(
        attack=case.attack,
        kind="noise" if case.attack.startswith("random-noise") else "black-box",
        config=case.config,
        right=tuple(image.stands for image in case.images),
        seconds=sum(case.traffic.seconds),
        queries=percentile([float(image.queries) for image in case.images], 0.5),
        repeated=_repeated(case) if case.random else None,
    )


def _repeated(case: Case) -> Repeated:
    pairs = [list(zip(image.answers, image.abstained, strict=True)) for image in case.images]
    right = [
        [answer == image.truth and not abstained for answer, abstained in said]
        for image, said in zip(case.images, pairs, strict=True)
    ]
    return Scored(
        asked=len(right[0]),
        wrong=tuple(answers.count(False) for answers in right),
        right=tuple(answers[0] for answers in right),
        random=True,
    ).repeated
