"""An ImageNet-sized network, 224 pixels and 2,048 neighbours: what an image costs, and how much memory it takes.

    python -m benchmarks.imagenet_size [--folder build/imagenet-size] [--images 1040] [--defense DEFENCE ...] [--quick]

torchvision's ``resnet50`` with 1,000 classes and seeded random weights (batch normalisation set to the images, so that
activations have the usual size); made-up images, coloured shapes in noise, as an ``npz:`` data set; the bundle is made
by ``mithridate build``: one clean and one FGSM copy, with activations for the tail. What is built once is used again.

Every row is measured in a process of its own: milliseconds an image with 1 and with 4 images at a time, and the peak
of its resident memory beside that of the same process before it was asked anything. ``of it files``: pages of the
libraries and of the memory-mapped bundle, which the system takes back when it needs them. Accuracy means nothing here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import results
from cli.demo import run_command
from cli.options import use_threads
from cli.output import note, print_table, size
from mithridate.bundle import Bundle
from mithridate.defenses import Budget, Resources, build_defence
from mithridate.models import build_classifier, save_weights
from mithridate.types import to_images

_ARCH, _CLASSES, _SIDE = "resnet50", 1000, 224
_BATCHES = (1, 4)
_LIMIT = 6e9
"""Bytes: what a defence may take at the most."""

_DEFENCES = (
    "none",
    "rmc:neighbors=2048",
    "rmc:solver=adam,neighbors=2048",
    "rmc:scope=tail,neighbors=2048,epochs=1,refit=false",
)
"""A tail's cost is in proportion to its epochs, so one is enough to know it."""


def main(
    folder: Path = Path("build/imagenet-size"),
    images: int = 1040,
    defense: Annotated[list[str] | None, typer.Option()] = None,
    quick: bool = False,
    name: str = "imagenet-size",
    seed: int = 0,
    measure: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    use_threads(None)
    if quick:
        folder, images = folder.with_name(f"{folder.name}-quick"), 12
    bundle = folder / "bundle"
    if measure is not None:
        print(json.dumps(_measure(measure, bundle, _BATCHES, seed)))
        return
    _build(folder, images, seed)
    rows = [_in_its_own_process(text, folder, seed) for text in defense or _DEFENCES]
    opened = Bundle.open(bundle, verify=False)
    shape = None if opened.activations is None else list(opened.activations.shape[1:])
    _print(rows)
    if quick:
        note("--quick: nothing is filed")
        return
    content = {"arch": _ARCH, "classes": _CLASSES, "side": _SIDE, "exemplars": len(opened.manifest.layout)}
    built = {"tail_layer": opened.manifest.model.tail_layer, "activation": shape}
    print(results.write(name, {**content, **built, "rows": rows}).name)


def _build(folder: Path, images: int, seed: int) -> None:
    """The bundle, unless it is there."""
    if (folder / "bundle").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = made_up_images(images, seed)
    np.savez(folder / "images.npz", images=pixels, labels=labels, classes=np.array([f"c{c}" for c in range(_CLASSES)]))
    torch.manual_seed(seed)
    classifier = build_classifier(_ARCH, num_classes=_CLASSES, image_shape=(3, _SIDE, _SIDE))
    with torch.no_grad():
        classifier.network.train()
        for part in torch.from_numpy(pixels[:64]).split(32):
            classifier(to_images(part))
        classifier.network.eval()
    save_weights(classifier, folder / "model.safetensors")
    run_command(
        *("build", "--dataset", f"npz:{folder / 'images.npz'}", "--model", str(folder / "model.safetensors")),
        *("--arch", _ARCH, "--attack", "fgsm", "--epsilon", "8/255", "--tail-layer", "auto"),
        *("--shard-size", "64", "--batch-size", "32", "--out", str(folder / "bundle"), "--resume"),
    )


def made_up_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``[N, 3, 224, 224]``: a rectangle or an ellipse whose colour and place are those of its class, in noise."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % _CLASSES
    kinds = np.random.default_rng(0).integers(0, 256, size=(_CLASSES, 6))  # colours, background, place, size
    rows, columns = np.mgrid[:_SIDE, :_SIDE]
    pixels = np.empty((count, 3, _SIDE, _SIDE), np.uint8)
    for number, label in enumerate(labels):
        red, green, blue, ground, place, extent = kinds[label]
        top, left = (rows - 60 - place * 0.4) / (20 + extent * 0.2), (columns - 100 - ground * 0.1) / (20 + place * 0.2)
        inside = top**2 + left**2 < 1 if label % 2 else np.maximum(abs(top), abs(left)) < 1
        for channel, colour in enumerate((red, green, blue)):
            noisy = np.where(inside, colour, ground) + random.normal(0, 30, size=inside.shape)
            pixels[number, channel] = noisy.clip(0, 255)
    return pixels, labels


def _in_its_own_process(text: str, folder: Path, seed: int) -> dict[str, Any]:
    note(f"measuring {text}")
    command = [sys.executable, "-m", "benchmarks.imagenet_size", "--folder", str(folder), "--seed", str(seed)]
    done = subprocess.run([*command, "--measure", text], stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _measure(text: str, bundle: Path, batches: Sequence[int], seed: int) -> dict[str, Any]:
    resources = Resources.load(Bundle.open(bundle))
    defence = build_defence(text, resources)
    queries = torch.from_numpy(made_up_images(max(batches), seed + 1)[0])
    before = _peak()
    row: dict[str, Any] = {"defense": defence.name, "before_bytes": before, "batches": {}}
    for count in batches:
        started = time.perf_counter()
        answer = defence.predict(
            to_images(queries[:count]), generator=torch.Generator().manual_seed(seed), budget=Budget()
        )
        seconds = time.perf_counter() - started
        if seconds < 10:  # the first one warmed up; what takes long needs no warming up
            started = time.perf_counter()
            defence.predict(to_images(queries[:count]), generator=torch.Generator().manual_seed(seed), budget=Budget())
            seconds = time.perf_counter() - started
        assert bool(torch.isfinite(answer.scores).all())
        row["batches"][str(count)] = {
            "ms_an_image": 1000 * seconds / count,
            "phases_ms": {phase: 1000 * spent / count for phase, spent in answer.seconds.items()},
            "adapted": sum(a is not None and a.weights == "adapted" for a in answer.adaptations),
            "steps": [None if a is None else a.steps for a in answer.adaptations],
            "peak_bytes": _peak(),
        }
    return {**row, "peak_bytes": _peak(), "file_bytes": _status("RssFile"), "own_bytes_at_end": _status("RssAnon")}


def _peak() -> int:
    """The most memory this process has had so far. Not ``ru_maxrss``: that begins with what the parent had."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _print(rows: Sequence[dict[str, Any]]) -> None:
    header = ["defence", *(f"ms an image, {count} at a time" for count in _BATCHES)]
    header += ["memory before", "peak", "of it files", "below 6 GB"]
    cells = [
        [
            row["defense"],
            *(f"{row['batches'][str(count)]['ms_an_image']:,.0f}" for count in _BATCHES),
            *(size(row[key]) for key in ("before_bytes", "peak_bytes", "file_bytes")),
            "yes" if row["peak_bytes"] < _LIMIT else "NO",
        ]
        for row in rows
    ]
    print_table(f"{_ARCH}, {_SIDE} pixels, {_CLASSES} classes", header, cells)


if __name__ == "__main__":
    typer.run(main)
