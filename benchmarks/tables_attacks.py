"""What attacks cost, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.markdown import table


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
