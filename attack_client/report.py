"""One self-contained page about a campaign: no script, nothing to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from attack_client.campaign import UNDEFENDED
from attack_client.cases import Case, rungs
from attack_client.curves import draw_figures
from attack_client.results import CLEAN, CampaignResult, threat_model, write_whole
from attack_client.strips import draw_strips


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
        strips=draw_strips(result),
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
