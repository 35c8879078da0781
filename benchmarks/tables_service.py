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
