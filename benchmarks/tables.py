"""All measurements under docs/results as one page of tables, each under the command that repeats it.

python -m benchmarks.tables > docs/results/README.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import results, tables_attacks, tables_evaluation, tables_random, tables_service
from benchmarks.markdown import share, table


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
    yield from table(
        ["defence", *columns],
        [[f"`{row['defense']}`", *(share(row[c]) if c in row else "" for c in columns)] for row in rows],
    )


def _rmc(content: dict[str, Any]) -> Iterator[str]:
    rows = content["rows"]
    reference = rows.get("reference", {}).get("batch_1", {}).get("ms")
    lines = []
    for cell, row in rows.items():
        if "clean" not in row:
            continue
        size = "batch_64" if "batch_64" in row else "batch_1"
        best = row[size]
        slower = best["forward_ms"] / rows["none"][size]["forward_ms"]  # than where the plain model was measured
        lines.append(
            [
                f"`{cell}`",
                f"{row['batch_1']['ms']:,.1f}",
                f"{row['batch_64']['ms']:,.2f}" if "batch_64" in row else "",
                f"{best['ms'] / best['forward_ms']:,.2f}",
                f"{reference * slower / best['ms']:,.0f}" if reference else "",
                f"{row['peak_mb']:,.0f}",
                f"{share(row['clean'])}, n = {row['clean']['n']}",
                f"{share(row['attacked'])}, n = {row['attacked']['n']}",
                _paired(row, rows.get("reference")),
            ]
        )
    header = ["row", "ms, batch 1", "ms, batch 64", "x forward", "reference / it", "peak MB", "clean", "attacked"]
    header.append("attacked, on the reference's images")
    yield f"\n{content['attack']} at {content['epsilon']}, made on the base model"
    yield from table(header, lines)
    yield "\n*reference / it* allows for how busy the machine was: by the plain forward passes taken in between."
    for cell, row in rows.items():
        if "note" in row:
            yield f"\n`{cell}`: {row['note']}"
    if "same-epochs" in rows:
        seconds = rows["same-epochs"]["seconds"]
        yield f"\nSame K, {rows['same-epochs']['epochs']} epochs, one image:"
        yield from table(
            ["", "seconds", "reference / it"],
            [[name, f"{value:.2f}", f"{seconds['reference'] / value:.2f}"] for name, value in seconds.items()],
        )
    if "same-state" in rows:
        yield f"\nThe reference's settings from the same state, {rows['same-state']['epochs']} epoch:"
        yield from table(
            ["learning rate", "who", "same class as the reference", "n", "largest difference of a score"],
            [
                [
                    setting,
                    who,
                    share(found["same_class"]),
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
    lines = []
    for query, found in content["queries"].items():
        for store in ("D", "D'"):
            part = found[store]
            purity, wrong = part["purity"], part["share with the wrong label predicted"]
            lines.append([query, store, f"{100 * purity['mean']:.1f}", f"{100 * wrong['mean']:.1f}"])
    yield from table(["queries", "neighbours in", "of the image's class", "of the class misread"], lines)
    yield from table(
        ["defence", "right on attacked images"],
        [
            [f"`{row['defense']}`", f"{share(row)}, n = {row['images']}"]
            for row in content["accuracy on attacked images"]
        ],
    )


def _scaling(content: dict[str, Any]) -> Iterator[str]:
    yield "\nMilliseconds an image, 64 at a time:"
    yield from table(
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
    yield from table(
        ["defence", *names.values()],
        [[f"`{row['defense']}`", *(f"{row[key]:.1f}" for key in names)] for row in content["rows"]],
    )


def _imagenet(content: dict[str, Any]) -> Iterator[str]:
    yield f"\n{content['arch']}, {content['classes']} classes, {content['side']} px, {content['exemplars']:,} exemplars"
    batches = list(content["rows"][0]["batches"])
    header = [*(f"s an image, batch {count}" for count in batches), "MB before", "peak MB"]
    yield from table(
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
    yield from table(
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
    lines = []
    for where, found in content["memory"].items():
        sizes = list(found["bytes"].values())
        first, last = (_resident(size) for size in (sizes[0], sizes[-1]))
        lines.append([where, f"{first / 1e6:,.1f} MB", f"{last / 1e6:,.1f} MB", f"{100 * (last / first - 1):+.2f} %"])
    yield from table(["where", "first", "last", "growth"], lines)


def _load_agreement(content: dict[str, Any]) -> Iterator[str]:
    yield f"\nwrk {content['tools']['wrk']}, hey {content['tools']['hey']}; medians of {content['rounds']} rounds of"
    yield f"{content['seconds']:g} s with {content['connections']} connections (at a rate: one)"
    yield from table(
        ["target", "comparison", "p50 ms", "theirs", "ratio", "p99 ms", "theirs", "ratio", "requests/s, ratio"],
        [
            [
                row["target"],
                row["comparison"],
                *(f"{row[key][what]:.2f}" for key in ("p50", "p99") for what in ("ours", "theirs", "ratio")),
                f"{row['rps']['ratio']:.2f}",
            ]
            for row in content["agreement"]
        ],
    )
    yield from table(
        ["rate set", "held to", "late, p50 ms", "share of a core"],
        [
            [
                f"{held['rate']:g}",
                f"{100 * held['deviation']:+.3f} %",
                f"{held['late_p50']:.2f}",
                f"{held['cpu_share']:.2f}",
            ]
            for held in content["held"]
        ],
    )


def _fuzz(content: dict[str, Any]) -> Iterator[str]:
    limits, seconds = content["limits"], content["seconds"]
    versions = ", ".join(f"{name} {version}" for name, version in content["libraries"].items())
    yield f"\n{versions}; no exception but `ImageError`, of any of its kinds"
    yield from table(
        ["inputs", *content["outcomes"], "ms p50", "p99", "max", "allowed", "peak MB", "grown by", "allowed"],
        [
            [
                f"{content['fuzzed']:,}",
                *(f"{count:,}" for count in content["outcomes"].values()),
                *(f"{1000 * seconds[key]:.2f}" for key in ("p50", "p99", "max")),
                f"{1000 * limits['seconds']:,.0f}",
                *(
                    f"{size / 1e6:,.0f}"
                    for size in (
                        content["resident"] + content["peak_growth"],
                        content["peak_growth"],
                        limits["growth"],
                    )
                ),
            ]
        ],
    )


_Kind = tuple[Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], Iterator[str]]]

_KINDS: tuple[_Kind, ...] = (
    (lambda content: "evaluation" in content, tables_evaluation.evaluation),
    (lambda content: "adaptive_cost" in content, tables_evaluation.adaptive_cost),
    (lambda content: "harder" in content, tables_evaluation.harder),
    (lambda content: "flags" in _rows(content)[0], tables_evaluation.planted),
    (lambda content: "clean" in content, tables_random.sap),
    (lambda content: "sampling" in content, tables_random.sap_cost),
    (lambda content: "static" in _rows(content)[0], tables_random.by_attacks),
    (lambda content: "worst case" in _rows(content)[0], _robustness),
    (lambda content: isinstance(content.get("rows"), dict), _rmc),
    (lambda content: "accuracy on attacked images" in content, _purity),
    (lambda content: "crossings" in content, _scaling),
    (lambda content: "serial_rps" in _rows(content)[0], _throughput),
    (lambda content: "batches" in _rows(content)[0], _imagenet),
    (lambda content: "order" in content, _order),
    (lambda content: "prm_rows" in content, tables_random.prm),
    (lambda content: "agreement" in content, _load_agreement),
    (lambda content: "gradients" in content, tables_random.pixels),
    (lambda content: "bare_seconds" in content, tables_attacks.cost),
    (lambda content: "extras" in content, tables_attacks.extras),
    (lambda content: "fuzzed" in content, _fuzz),
    (lambda content: "near_duplicates" in content, tables_attacks.near_duplicates),
    (lambda content: "hostile" in content, tables_service.hostile),
    (lambda content: "saturation" in content, tables_service.saturation),
)


if __name__ == "__main__":
    main()
