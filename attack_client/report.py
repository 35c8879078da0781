"""One self-contained page about a campaign: no script, nothing to load."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from numpy.typing import NDArray

from attack_client.campaign import UNDEFENDED
from attack_client.cases import Case, rungs
from attack_client.curves import draw_figures
from attack_client.load import Outcome
from attack_client.results import CLEAN, CampaignResult, threat_model, write_whole
from attack_client.transfer import Crafted
from mithridate.images import encode_png

_STRIPS = 12
_FALLEN = 4


def write_html(result: CampaignResult, path: Path) -> None:
    """Writes the page."""
    # Labels and names come from the service under attack, which may not be a friend.
    environment = Environment(loader=PackageLoader("attack_client"), autoescape=True)
    template = environment.get_template("report.html.jinja")
    budgets = rungs(result.plan.black_box.queries) if result.plan.black_box else ()
    page = template.render(
        result=result,
        plan=result.plan,
        service=result.service,
        defenses=result.defenses,
        headline=_headline(result),
        threat_model=threat_model(result.plan),
        worst=[result.worst(defense) for defense in result.defenses],
        budgets=budgets,
        cases=[_case_line(result, case, budgets) for case in result.cases],
        figures=draw_figures(result),
        strips=[
            *(strip for crafted in result.crafted for strip in _strips(result, crafted)),
            *(strip for case in result.cases for strip in _black_box_strips(result, case)),
        ],
    )
    write_whole(path, page)


def _case_line(result: CampaignResult, case: Case, budgets: Sequence[int]) -> dict[str, Any]:
    """What the table says of a case."""
    clean = result.right(case.defense, CLEAN)
    asked = result.plan.black_box
    values = case.to_json(clean, asked.queries if asked else 0)
    if case.error is not None:
        return {**values, "at": []}
    at = [(case.standing(budget, clean), case.standing_by_luck(budget, clean)) for budget in budgets]
    return {**values, "at": at, "interval": case.interval}


def _headline(result: CampaignResult) -> list[dict[str, Any]]:
    """For each attack and defence: what the base model and the defence keep, and what the defence costs."""
    lines = []
    for crafted in result.crafted:
        for defense in result.defenses:
            if defense == UNDEFENDED:
                continue
            base, defended = result.row(UNDEFENDED, crafted.attack), result.row(defense, crafted.attack)
            clean_base, clean_defended = result.row(UNDEFENDED, CLEAN), result.row(defense, CLEAN)
            lines.append(
                {
                    "attack": crafted.attack,
                    "defense": defense,
                    "base": base,
                    "defended": defended,
                    "clean_cost": 100 * (clean_base.accuracy - clean_defended.accuracy),
                    "latency_factor": clean_defended.p50_ms / clean_base.p50_ms,
                }
            )
    return lines


def _strips(result: CampaignResult, crafted: Crafted) -> list[dict[str, Any]]:
    """Some images: first those the defence got wrong, so that the page does not flatter."""
    defenses = result.defenses
    answers = {(o.image, o.defense): o for o in result.outcomes if o.kind == crafted.attack}
    data = result.plan.data

    def wrong(number: int) -> bool:
        return answers[number, defenses[-1]].class_index != int(data.labels[number])

    order = sorted(range(len(data)), key=lambda number: (not wrong(number), number))
    failed = sum(wrong(number) for number in range(len(data)))
    half = _STRIPS // 2
    chosen = order[: min(failed, half)] + order[failed : failed + _STRIPS - min(failed, half)]
    return [
        _strip(
            result,
            crafted.attack,
            number,
            crafted.pixels[number],
            [_said(result, answers[number, d]) for d in defenses],
        )
        for number in chosen
    ]


def _said(result: CampaignResult, outcome: Outcome) -> dict[str, Any]:
    right = outcome.class_index == int(result.plan.data.labels[outcome.image]) and not outcome.abstained
    label = outcome.label or outcome.error
    return {
        "defense": outcome.defense,
        "label": f"{label} (abstained)" if outcome.abstained else label,
        "right": right,
    }


def _black_box_strips(result: CampaignResult, case: Case) -> list[dict[str, Any]]:
    """Images that fell after the fewest queries."""
    if case.pixels is None or case.defense == UNDEFENDED:
        return []
    fallen = sorted((image for image in case.images if not image.stands), key=lambda image: image.queries)
    strips = []
    for image in fallen[:_FALLEN]:
        label = result.plan.data.classes[image.answers[0]] if not image.abstained[0] else "abstained"
        said = [{"defense": f"{case.defense} after {image.queries} queries", "label": label, "right": False}]
        strips.append(_strip(result, case.attack, image.image, case.pixels[image.image], said))
    return strips


def _strip(
    result: CampaignResult,
    attack: str,
    number: int,
    adversarial: NDArray[np.uint8],
    answers: list[dict[str, Any]],
) -> dict[str, Any]:
    data = result.plan.data
    clean = data.images[number]
    return {
        "attack": attack,
        "number": number,
        "truth": data.classes[int(data.labels[number])],
        "clean": _inline(clean),
        "adversarial": _inline(adversarial),
        "difference": _inline(_amplified(clean, adversarial, result.plan.epsilon.levels)),
        "answers": answers,
    }


def _amplified(clean: NDArray[np.uint8], adversarial: NDArray[np.uint8], levels: int) -> NDArray[np.uint8]:
    """The difference around mid-grey, stretched so that the whole radius fills the range."""
    difference = adversarial.astype(np.float64) - clean.astype(np.float64)
    stretched: NDArray[np.uint8] = (127.5 + 127.5 * difference / max(1, levels)).round().clip(0, 255).astype(np.uint8)
    return stretched


def _inline(image: NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
