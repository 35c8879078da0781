"""What attacks cost, and what was asked beside the matrix, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.markdown import table
from mithridate.evaluation.findings import Share
from mithridate.evaluation.wording import entry_text


def cost(content: dict[str, Any]) -> Iterator[str]:
    """Of white-box attacks (``attack_cost``), or of one that asks (``query_cost``)."""
    if "queries" in content:
        yield f"\n{content['images']} images, {content['queries']:,} queries at {content['epsilon']}"
        yield from table(["attack", "x bare"], [[content["attack"], f"{content['factor']:.3f}"]])
        return
    yield f"\n{content['arch']}, {content['images']} images of {content['image']}, {content['steps']} steps"
    yield from table(
        [f"attack, {content['rounds']} rounds", "x bare", "least", "most"],
        [[row["attack"], *(f"{row[key]:.3f}" for key in ("factor", "least", "most"))] for row in content["rows"]],
    )


def extras(content: dict[str, Any]) -> Iterator[str]:
    """``red_team_extras``."""
    yield f"\n{content['images']} images, epsilon {content['epsilon']}"
    for extra in content["extras"]:
        yield f"\n**{extra['title']}**" + (f" (FAILED: {', '.join(extra['failed'])})" if extra["failed"] else "")
        yield from table(
            extra["columns"],
            [
                [entry_text(Share(**entry) if isinstance(entry, dict) else entry) for entry in row]
                for row in extra["rows"]
            ],
        )
        yield f"\n{extra['note']}"
