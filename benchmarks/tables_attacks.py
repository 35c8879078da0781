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


_COSTS = {
    "cpu_ms": "CPU ms a request",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "resident_mb": "resident MB",
    "requests": "requests",
}


def near_duplicates(content: dict[str, Any]) -> Iterator[str]:
    """``query_telemetry``."""
    yield (
        f"\nBase model, {content['dataset']}; Square on {content['attacked']} images, {content['budget']} queries each;"
        f" the latest {content['window']:,} are compared"
    )
    yield from table(
        ["traffic", "fraction", "images", "near, %", "identical, %", "clients warned of"],
        [
            [
                row["traffic"],
                str(row["fraction"]),
                f"{row['queries']:,}",
                *(f"{100 * row[key] / row['queries']:.1f}" for key in ("near", "identical")),
                f"{row['warned']} of {row['clients']}",
            ]
            for row in content["near_duplicates"]
        ],
    )
    columns = [key for key in _COSTS if key in content["cost"]["with"]]
    yield from table(
        ["telemetry, one client, `none`", *(_COSTS[key] for key in columns)],
        [[kind, *(f"{row[key]:,.5g}" for key in columns)] for kind, row in content["cost"].items()],
    )
    yield from table(
        ["numbers in an embedding", "us to compare one image", "kB a client"],
        [
            [f"{row['dimension']:,}", f"{row['us']:.0f}", f"{row['client_bytes'] / 1024:,.0f}"]
            for row in content["compare"]
        ],
    )
