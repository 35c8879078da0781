"""Accuracy of each defence: clean, under a static attack, and under one that knows the defence.

    python -m benchmarks.robustness BUNDLE --dataset SPEC --epsilon 8/255 [--defense rmc ...] [--name NAME]

*static*: PGD on the base model, then sent through the defence. *adaptive*: the same PGD through the defence's own
surrogate, which repeats the search and the adaptation at every step (BPDA). The second is nearer to what a defence is
worth against somebody who has read its source; stronger attackers exist.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from attack_client.transfer import Surrogate, craft
from benchmarks import results
from cli.options import load_data, use_threads
from cli.output import percent, print_table, progress
from mithridate.attacks import parse_attack
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Defence, Resources, build_defence
from mithridate.evaluation import wilson_interval
from mithridate.types import Epsilon, Pixels, to_images

_BATCH = 64


def main(
    bundle: Path,
    dataset: str,
    epsilon: str = "8/255",
    attack: str = "pgd20",
    defense: Annotated[list[str] | None, typer.Option()] = None,
    adaptive: bool = True,
    data_root: Path | None = None,
    name: str = "robustness",
    seed: int = 0,
    threads: int | None = None,
) -> None:
    use_threads(threads)
    opened = Bundle.open(bundle)
    resources = Resources.load(opened)
    data = load_data(dataset, data_root=data_root, download=False, image_size=None, split="test")
    radius = Epsilon.parse(epsilon)
    surrogate = Surrogate(classifier=resources.classifier, source=opened.digest)
    static = torch.from_numpy(craft(surrogate, data, attack=attack, epsilon=radius, seed=seed).pixels)
    rows = []
    for text in defense or ["none", "rmc", "webnn", "deepnn"]:
        defence = build_defence(text, resources)
        row = {"defense": defence.name}
        row["clean"] = _count(defence, torch.from_numpy(data.images), data, seed)
        row[f"static {attack}"] = _count(defence, static, data, seed)
        if adaptive:
            found = _adaptive(defence, data, attack, radius, seed)
            row[f"adaptive {attack}"] = _count(defence, found, data, seed + 1)
            row["worst case"] = _report(row[f"static {attack}"]["right"] & row[f"adaptive {attack}"]["right"])
        rows.append(row)
    for row in rows:
        for cell in row.values():
            if isinstance(cell, dict):
                del cell["right"]
    content = {"bundle": opened.digest, "dataset": data.spec, "images": len(data), "epsilon": epsilon, "rows": rows}
    path = results.write(name, content)
    _print(rows, f"{data.spec}, n = {len(data)}, {attack} at {epsilon}; {path.name}")


def _adaptive(defence: Defence, data: LabelledImages, attack: str, epsilon: Epsilon, seed: int) -> Pixels:
    pgd, generator = parse_attack(attack, epsilon=epsilon), torch.Generator().manual_seed(seed)
    found = []
    batches = list(
        zip(torch.from_numpy(data.images).split(_BATCH), torch.from_numpy(data.labels).split(_BATCH), strict=True)
    )
    with progress() as report:
        for number, (pixels, labels) in enumerate(batches, 1):
            found.append(
                pgd.run(
                    lambda images: defence.surrogate(images, generator=generator, budget=Budget()),
                    pixels,
                    labels,
                    generator=generator,
                )
            )
            report(f"adaptive {defence.name}", number, len(batches))
    return torch.cat(found)


def _count(defence: Defence, pixels: Pixels, data: LabelledImages, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    answers = [
        defence.predict(to_images(batch), generator=generator, budget=Budget()).scores.argmax(1)
        for batch in pixels.split(_BATCH)
    ]
    return _report(torch.cat(answers).numpy() == data.labels)


def _report(right: np.ndarray) -> dict:
    correct = int(right.sum())
    interval = wilson_interval(correct, len(right))
    return {"right": right, "correct": correct, "accuracy": correct / len(right), "interval": list(interval)}


def _print(rows: list[dict], title: str) -> None:
    columns = list(rows[0])
    cells = [
        [
            f"{percent(row[c]['accuracy'])} [{100 * row[c]['interval'][0]:.0f}, {100 * row[c]['interval'][1]:.0f}]"
            if isinstance(row[c], dict)
            else row[c]
            for c in columns
        ]
        for row in rows
    ]
    print_table(title, columns, cells)


if __name__ == "__main__":
    typer.run(main)
