"""Tables of what was measured on a running service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.markdown import table


def hostile(content: dict[str, Any]) -> Iterator[str]:
    """A victim beside hostile clients."""
    found, victim = content["hostile"], content["victim"]
    yield (
        f"\n{found['requests']:,} hostile requests from {found['clients']} clients; the victim asks for "
        f"{victim['images']} images with {len(victim['defenses'])} defences over {len(victim['protocols'])} protocols"
    )
    yield from table(
        ["victim's answers", "n", "another class than alone", "bit for bit as alone", "largest difference of a score"],
        [
            [
                row["when"],
                f"{row['answers']:,}",
                str(row["other_classes"]),
                f"{row['identical']:,}",
                f"{row['largest']:.1e}",
            ]
            for row in victim["rows"]
        ],
    )
    yield from table(
        ["hostile", "answered"],
        [
            [kind, ", ".join(f"{status}: {count:,}" for status, count in sorted(answers.items()))]
            for kind, answers in found["answers"].items()
        ],
    )
    unexpected = found["unexpected"]
    yield f"\nStatuses that a kind should not have: {unexpected or 'none'}"


def saturation(content: dict[str, Any]) -> Iterator[str]:
    """What is left of a service that is asked for too much."""
    knee = content["knee"]
    yield (
        f"\nKnee: {knee['goodput']:.0f} answers a second within {content['objective_ms']:g} ms. Then several times "
        f"that, {content['seconds']:g} s each, open model, {content['connections']} connections:"
    )
    yield from table(
        [
            "asked for",
            "goodput / knee",
            "answered p99 ms",
            "shed",
            "shed p50, p99 ms",
            "/livez p50, p99 ms",
            "loop lag p99, at most ms",
            "other errors",
            "memory, MB",
            "growth",
        ],
        [_overload(row, knee["goodput"]) for row in content["saturation"]],
    )


def _overload(row: dict[str, Any], knee: float) -> list[str]:
    shed, live = row["shed_ms"], row["livez_ms"]
    return [
        f"{row['factor']:g} x, {row['rate']:.0f}/s, {row['requests']:,} requests",
        f"{row['goodput'] / knee:.2f}",
        f"{row['answered_ms']['p99']:.0f}",
        f"{shed['n']:,}",
        f"{shed['p50']:.1f}, {shed['p99']:.1f}",
        f"{live['p50']:.1f}, {live['p99']:.1f}",
        f"{row['loop_lag_p99_ms']:.0f}",
        ", ".join(f"{name}: {count}" for name, count in row["other_errors"].items()) or "none",
        f"{row['memory_bytes'][1] / 1e6:.0f}",
        f"{100 * row['memory_growth']:+.2f} %",
    ]
