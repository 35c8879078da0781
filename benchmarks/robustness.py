"""Accuracy of each defence: clean, under a static attack, and under one that knows the defence.

    python -m benchmarks.robustness BUNDLE DATASET --epsilon 8/255 [--defense rmc ...] [--name NAME]

*static*: PGD on the base model, then sent through the defence. *adaptive*: the same PGD through the defence's own
surrogate, which repeats the search and the adaptation at every step (BPDA), once with the cross-entropy and once with
the margin between the true and the strongest other class, and the margin attack on the base model as well; an image
counts only where all three fail. *worst case*: per image, over clean images and over everything that was made in this
run, for whichever row: a guard that hides the gradient of what it guards does not hide it from an attack on the
unguarded row beside it. This is nearer to what a defence is worth against somebody who has read its source; stronger
attackers exist. In all of these an abstention is an error. A defence that may abstain has a second worst case,
in which one on an attacked image is none (on a clean one it still is); no attack here aims past the abstention, so that
column is an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

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
from mithridate.types import Epsilon, Pixels, to_images

_BATCH = 64
_LOSSES = ("cross-entropy", "margin")
_ROWS = ("none", "rmc", "rmc:gate=0", "webnn", "deepnn")


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
    defences = [build_defence(text, resources) for text in defense or _ROWS]
    made = {("static", "cross-entropy"): static}
    if adaptive:
        base = build_defence("none", resources)
        made["base", "margin"] = _adaptive(base, data, attack, radius, seed, "margin")
        for defence, loss in product(defences, _LOSSES):
            made[defence.name, loss] = _adaptive(defence, data, attack, radius, seed, loss)
    rows = [_row(defence, data, made, attack, seed) for defence in defences]
    content = {"bundle": opened.digest, "dataset": data.spec, "images": len(data), "epsilon": epsilon, "rows": rows}
    path = results.write(name, content)
    _print(rows, f"{data.spec}, n = {len(data)}, {attack} at {epsilon}; {path.name}")


def _row(
    defence: Defence, data: LabelledImages, made: dict[tuple[str, str], Pixels], attack: str, seed: int
) -> dict[str, Any]:
    """Asked for the clean images and for everything that was made, with draws that no attack has seen."""
    clean = _ask(defence, torch.from_numpy(data.images), data, seed + 1)
    asked = {key: _ask(defence, pixels, data, seed + 1) for key, pixels in made.items()}
    attacked = {f"static {attack}": asked["static", "cross-entropy"]}
    own = [asked[key] for key in asked if key[0] in (defence.name, "base")]
    if own:
        attacked[f"adaptive {attack}"] = _worst(*own)
    everything = _worst(clean, *asked.values())
    row: dict[str, Any] = {"defense": defence.name, "clean": results.accuracy(clean.answered)}
    row.update({name: results.accuracy(found.answered) for name, found in attacked.items()})
    row["worst case"] = results.accuracy(everything.right)
    if clean.abstained.any() or any(found.abstained.any() for found in asked.values()):
        row["clean abstained"] = results.accuracy(clean.abstained)
        row["worst case or abstained"] = results.accuracy(clean.answered & everything.held)
    print(f"{defence.name}: worst case {100 * row['worst case']['accuracy']:.1f} %", flush=True)
    return row


@dataclass(frozen=True)
class _Asked:
    """Bool ``[N]`` each. ``held``: right, or turned away."""

    right: np.ndarray
    abstained: np.ndarray

    @property
    def answered(self) -> np.ndarray:
        """Right, and stood by."""
        return self.right & ~self.abstained

    @property
    def held(self) -> np.ndarray:
        return self.right | self.abstained


def _worst(*several: _Asked) -> _Asked:
    right = np.all([asked.answered for asked in several], axis=0)
    held = np.all([asked.held for asked in several], axis=0)
    return _Asked(right, held & ~right)


def _adaptive(defence: Defence, data: LabelledImages, attack: str, epsilon: Epsilon, seed: int, loss: str) -> Pixels:
    pgd, generator = parse_attack(attack, epsilon=epsilon), torch.Generator().manual_seed(seed)
    found = []
    batches = list(
        zip(torch.from_numpy(data.images).split(_BATCH), torch.from_numpy(data.labels).split(_BATCH), strict=True)
    )
    with progress() as report:
        for number, (pixels, labels) in enumerate(batches, 1):

            def forward(images: torch.Tensor, labels: torch.Tensor = labels) -> torch.Tensor:
                logits = defence.surrogate(images, generator=generator, budget=Budget())
                return logits if loss == "cross-entropy" else _against_the_strongest(logits, labels)

            targets = labels if loss == "cross-entropy" else torch.zeros_like(labels)
            found.append(pgd.run(forward, pixels, targets, generator=generator))
            report(f"adaptive {defence.name}", number, len(batches))
    return torch.cat(found)


def _against_the_strongest(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``[N, 2]``: the true class and the strongest other one, so that cross-entropy becomes a loss of the margin."""
    true = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
    return torch.cat([true, others], 1)


def _ask(defence: Defence, pixels: Pixels, data: LabelledImages, seed: int) -> _Asked:
    generator = torch.Generator().manual_seed(seed)
    answers = [
        defence.predict(to_images(batch), generator=generator, budget=Budget()) for batch in pixels.split(_BATCH)
    ]
    right = torch.cat([answer.scores.argmax(1) for answer in answers]).numpy() == data.labels
    abstained = [torch.zeros(len(a.scores), dtype=torch.bool) if a.abstained is None else a.abstained for a in answers]
    return _Asked(right, torch.cat(abstained).numpy())


def _print(rows: list[dict], title: str) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [
        [
            f"{percent(row[c]['accuracy'])} [{100 * row[c]['interval'][0]:.0f}, {100 * row[c]['interval'][1]:.0f}]"
            if isinstance(row.get(c), dict)
            else row.get(c, "-")
            for c in columns
        ]
        for row in rows
    ]
    print_table(title, columns, cells)


if __name__ == "__main__":
    typer.run(main)
