"""The tables of evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.markdown import share, table


def evaluation(content: dict[str, Any]) -> Iterator[str]:
    """Attacks across, defences down; then what may be said of each."""
    found = content["evaluation"]
    rows = found["defences"]
    base = [name for name, cell in rows[0]["attacks"].items() if cell["kind"] == "white-box" and name != "white-box"]
    columns = [name for name in dict.fromkeys(name for row in rows for name in row["attacks"]) if name not in base]
    yield f"\nn = {found['images']}, epsilon {found['epsilon']}, {found['minutes']:.0f} minutes"
    lines = [
        [f"`{row['defense']}`", share(row["clean"]), *(_cell(row["attacks"].get(name)) for name in columns)]
        for row in rows
    ]
    yield from table(["defence", "clean", *columns], lines)
    yield "\nWorst case image by image, over these, what was made on the base model and what was made for other rows:"
    yield from table(
        ["defence", "worst case", "over its base", "McNemar p", "clean cost", "x time", "gates failed", "verdict"],
        [_verdict(row) for row in rows],
    )
    made = ", ".join(f"{name} {_cell(rows[0]['attacks'][name])}" for name in base)
    yield f"\nOn the base model alone: {made}."
    if found["notes"]:
        yield f"\nMade smaller: {'; '.join(found['notes'])}."


def adaptive_cost(content: dict[str, Any]) -> Iterator[str]:
    """Minutes of each adaptive attack."""
    yield f"\n`{content['defense']}`, {content['images']} images, every one attacked to the end"
    yield from table(
        ["attack", "gradient steps an image", "minutes"],
        [[row["attack"], f"{row['gradient_steps']:,}", f"{row['minutes']:.1f}"] for row in content["adaptive_cost"]],
    )


def harder(content: dict[str, Any]) -> Iterator[str]:
    """What stood in an evaluation, attacked again with more."""
    found, effort = content["harder"], content["effort"]
    yield (
        f"\n`{content['defense']}`: of the {content['stood']} images of {content['images']} that stood, attacked again "
        f"({effort['steps']} steps; where an attack has them {effort['rounds']} rounds, {effort['queries']} queries), "
        f"{found['worst']} still do; the base, not attacked again, stood on {found['base']}"
    )
    yield from table(
        ["attack", "fell", "left", "minutes"],
        [[row["attack"], str(row["fell"]), str(row["left"]), f"{row['minutes']:.0f}"] for row in content["attacks"]],
    )
    low, high = (100 * end for end in found["interval"])
    yield (
        f"\nPaired: {100 * found['difference']:+.1f} points ({low:+.1f} to {high:+.1f}), McNemar p = {found['p']:.2g}; "
        "a bound from below, since only one of the two was attacked again."
    )


def planted(content: dict[str, Any]) -> Iterator[str]:
    """Defences that are broken on purpose: how many images stand, and which gates failed."""
    rows = content["rows"]
    attacks = list(dict.fromkeys(attack for row in rows for attack in row["attacks"]))
    yield f"\n{content['dataset']}, {content['images']} images, epsilon {content['epsilon']}; images that stand:"
    yield from table(
        ["defence", "clean", *attacks, "worst case", "flagged by"],
        [
            [
                f"`{row['defense']}`",
                str(row["clean"]),
                *(str(row["attacks"].get(attack, "")) for attack in attacks),
                str(row["worst"]),
                ", ".join(row["flags"]) or "none",
            ]
            for row in rows
        ],
    )


def _cell(cell: dict[str, Any] | None) -> str:
    return "" if cell is None else f"{100 * cell['accuracy']:.1f}"


def _verdict(row: dict[str, Any]) -> list[str]:
    gain, cost = row["gain"], row["clean_cost"]
    return [
        f"`{row['defense']}`",
        share(row["worst case"]),
        "" if gain is None else _points(gain),
        "" if gain is None else f"{gain['p']:.2g}",
        "" if cost is None else _points(cost),
        f"{row['latency_factor']:.1f}",
        ", ".join(row["gates_failed"]) or "none",
        row["ruling"],
    ]


def _points(paired: dict[str, Any]) -> str:
    low, high = (100 * end for end in paired["interval"])
    return f"{100 * paired['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
