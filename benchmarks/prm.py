"""What random PRM withstands: the published gray box, and attackers who know that the image is moved.

    python -m benchmarks.prm BUNDLE DATASET --epsilon 8/255 [--attack pgd20] [--draws 10]

The bundle must hold a PRM. *static*: made on the base model. *gray box*, as the authors' code runs it: the attack is
made on the network behind the unmoved PRM, and answered by the one that moves; from the image itself, which leaves
every pixel off the lattice as it was, and with the usual random start, which does not. *one draw*, *averaged*: through
the surrogate of ``prm``, one random move a step, and all eight at every step (expectation over transformation); *own
averaged*: the latter through the row's own surrogate. Every answer is a fresh draw. *always*: right in all of
``--draws`` fresh draws: what an attacker who may ask as often leaves. *worst case*: per image, over all columns, each
with its draws. *known*: attacker and defence have the same move, by move and their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from benchmarks import results
from cli.options import load_data, use_threads
from cli.output import percent, print_table, progress
from mithridate.attacks import parse_attack
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Resources, build_defence
from mithridate.defenses.prm import SHIFTS
from mithridate.types import Epsilon, Pixels, to_images

_BATCH = 50

_MADE = {
    "gray box, from the image": ("prm:shift=none", False),
    "gray box, random start": ("prm:shift=none", True),
    "one draw": ("prm:attack=sampled,attack_passes=1", True),
    "averaged": ("prm", True),
}
"""What each attack is made on, and whether it starts at random."""

_ASKED = ("prm", "prm:lambda=0/0.5/1", "prm:stack=1/2")


def main(
    bundle: Path,
    dataset: str,
    epsilon: str = "8/255",
    attack: str = "pgd20",
    draws: int = 10,
    data_root: Path | None = None,
    name: str = "prm",
    seed: int = 0,
    threads: int | None = None,
) -> None:
    use_threads(threads)
    opened = Bundle.open(bundle)
    bench = _Bench(Resources.load(opened), load_data_set(dataset, data_root), attack, Epsilon.parse(epsilon), seed)
    made = {"clean": bench.pixels, "static": bench.make("none", random_start=True)}
    made |= {name: bench.make(text, random_start=start) for name, (text, start) in _MADE.items()}
    rows = [bench.row("none", made, 1), bench.row("prm:shift=none", made, 1)]
    for text in _ASKED:
        own = {} if text == "prm" else {"own averaged": bench.make(text, random_start=True)}
        rows.append(bench.row(text, {**made, **own}, draws))
    content = {
        "bundle": opened.digest,
        "dataset": bench.data.spec,
        "images": len(bench.data),
        "epsilon": epsilon,
        "attack": attack,
        "draws": draws,
        "prm_rows": rows,
        "known": bench.known(),
    }
    path = results.write(name, content)
    _print(content, path)


def load_data_set(dataset: str, data_root: Path | None) -> LabelledImages:
    return load_data(dataset, data_root=data_root, download=False, image_size=None, split="test")


class _Bench:
    def __init__(self, resources: Resources, data: LabelledImages, attack: str, epsilon: Epsilon, seed: int) -> None:
        self.resources, self.data, self.seed = resources, data, seed
        self.pixels = torch.from_numpy(data.images)
        self._labels = torch.from_numpy(data.labels)
        self._attack = parse_attack(attack, epsilon=epsilon)

    def make(self, text: str, *, random_start: bool) -> Pixels:
        """The data set, attacked through the surrogate of ``text``."""
        defence, generator = build_defence(text, self.resources), torch.Generator().manual_seed(self.seed)
        attack, found = replace(self._attack, random_start=random_start), []
        parts = list(zip(self.pixels.split(_BATCH), self._labels.split(_BATCH), strict=True))
        with progress() as report:
            for number, (pixels, labels) in enumerate(parts, 1):
                found.append(
                    attack.run(
                        lambda images: defence.surrogate(images, generator=generator, budget=Budget()),
                        pixels,
                        labels,
                        generator=generator,
                    )
                )
                report(f"attack {text}", number, len(parts))
        return torch.cat(found)

    def right(self, text: str, pixels: Pixels, draws: int) -> np.ndarray:
        """bool ``[draws, N]``, with draws that no attack has seen."""
        defence, found = build_defence(text, self.resources), []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(1000 + self.seed + draw)
            answers = [
                defence.predict(to_images(part), generator=generator, budget=Budget()).scores.argmax(1)
                for part in pixels.split(_BATCH)
            ]
            found.append((torch.cat(answers) == self._labels).numpy())
        return np.stack(found)

    def row(self, text: str, made: dict[str, Pixels], draws: int) -> dict[str, Any]:
        found = {name: self.right(text, pixels, draws) for name, pixels in made.items()}
        row: dict[str, Any] = {"defense": build_defence(text, self.resources).name}
        for name, right in found.items():
            row[name] = {
                **results.accuracy(right[0]),
                "mean": float(right.mean()),
                "always": results.accuracy(right.all(0)),
            }
        row["worst case"] = results.accuracy(np.concatenate(list(found.values())).all(0))
        print(f"{text}: worst case {percent(row['worst case']['accuracy'])}", flush=True)
        return row

    def known(self) -> dict[str, Any]:
        """The accuracy where attacker and defence have the same move, by move."""
        found: dict[str, Any] = {}
        for move in SHIFTS:
            text = f"prm:shift={move}"
            found[move] = results.accuracy(self.right(text, self.make(text, random_start=True), 1)[0])
        found["mean"] = sum(one["accuracy"] for one in found.values()) / len(found)
        return found


def _print(content: dict[str, Any], path: Path) -> None:
    rows: Sequence[dict[str, Any]] = content["prm_rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "defense"))
    cells = [
        [
            row["defense"],
            *(
                f"{percent(row[c]['accuracy'])} [{100 * row[c]['interval'][0]:.0f}, {100 * row[c]['interval'][1]:.0f}]"
                if c in row
                else ""
                for c in columns
            ),
        ]
        for row in rows
    ]
    print_table(f"{content['dataset']}, n = {content['images']}; {path.name}", ["defence", *columns], cells)
    print("known move, mean:", percent(content["known"]["mean"]))


if __name__ == "__main__":
    typer.run(main)
