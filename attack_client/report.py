"""One self-contained page about a campaign: no script, nothing to load."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from numpy.typing import NDArray

from attack_client.campaign import CLEAN, UNDEFENDED, CampaignResult
from attack_client.load import Outcome
from attack_client.transfer import Crafted
from mithridate.images import encode_png

_STRIPS = 12


def write_html(result: CampaignResult, path: Path) -> None:
    """Writes the page."""
    # Labels and names come from the service under attack, which may not be a friend.
    environment = Environment(loader=PackageLoader("attack_client"), autoescape=True)
    template = environment.get_template("report.html.jinja")
    defenses = list(dict.fromkeys(row.defense for row in result.rows))
    kinds = list(dict.fromkeys(row.kind for row in result.rows))
    path.write_text(
        template.render(
            result=result,
            plan=result.plan,
            service=result.service,
            defenses=defenses,
            kinds=kinds,
            headline=_headline(result, defenses),
            strips=[strip for crafted in result.crafted for strip in _strips(result, crafted, defenses)],
        ),
        encoding="utf-8",
    )


def _headline(result: CampaignResult, defenses: list[str]) -> list[dict[str, Any]]:
    """For each attack and defence: what the base model and the defence keep, and what the defence costs."""
    lines = []
    for crafted in result.crafted:
        for defense in defenses:
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


def _strips(result: CampaignResult, crafted: Crafted, defenses: list[str]) -> list[dict[str, Any]]:
    """Some images: first those the defence got wrong, so that the page does not flatter."""
    answers = {(o.image, o.defense): o for o in result.outcomes if o.kind == crafted.attack}
    data = result.plan.data

    def wrong(number: int) -> bool:
        return answers[number, defenses[-1]].class_index != int(data.labels[number])

    order = sorted(range(len(data)), key=lambda number: (not wrong(number), number))
    failed = sum(wrong(number) for number in range(len(data)))
    half = _STRIPS // 2
    chosen = order[: min(failed, half)] + order[failed : failed + _STRIPS - min(failed, half)]
    return [_strip(result, crafted, number, answers, defenses) for number in chosen]


def _strip(
    result: CampaignResult,
    crafted: Crafted,
    number: int,
    answers: Mapping[tuple[int, str], Outcome],
    defenses: list[str],
) -> dict[str, Any]:
    data = result.plan.data
    clean, adversarial = data.images[number], crafted.pixels[number]
    truth = int(data.labels[number])
    return {
        "attack": crafted.attack,
        "number": number,
        "truth": data.classes[truth],
        "clean": _inline(clean),
        "adversarial": _inline(adversarial),
        "difference": _inline(_amplified(clean, adversarial, crafted.epsilon.levels)),
        "answers": [
            {
                "defense": defense,
                "label": answers[number, defense].label or answers[number, defense].error,
                "right": answers[number, defense].class_index == truth,
            }
            for defense in defenses
        ],
    }


def _amplified(clean: NDArray[np.uint8], adversarial: NDArray[np.uint8], levels: int) -> NDArray[np.uint8]:
    """The difference around mid-grey, stretched so that the whole radius fills the range."""
    difference = adversarial.astype(np.float64) - clean.astype(np.float64)
    stretched: NDArray[np.uint8] = (127.5 + 127.5 * difference / max(1, levels)).round().clip(0, 255).astype(np.uint8)
    return stretched


def _inline(image: NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
