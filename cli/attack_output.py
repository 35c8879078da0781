"""The short tables at the end of ``mithridate attack``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cli.output import note, percent, print_table

if TYPE_CHECKING:
    from attack_client.results import CampaignResult
    from mithridate.evaluation import Interval


def print_result(result: CampaignResult) -> None:
    """What was sent as it is, what the black-box attacks found, the worst case, and the verdict on every defence."""
    from attack_client.verdict import WHO_KNOWS, in_a_line, only

    _print_sent(result)
    if result.cases:
        _print_cases(result)
    rows = [
        [worst.defense, percent(worst.accuracy), _interval(worst.interval), str(worst.images)]
        for worst in map(result.worst, result.defenses)
    ]
    print_table("worst case of everything above, image by image", ["defence", "accuracy", "95 % interval", "n"], rows)
    judged = [found for found in result.verdict.defences if found.ruling != "base"]
    for found in judged:
        print(in_a_line(result, found))
    if not judged:
        note(f"Only the base model was attacked, {only(result.plan)}: {WHO_KNOWS}.")


def _print_sent(result: CampaignResult) -> None:
    plan = result.plan
    if refused := sum(row.refused for row in result.rows):
        note(f"{refused} requests were refused (429) and sent again, as late as the service asked and at a lower rate")
    rows = [
        [
            f"{row.kind} / {row.defense}",
            percent(row.accuracy),
            _interval(row.interval),
            str(row.images),
            str(row.abstained),
            str(sum(row.errors.values())),
            *(f"{value:.1f}" for value in (row.p50_ms, row.p95_ms, row.p99_ms)),
        ]
        for row in result.rows
    ]
    kinds = f"{', '.join(plan.attacks)} at epsilon {plan.epsilon}, static transfer" if plan.attacks else "clean images"
    print_table(
        f"{plan.url}: {kinds}, {plan.rate:g} requests/s",
        ["images / defence", "accuracy", "95 % interval", "n", "abstained", "errors", "p50 ms", "p95 ms", "p99 ms"],
        rows,
    )


def _print_cases(result: CampaignResult) -> None:
    from attack_client.cases import rungs
    from attack_client.load import CLEAN

    asked = result.plan.black_box
    assert asked is not None
    budgets, rows = rungs(asked.queries), []
    for case in result.cases:
        name = f"{case.attack} / {case.defense}"
        if case.error is not None:
            rows.append([name, "not measured", *[""] * (3 + len(budgets))])
            continue
        clean = result.right(case.defense, CLEAN)
        values = case.to_json(clean, asked.queries)
        rows.append(
            [
                name,
                percent(case.accuracy),
                _interval(case.interval),
                str(case.abstained),
                f"{values['queries_median']:.0f}",
                *(_at(case.standing(budget, clean), case.standing_by_luck(budget, clean)) for budget in budgets),
            ]
        )
    print_table(
        f"black box at epsilon {asked.epsilon}, up to {asked.queries} queries an image; accuracy when sent again",
        ["attack / defence", "accuracy", "95 % interval", "abstained", "queries", *(f"after {b}" for b in budgets)],
        rows,
    )


def _at(seen: float, luck: float | None) -> str:
    """In parentheses: what is left of clean images that are sent as often."""
    return percent(seen) if luck is None else f"{percent(seen)} ({percent(luck)})"


def _interval(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} - {100 * interval.high:.1f}"
