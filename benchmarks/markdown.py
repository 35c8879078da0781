"""Accuracies and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def share(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['accuracy']:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield ""
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(row)} |"
