"""One self-contained page about a campaign: no script, nothing to load. Its verdict, threat model and checks are the
sections that ``mithridate evaluate`` shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import PackageLoader

from attack_client.cases import Case, rungs
from attack_client.curves import draw_figures
from attack_client.load import CLEAN
from attack_client.results import CampaignResult, techniques, write_whole
from attack_client.strips import draw_strips
from attack_client.verdict import WHO_KNOWS, only
from mithridate.evaluation.report import page
from mithridate.evaluation.wording import printable


def write_html(result: CampaignResult, path: Path) -> None:
    """Writes the page."""
    template = page.environment(PackageLoader("attack_client")).get_template("report.html.jinja")
    asked, found = result.plan.black_box, page.content(result.verdict)
    budgets = rungs(asked.queries) if asked else ()
    attackers = only(result.plan)
    over_http = f"{attackers[0].upper()}{attackers[1:]}: an attack over HTTP cannot show a gain; {WHO_KNOWS}."
    knows = {"transfer": "a model of the attacker's own; not the defence"}
    found |= {
        "attackers": [(kind, knows.get(kind, known), names) for kind, known, names in found["attackers"]],
        "headline": [*found["headline"], over_http],
        "techniques": techniques(result),
        "facts": {name: [("its own card", result.own_card.said_of(name))] for name in result.defenses},
        "result": result,
        "plan": result.plan,
        "missing": [worst for worst in map(result.worst, result.defenses) if worst.missing],
        "budgets": budgets,
        "cases": [_case_line(result, case, budgets) for case in result.cases],
        "figures": draw_figures(result),
        "strips": draw_strips(result),
    }
    write_whole(path, printable(template.render(found)))


def _case_line(result: CampaignResult, case: Case, budgets: Sequence[int]) -> dict[str, Any]:
    """What the table says of a case."""
    clean = result.right(case.defense, CLEAN)
    asked = result.plan.black_box
    values = case.to_json(clean, asked.queries if asked else 0)
    if case.error is not None:
        return {**values, "at": []}
    at = [(case.standing(budget, clean), case.standing_by_luck(budget, clean)) for budget in budgets]
    return {**values, "at": at, "interval": case.interval}
