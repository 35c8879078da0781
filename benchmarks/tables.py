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
        for name in content.get("pictures", []):
            print(f"\n![{path.stem}-{name}]({path.stem}-{name})")
        for line in _lines(path.name, content):
            print(line)


def _lines(name: str, content: dict[str, Any]) -> Iterator[str]:
    for has, lines in _KINDS:
        if has(content):
            return lines(content)
    raise SystemExit(f"error: {name} is of no kind that this page knows; teach benchmarks/tables.py")


def _rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    rows = content.get("rows")
    return rows if isinstance(rows, list) and rows else [{}]


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
        size = "batch_64" if "batch_64" in row else "batch_1"
        best = row[size]
        slower = best["forward_ms"] / rows["none"][size]["forward_ms"]  # than where the plain model was measured
        table.append(
            [
                f"`{cell}`",
                f"{row['batch_1']['ms']:,.1f}",
                f"{row['batch_64']['ms']:,.2f}" if "batch_64" in row else "",
                f"{best['ms'] / best['forward_ms']:,.2f}",
                f"{reference * slower / best['ms']:,.0f}" if reference else "",
                f"{row['peak_mb']:,.0f}",
                f"{_share(row['clean'])}, n = {row['clean']['n']}",
                f"{_share(row['attacked'])}, n = {row['attacked']['n']}",
                _paired(row, rows.get("reference")),
            ]
        )
    header = ["row", "ms, batch 1", "ms, batch 64", "x forward", "reference / it", "peak MB", "clean", "attacked"]
    header.append("attacked, on the reference's images")
    yield f"\n{content['attack']} at {content['epsilon']}, made on the base model"
    yield from _table(header, table)
    yield "\n*reference / it* allows for how busy the machine was: by the plain forward passes taken in between."
    for cell, row in rows.items():
        if "note" in row:
            yield f"\n`{cell}`: {row['note']}"
    if "same-epochs" in rows:
        seconds = rows["same-epochs"]["seconds"]
        yield f"\nSame K, {rows['same-epochs']['epochs']} epochs, one image:"
        yield from _table(
            ["", "seconds", "reference / it"],
            [[name, f"{value:.2f}", f"{seconds['reference'] / value:.2f}"] for name, value in seconds.items()],
        )
    if "same-state" in rows:
        yield f"\nThe reference's settings from the same state, {rows['same-state']['epochs']} epoch:"
        yield from _table(
            ["learning rate", "who", "same class as the reference", "n", "largest difference of a score"],
            [
                [
                    setting,
                    who,
                    _share(found["same_class"]),
                    str(found["same_class"]["n"]),
                    f"{found['largest_score_difference']:.1e}",
                ]
                for setting, compared in rows["same-state"]["settings"].items()
                for who, found in compared.items()
            ],
        )


def _paired(row: dict[str, Any], reference: dict[str, Any] | None) -> str:
    if reference is None:
        return ""
    count = int(reference["attacked"]["n"])
    if row is reference:
        return f"{round(count * row['attacked']['accuracy'])} of {count}"
    first = row["attacked"].get("first", "")[:count]
    return f"{first.count('1')} of {len(first)}" if first else ""


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


def _throughput(content: dict[str, Any]) -> Iterator[str]:
    names = {"serial_rps": "requests/s, 1 client", "parallel_rps": "requests/s, 8 clients"}
    names.update({"open_rate": "open loop, a second", "open_p50_ms": "p50 ms", "open_p99_ms": "p99 ms"})
    yield f"\n{content['dataset']}, one image a request"
    yield from _table(
        ["defence", *names.values()],
        [[f"`{row['defense']}`", *(f"{row[key]:.1f}" for key in names)] for row in content["rows"]],
    )


def _imagenet(content: dict[str, Any]) -> Iterator[str]:
    yield f"\n{content['arch']}, {content['classes']} classes, {content['side']} px, {content['exemplars']:,} exemplars"
    batches = list(content["rows"][0]["batches"])
    header = [*(f"s an image, batch {count}" for count in batches), "MB before", "peak MB"]
    yield from _table(
        ["defence", *header],
        [
            [
                f"`{row['defense']}`",
                *(f"{row['batches'][count]['ms_an_image'] / 1000:.2f}" for count in batches),
                f"{_resident(row['before_bytes']) / 1e6:,.0f}",
                f"{max(_resident(row['batches'][count]['peak_bytes']) for count in batches) / 1e6:,.0f}",
            ]
            for row in content["rows"]
        ],
    )


def _resident(found: Any) -> float:
    return float(found["resident"] if isinstance(found, dict) else found)


def _order(content: dict[str, Any]) -> Iterator[str]:
    yield f"\n{content['images']} images, {content['permutations']} orders: largest difference of a score"
    yield from _table(
        ["defence", "adapted", "alone", "together", "other classes"],
        [
            [
                f"`{row['defense']}`",
                str(row["adapted"]),
                f"{row['alone']:.1e}",
                f"{row['together']:.1e}",
                str(row["other_classes"]),
            ]
            for row in content["order"]
        ],
    )
    yield f"\n{content['requests']:,} requests: resident bytes after the first and the last tenth"
    table = []
    for where, found in content["memory"].items():
        sizes = list(found["bytes"].values())
        first, last = (_resident(size) for size in (sizes[0], sizes[-1]))
        table.append([where, f"{first / 1e6:,.1f} MB", f"{last / 1e6:,.1f} MB", f"{100 * (last / first - 1):+.2f} %"])
    yield from _table(["where", "first", "last", "growth"], table)


def _pixels(content: dict[str, Any]) -> Iterator[str]:
    prm, rows = content.get("prm"), content["gradients"]
    yield f"\nn = {content['images']}. R is the mean of |dLoss/dx|."
    if prm is None:
        yield from _table(["model", "accuracy", "R"], [[*_gradient(row)] for row in rows])
        return
    yield f"PRM {prm['variant']}, its lattice is {100 * prm['lattice_share']:g} % of the pixels. IoU: of it and"
    yield f"as many pixels with the largest R; {prm['iou_by_chance']:.3f} where they are drawn at random."
    yield from _table(
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
    yield from _table(
        ["model", "pixels changed", *orders.values()],
        [
            [f"`{model}`", f"{100 * share:g} %", *(_share(cells[model, share, order]) for order in orders)]
            for model, share in dict.fromkeys((model, share) for model, share, _ in cells)
        ],
    )


def _gradient(row: dict[str, Any]) -> list[str]:
    return [f"`{row['defense']}`", _share(row), _size(row["mean_gradient"])]


def _size(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


_Kind = tuple[Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], Iterator[str]]]

_KINDS: tuple[_Kind, ...] = (
    (lambda content: "worst case" in _rows(content)[0], _robustness),
    (lambda content: isinstance(content.get("rows"), dict), _rmc),
    (lambda content: "accuracy on attacked images" in content, _purity),
    (lambda content: "crossings" in content, _scaling),
    (lambda content: "serial_rps" in _rows(content)[0], _throughput),
    (lambda content: "batches" in _rows(content)[0], _imagenet),
    (lambda content: "order" in content, _order),
    (lambda content: "gradients" in content, _pixels),
)


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
