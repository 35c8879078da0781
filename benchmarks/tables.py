"""All measurements under docs/results as one page of tables, each under the command that repeats it.

python -m benchmarks.tables > docs/results/README.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import results


def main() -> None:
    print("# What was measured\n")
    print("Made by `python -m benchmarks.tables > docs/results/README.md` from the JSON files beside it. Accuracies in")
    print("percent, with 95 % intervals (Wilson). Times are of a shared machine: read the ratios.")
    for path in sorted(results.RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        found = content["environment"]
        where = (
            f"mithridate {found['mithridate']}, torch {found['torch']}, {found['threads']} of {found['cores']} cores"
        )
        print(f"\n## {path.stem}\n\n```\n{content['command']}\n```\n\n{where}")
        if path.with_suffix(".png").is_file():
            print(f"\n![{path.stem}]({path.stem}.png)")
        for line in _KINDS.get(_kind(path.stem, content), _nothing)(content):
            print(line)


def _kind(name: str, content: dict[str, Any]) -> str:
    rows = content.get("rows")
    if isinstance(rows, list) and rows and "worst case" in rows[0]:
        return "robustness"
    return name


def _nothing(content: dict[str, Any]) -> Iterator[str]:
    del content
    yield from ()


def _robustness(content: dict[str, Any]) -> Iterator[str]:
    rows = content["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "defense"))
    yield f"\nn = {content['images']}, epsilon {content['epsilon']}"
    yield from _table(
        ["defence", *columns],
        [[f"`{row['defense']}`", *(_share(row[c]) if c in row else "" for c in columns)] for row in rows],
    )


def _rmc(content: dict[str, Any]) -> Iterator[str]:
    rows = content["rows"]
    reference = rows.get("reference", {}).get("batch_1", {}).get("ms")
    table = []
    for cell, row in rows.items():
        if "clean" not in row:
            continue
        best = row.get("batch_64", row["batch_1"])
        table.append(
            [
                f"`{cell}`",
                f"{row['batch_1']['ms']:,.1f}",
                f"{row['batch_64']['ms']:,.2f}" if "batch_64" in row else "",
                f"{best['ms'] / best['forward_ms']:,.2f}",
                f"{reference / best['ms']:,.0f}" if reference else "",
                f"{row['peak_mb']:,.0f}",
                f"{_share(row['clean'])}, n = {row['clean']['n']}",
                f"{_share(row['attacked'])}, n = {row['attacked']['n']}",
            ]
        )
    header = ["row", "ms, batch 1", "ms, batch 64", "x forward", "reference / it", "peak MB", "clean", "attacked"]
    yield f"\n{content['attack']} at {content['epsilon']}, made on the base model"
    yield from _table(header, table)
    if "same-epochs" in rows:
        seconds = rows["same-epochs"]["seconds"]
        yield f"\nSame K, {rows['same-epochs']['epochs']} epochs, one image:"
        yield from _table(
            ["", "seconds", "reference / it"],
            [[name, f"{value:.2f}", f"{seconds['reference'] / value:.2f}"] for name, value in seconds.items()],
        )
    if "same-state" in rows:
        same = {name: row for name, row in rows["same-state"].items() if isinstance(row, dict)}
        yield "\nThe reference's settings, from the same state:"
        yield from _table(
            ["precision", "same class", "n", "largest difference of a score"],
            [
                [name, _share(row["same_class"]), str(row["same_class"]["n"]), f"{row['largest_score_difference']:.1e}"]
                for name, row in same.items()
            ],
        )


def _purity(content: dict[str, Any]) -> Iterator[str]:
    attack = f"{content['attack']} at {content['epsilon']}"
    yield f"\n{content['images']} images, {attack}, {content['neighbors']} neighbours"
    table = []
    for query, found in content["queries"].items():
        for store in ("D", "D'"):
            part = found[store]
            purity, wrong = part["purity"], part["share with the wrong label predicted"]
            table.append([query, store, f"{100 * purity['mean']:.1f}", f"{100 * wrong['mean']:.1f}"])
    yield from _table(["queries", "neighbours in", "of the image's class", "of the class misread"], table)
    yield from _table(
        ["defence", "right on attacked images"],
        [
            [f"`{row['defense']}`", f"{_share(row)}, n = {row['images']}"]
            for row in content["accuracy on attacked images"]
        ],
    )


def _scaling(content: dict[str, Any]) -> Iterator[str]:
    yield "\nMilliseconds an image, 64 at a time:"
    yield from _table(
        ["exemplars", "K", "search", "ridge", "adam"],
        [
            [
                f"{row['exemplars']:,}",
                str(row["neighbors"]),
                *(f"{row[f'{what}_ms']:.3f}" for what in ("search", "ridge", "adam")),
            ]
            for row in content["rows"]
        ],
    )
    for crossing in content["crossings"]:
        yield f"\n{crossing['words']}"


_KINDS: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "robustness": _robustness,
    "rmc": _rmc,
    "neighbor-purity": _purity,
    "scaling": _scaling,
}


def _share(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['accuracy']:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield ""
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    main()
