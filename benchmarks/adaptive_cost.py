"""How long each adaptive attack takes on a defence: 10 rounds of 40 steps unless told otherwise, no image left out.

    python -m benchmarks.adaptive_cost BUNDLE DATASET [--defense rmc] [--epsilon 8/255] [--threads 1]

Images that fall are usually left alone, which is no fair time: here the defence is one that nothing can be judged to
have broken, so that every image is attacked to the end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import results
from cli.options import load_data, use_threads
from cli.output import print_table
from mithridate.attacks.adaptive import FPA, GMSA, AdaptiveAttack, Hijack, LockStep, Simulation, ThroughSurrogate
from mithridate.bundle import Bundle
from mithridate.defenses import Resources, build_defence
from mithridate.types import Epsilon, Labels, Pixels


@dataclass(frozen=True, kw_only=True)
class _Unbroken(Simulation):
    """The defence is run and asked as ever; the answer is that the image stands."""

    def margins(self, pixels: Pixels, labels: Labels, *, generator: torch.Generator) -> torch.Tensor:
        return super().margins(pixels, labels, generator=generator).abs()


def main(
    bundle: Path,
    dataset: str,
    defense: str = "rmc",
    epsilon: str = "8/255",
    rounds: int = 10,
    steps: int = 40,
    attack: Annotated[list[str] | None, typer.Option()] = None,
    threads: int | None = None,
    name: str = "adaptive-cost",
) -> None:
    use_threads(threads)
    opened = Bundle.open(bundle)
    data = load_data(dataset, data_root=None, download=False, image_size=None, split="test")
    pixels, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    resources = Resources.load(opened)
    resources.classifier.quicken()  # as mithridate evaluate does
    simulation, radius = _Unbroken(defence=build_defence(defense, resources)), Epsilon.parse(epsilon)
    attacks: list[AdaptiveAttack] = [
        FPA(epsilon=radius, rounds=rounds, steps=steps),
        GMSA(epsilon=radius, reduce="avg", rounds=rounds, steps=steps),
        GMSA(epsilon=radius, reduce="min", rounds=rounds, steps=steps),
        LockStep(epsilon=radius, steps=rounds * steps),
        ThroughSurrogate(epsilon=radius, steps=rounds * steps),
        Hijack(epsilon=radius, steps=rounds * steps),
    ]
    content = {"bundle": opened.digest, "images": len(data), "rounds": rounds, "steps": steps, "defense": defense}
    rows: list[dict[str, Any]] = []
    for one in attacks:
        if attack and one.name not in attack:
            continue
        started = time.perf_counter()
        one.run(simulation, pixels, labels, generator=torch.Generator().manual_seed(0))
        minutes = (time.perf_counter() - started) / 60
        rows.append({"attack": one.name, "gradient_steps": one.gradient_steps, "minutes": round(minutes, 2)})
        print(f"{one.name}: {minutes:.1f} minutes", flush=True)
        results.write(name, {**content, "adaptive_cost": rows})
    print_table(
        f"{defense}, {len(data)} images, every one attacked to the end",
        ["attack", "gradient steps", "minutes"],
        [[row["attack"], f"{row['gradient_steps']:,}", f"{row['minutes']:.1f}"] for row in rows],
    )


if __name__ == "__main__":
    typer.run(main)
