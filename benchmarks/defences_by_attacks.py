"""The table of the PRM post: random defences by classic attacks, with a second block for attackers who know them.

    python -m benchmarks.defences_by_attacks BUNDLE DATASET [--defense rmc ...] [--name NAME]

*static*: made once on the base model, and sent through each defence, as the post's table was made. *adaptive*: made
through each defence's own surrogate (for One Pixel: its scores are the oracle), with fewer draws and smaller settings,
which the JSON lists as ``reduced``. Every cell is answered by the defence itself with fresh randomness. *worst case*:
per image, over the clean image and all that was made for the row. Only PGD has a radius: for the others the distance
is half of the result, so each cell has the median of it.

A run adds its rows to those of NAME.json made with the same base model, images and settings, in place of rows of the
same name. What was made on the base model is kept under build/, so that a row added later is sent the same images.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import results
from cli.options import load_data, use_threads
from cli.output import progress
from mithridate.attacks import JSMA, Attack, CarliniWagner, DeepFool, Forward, OnePixel, parse_attack
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Defence, Resources, build_defence
from mithridate.errors import OptionError
from mithridate.types import Epsilon, Pixels, to_images

_BATCH = 50
_ROWS = (
    "none",
    "rmc",
    "randomization",
    "region",
    "pixel-deflection",
    "sap:passes=50,sampling=binomial",  # published: 100, multinomial
)

_PGD = parse_attack("pgd20", epsilon=Epsilon(8))

STATIC: Mapping[str, Attack] = {
    "one pixel": OnePixel(population=100, generations=20),  # published: 400 x 100, an hour for 100 images
    "jsma": JSMA(),
    "deepfool": DeepFool(),
    "c&w": CarliniWagner(),
    "pgd": _PGD,
}

ADAPTIVE: Mapping[str, Attack] = {
    "one pixel": OnePixel(population=30, generations=8, checks=3, rows_a_call=128),
    "jsma": JSMA(checks=3),
    "deepfool": DeepFool(checks=5),
    "c&w": CarliniWagner(steps=40, searches=3, initial_c=1.0, kappa=5.0, checks=3),
    "pgd": _PGD,
}

DRAWS = {"one pixel": 1, "jsma": 1, "deepfool": 1, "c&w": 1, "pgd": 3}
"""Of a random defence, averaged for one answer to the attacker; ten is usual."""

REDUCED = (
    "one pixel, static: 100 candidates x 20 generations; published 400 x 100",
    "one pixel, adaptive: 30 x 8",
    "c&w, adaptive: 40 steps x 3 values of c, from c = 1; Hwang et al. 100 x 10, from 0.001",
    "adaptive: 1 draw for one answer to the attacker, 3 for pgd; usual 10",
    "sap: 50 passes, binomial; published 100, multinomial",
)
"""Against what was published, for time."""


def main(
    bundle: Path,
    dataset: str,
    defense: Annotated[list[str] | None, typer.Option()] = None,
    name: str = "defences-by-attacks",
    seed: int = 0,
    threads: int | None = None,
) -> None:
    use_threads(threads)
    opened = Bundle.open(bundle)
    resources = Resources.load(opened)
    data = load_data(dataset, data_root=None, download=False, image_size=None, split="test")
    settings = {
        "model": opened.manifest.files["model.safetensors"].sha256,
        "dataset": data.spec,
        "images": len(data),
        "seed": seed,
        "settings": {block: {k: repr(a) for k, a in of.items()} for block, of in _BLOCKS.items()},
        "draws of the adaptive attacker": DRAWS,
    }
    rows = _rows_so_far(name, settings)
    static = {attack: _on_the_base(attack, resources, data, settings) for attack in STATIC}
    for text in defense or _ROWS:
        defence = build_defence(text, resources)
        row = _row(defence, resources, data, static, seed)
        rows[defence.name] = {**row, "bundle": opened.digest, "command": _command()}
        commands = dict.fromkeys(found["command"] for found in rows.values())
        results.write(
            name, {"command": "\n".join(commands), **settings, "reduced": REDUCED, "rows": list(rows.values())}
        )


_BLOCKS = {"static": STATIC, "adaptive": ADAPTIVE}


def _command() -> str:
    return shlex.join(["python", "-m", "benchmarks.defences_by_attacks", *sys.argv[1:]])


def _rows_so_far(name: str, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    path = results.RESULTS / f"{name}.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    for key, value in settings.items():
        if content.get(key) != value:
            raise SystemExit(f"error: {path.name} was made with another {key}; write to another file with --name")
    return {row["defense"]: row for row in content["rows"]}


def _on_the_base(attack: str, resources: Resources, data: LabelledImages, settings: dict[str, Any]) -> Pixels:
    """From build/ where the same has been made before."""
    said = [settings["model"], settings["seed"], repr(STATIC[attack])]
    key = hashlib.sha256(json.dumps(said).encode() + data.images.tobytes() + data.labels.tobytes()).hexdigest()[:16]
    path = results.RESULTS.parents[1] / "build" / "defences-by-attacks" / f"{key}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        made, seconds = _make(STATIC[attack], resources.classifier, data, settings["seed"], f"static {attack}")
        print(f"static {attack}: {seconds:.0f} s", flush=True)
        np.save(path, made.numpy())
    return torch.from_numpy(np.load(path))


def _make(attack: Attack, forward: Forward, data: LabelledImages, seed: int, what: str) -> tuple[Pixels, float]:
    generator, began = torch.Generator().manual_seed(seed), time.perf_counter()
    pixels, labels = torch.from_numpy(data.images).split(_BATCH), torch.from_numpy(data.labels).split(_BATCH)
    found = []
    with progress() as report:
        for number, (images, true) in enumerate(zip(pixels, labels, strict=True), 1):
            found.append(attack.run(forward, images, true, generator=generator))
            report(what, number, len(pixels))
    return torch.cat(found), time.perf_counter() - began


def _row(
    defence: Defence, resources: Resources, data: LabelledImages, static: Mapping[str, Pixels], seed: int
) -> dict[str, Any]:
    plain = _forward_seconds(resources, data)
    began = time.perf_counter()
    right = [_right(defence, torch.from_numpy(data.images), data, seed + 1)]
    answer = time.perf_counter() - began
    plain = (plain + _forward_seconds(resources, data)) / 2
    row: dict[str, Any] = {
        "defense": defence.name,
        "forward passes": answer / plain,
        "clean": results.accuracy(right[0]),
    }
    row["static"] = {}
    for attack, pixels in static.items():
        right.append(_right(defence, pixels, data, seed + 1))
        row["static"][attack] = _cell(right[-1], pixels, data)
    row["adaptive"] = {}
    for attack, engine in ADAPTIVE.items():
        attacked, generator = _with_draws(defence.name, resources, DRAWS[attack]), torch.Generator().manual_seed(seed)

        def forward(
            images: torch.Tensor, attacked: Defence = attacked, generator: torch.Generator = generator
        ) -> torch.Tensor:
            return attacked.surrogate(images, generator=generator, budget=Budget())

        made, seconds = _make(engine, forward, data, seed, f"{defence.name} {attack}")
        right.append(_right(defence, made, data, seed + 1))
        row["adaptive"][attack] = {**_cell(right[-1], made, data), "seconds": seconds}
        print(f"{defence.name}, {attack}: {100 * right[-1].mean():.0f} %, {seconds:.0f} s", flush=True)
    row["worst_case"] = results.accuracy(np.all(right, axis=0))
    return row


def _with_draws(text: str, resources: Resources, draws: int) -> Defence:
    """The same, with ``draws`` averaged for an attacker, where it is random."""
    try:
        return build_defence(f"{text}{',' if ':' in text else ':'}attack_passes={draws}", resources)
    except OptionError:
        return build_defence(text, resources)


def _forward_seconds(resources: Resources, data: LabelledImages) -> float:
    images = to_images(torch.from_numpy(data.images)).split(_BATCH)
    with torch.no_grad():
        resources.classifier(images[0])
        began = time.perf_counter()
        for batch in images:
            resources.classifier(batch)
    return time.perf_counter() - began


def _right(defence: Defence, pixels: Pixels, data: LabelledImages, seed: int) -> np.ndarray:
    """Bool ``[N]``, answered with draws that no attack has seen."""
    generator = torch.Generator().manual_seed(seed)
    answers = [
        defence.predict(to_images(batch), generator=generator, budget=Budget()).scores.argmax(1)
        for batch in pixels.split(_BATCH)
    ]
    return torch.cat(answers).numpy() == data.labels


def _cell(right: np.ndarray, pixels: Pixels, data: LabelledImages) -> dict[str, Any]:
    """With the median L2 distance (pixels in [0, 1]) and the median number of pixels changed."""
    change = pixels.double() - torch.from_numpy(data.images).double()
    return {
        **results.accuracy(right),
        "median_l2": float(change.flatten(1).norm(dim=1).median() / 255),
        "median_pixels": int((change != 0).any(1).flatten(1).sum(1).median()),
    }


if __name__ == "__main__":
    typer.run(main)
