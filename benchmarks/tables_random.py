"""The tables of what was measured of random defences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.markdown import share, table


def sap(content: dict[str, Any]) -> Iterator[str]:
    yield f"\n{content['arch']}, n = {content['images']}"
    yield from table(["defence", "clean"], [[f"`{name}`", share(found)] for name, found in content["clean"].items()])
    if "attacked" not in content:
        return
    yield f"\n{content['attack']} at {content['epsilon']}, where SAP is right without; other images count as wrong:"
    lines = [[row["attack"], f"`{row['through']}`", share(row["sap"])] for row in content["attacked"]]
    yield from table(
        ["attack", "made through", "SAP, 100 passes"], [*lines, ["worst case", "", share(content["worst case"])]]
    )


def sap_cost(content: dict[str, Any]) -> Iterator[str]:
    yield "\n100 passes together against 100 calls of one pass:"
    yield from table(
        ["images", "sampling", "s together", "s apart", "together / apart"],
        [
            [str(row["batch"]), row["sampling"], *_two(row["together_s"], row["apart_s"], 2)]
            for row in content["passes"]
        ],
    )
    yield "\nSampling one layer with as many draws as it has activations:"
    yield from table(
        ["activations", "binomial, ns each", "multinomial, ns each", "binomial / multinomial"],
        [[f"{row['size']:,}", *_two(row["binomial_ns"], row["multinomial_ns"], 1)] for row in content["sampling"]],
    )
    rows = content["memory"]["rows"]
    yield f"\n{rows[0]['images']} images, {rows[0]['passes']} passes: peak resident MB above the loaded model's."
    yield f"Limit: {content['memory']['limit_mb']}"
    yield from table(
        ["sampling", "MB"], [[row["sampling"], f"{row['peak_mb'] - row['before_mb']:,.0f}"] for row in rows]
    )


def _two(mine: float, other: float, digits: int) -> list[str]:
    return [f"{mine:.{digits}f}", f"{other:.{digits}f}", f"{mine / other:.2f}"]


def prm(content: dict[str, Any]) -> Iterator[str]:
    rows, draws = content["prm_rows"], content["draws"]
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("defense", "worst case")]
    yield f"\nn = {content['images']}, {content['attack']} at {content['epsilon']}; one fresh draw, and in brackets"
    yield f"what is right in all of {draws} draws:"
    lines = []
    for row in rows:
        cells = [f"{share(row[c])} [{100 * row[c]['always']['accuracy']:.1f}]" if c in row else "" for c in columns]
        lines.append([f"`{row['defense']}`", *cells, share(row["worst case"])])
    yield from table(["defence", *columns, "worst case"], lines)
    known = {move: found for move, found in content["known"].items() if move != "mean"}
    yield f"\nThe attacker knows the move (mean {100 * content['known']['mean']:.1f}):"
    yield from table(list(known), [[share(found) for found in known.values()]])


def by_attacks(content: dict[str, Any]) -> Iterator[str]:
    rows, attacks = content["rows"], list(content["rows"][0]["static"])
    yield f"\nn = {content['images']}; behind each accuracy the median L2 distance of what was sent"
    yield "\nMade on the base model:"
    yield from table(
        ["defence", "x forward", "clean", *attacks],
        [
            [
                f"`{row['defense']}`",
                f"{row['forward passes']:,.1f}",
                share(row["clean"]),
                *_with_distance(row["static"], attacks),
            ]
            for row in rows
        ],
    )
    yield "\nMade through each row's own surrogate; worst case over both tables and the clean images:"
    yield from table(
        ["defence", *attacks, "worst case"],
        [[f"`{row['defense']}`", *_with_distance(row["adaptive"], attacks), share(row["worst_case"])] for row in rows],
    )
    for block, settings in content["settings"].items():
        yield f"\n{block}: " + "; ".join(f"`{setting}`" for setting in settings.values())
    yield f"\nReduced for time: {'; '.join(content['reduced'])}."


def _with_distance(cells: dict[str, Any], attacks: list[str]) -> list[str]:
    return [f"{share(cells[name])}, {cells[name]['median_l2']:.2f}" for name in attacks]


def pixels(content: dict[str, Any]) -> Iterator[str]:
    prm, rows = content.get("prm"), content["gradients"]
    yield f"\nn = {content['images']}. R is the mean of |dLoss/dx|."
    if prm is None:
        yield from table(["model", "accuracy", "R"], [[*_gradient(row)] for row in rows])
        return
    yield f"PRM {prm['variant']}, its lattice is {100 * prm['lattice_share']:g} % of the pixels. IoU: of it and"
    yield f"as many pixels with the largest R; {prm['iou_by_chance']:.3f} where they are drawn at random."
    yield from table(
        ["model", "accuracy", "R", "R on the lattice", "R off it", "IoU"],
        [
            [*_gradient(row), *(_size(row[key]) for key in ("on_lattice", "off_lattice")), f"{row['iou']:.3f}"]
            for row in rows
        ],
    )
    cells = {(row["defense"], row["share"], row["pixels"]): row for row in content["masked"]}
    orders = {"top": "largest R first", "random": "at random", "bottom": "smallest R first"}
    count = content["masked"][0]["images"]
    yield f"\n{content['attack']} at {content['epsilon']} on some of the pixels, accuracy, n = {count}:"
    yield from table(
        ["model", "pixels changed", *orders.values()],
        [
            [f"`{model}`", f"{100 * part:g} %", *(share(cells[model, part, order]) for order in orders)]
            for model, part in dict.fromkeys((model, part) for model, part, _ in cells)
        ],
    )


def _gradient(row: dict[str, Any]) -> list[str]:
    return [f"`{row['defense']}`", share(row), _size(row["mean_gradient"])]


def _size(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
