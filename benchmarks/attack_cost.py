"""What PGD and APGD add to the bare cost of their passes forward and backward.

    python -m benchmarks.attack_cost [--model WEIGHTS] [--images 32] [--steps 10] [--rounds 7] [--threads 1]

*Bare*: as many passes through the same network on a batch of the same size, with the gradient of torch's own
cross-entropy, and nothing else. Each round runs all of them in turn, on the processor's clock, so that neighbours on
the machine count for none; a round gives one ratio, and the median is filed. Square's is in ``benchmarks.query_cost``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn import functional as F

from benchmarks import results
from cli.options import use_threads
from cli.output import print_table
from mithridate.attacks import APGD, PGD, Forward
from mithridate.models import load_classifier
from mithridate.types import Epsilon, Labels, Pixels, to_images

_RADIUS, _L2_RADIUS = Epsilon(8), Epsilon(128)


def main(
    model: Path | None = None,
    arch: str = "resnet20",
    size: int = 32,
    images: int = 32,
    steps: int = 10,
    rounds: int = 7,
    threads: Annotated[int | None, typer.Option()] = None,
    name: str = "attack-cost",
) -> None:
    use_threads(threads)
    classifier = load_classifier(model, arch=arch, num_classes=10, image_shape=(3, size, size))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, size, size), generator=generator).to(torch.uint8)
    with torch.no_grad():
        labels = classifier(to_images(pixels)).argmax(1)
    attacks = {
        "PGD": PGD(epsilon=_RADIUS, steps=steps, step_size=_RADIUS.value / 4),
        "PGD, margin": PGD(epsilon=_RADIUS, steps=steps, step_size=_RADIUS.value / 4, loss="margin"),
        "PGD, L2": PGD(epsilon=_L2_RADIUS, steps=steps, step_size=_L2_RADIUS.value / 4, norm="l2"),
        "APGD-CE": APGD(epsilon=_RADIUS, steps=steps),
        "APGD-DLR": APGD(epsilon=_RADIUS, steps=steps, loss="dlr"),
        "APGD-CE, L2": APGD(epsilon=_L2_RADIUS, steps=steps, norm="l2"),
    }
    _bare(classifier, pixels, labels, 1)  # the first pass of a process takes longer
    bare: list[float] = []
    factors: dict[str, list[float]] = {text: [] for text in attacks}
    for _ in range(rounds):
        before = _seconds(lambda: _bare(classifier, pixels, labels, steps))
        for text, attack in attacks.items():
            spent = _seconds(lambda attack=attack: attack.run(classifier, pixels, labels, generator=generator))
            after = _seconds(lambda: _bare(classifier, pixels, labels, steps))
            factors[text].append(2 * spent / (before + after))  # a bare run on either side: a clock that drifts is even
            bare.append(after)
            before = after
    rows = [
        {"attack": text, "factor": statistics.median(found), "least": min(found), "most": max(found)}
        for text, found in factors.items()
    ]
    content = {"arch": arch, "image": [3, size, size], "images": images, "steps": steps, "rounds": rounds}
    path = results.write(name, {**content, "bare_seconds": statistics.median(bare), "rows": rows})
    cells = [[str(row["attack"]), *(f"{row[key]:.3f}" for key in ("factor", "least", "most"))] for row in rows]
    print_table(f"{arch}, {images} images, {steps} steps; {path.name}", ["attack", "x bare", "least", "most"], cells)


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _bare(forward: Forward, pixels: Pixels, labels: Labels, steps: int) -> None:
    images = to_images(pixels)
    for _ in range(steps):
        point = images.requires_grad_()
        torch.autograd.grad(F.cross_entropy(forward(point), labels, reduction="sum"), point)
    with torch.no_grad():
        forward(images)


if __name__ == "__main__":
    typer.run(main)
