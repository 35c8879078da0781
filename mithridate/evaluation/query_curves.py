"""Accuracy against the number of queries, from one black-box run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mithridate.attacks.oracle import BlackBoxResult
from mithridate.evaluation.findings import Curve, Point, Share

LADDER = (100, 1000, 5000)
"""The budgets that reports compare."""


def accuracy_after(result: BlackBoxResult, queries: int) -> Share:
    """The images that none of the first ``queries`` broke. After one query, that is the clean accuracy."""
    return standing_after(result.broken_at, queries)


def standing_after(broken_at: torch.Tensor, queries: int) -> Share:
    """The same of int64 ``[N]``: the query that broke each, 0 for none."""
    standing = (broken_at == 0) | (broken_at > queries)
    return Share(right=int(standing.sum()), n=len(standing))


def query_curve(
    results: Mapping[str, BlackBoxResult], *, budget: int, ladder: Sequence[int] = LADDER, title: str = ""
) -> Curve:
    """A line for each of ``results``, runs of ``budget`` queries an image: after one query, at the steps of ``ladder``
    below the budget, and at its end. Give the null control of a random defence as one of them.
    """
    steps = sorted({1, *(step for step in ladder if step < budget), budget})
    return Curve(
        kind="queries",
        title=title or "Accuracy against queries",
        x_label="queries an image",
        y_label="accuracy",
        log_x=True,
        series={
            name: tuple(Point.of(step, accuracy_after(result, step)) for step in steps)
            for name, result in results.items()
        },
    )


def median_queries(result: BlackBoxResult) -> float:
    """An image's, broken or not."""
    return float(result.queries.double().quantile(0.5)) if len(result.queries) else float("nan")
