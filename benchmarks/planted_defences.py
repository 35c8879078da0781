"""Four defences that are broken on purpose, and one that does nothing, through attacks, gates and verdict.

    python -m benchmarks.planted_defences BUNDLE DATASET [--epsilon 8/255] [--images 100] [--real rmc ...] [--name NAME]

Each broken one has to be flagged by a gate and to fall as far as its base; the one that does nothing must not be
flagged, nor gain. ``--real`` defences are sent through the same, to see whether gates cry wolf.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import results
from cli.options import load_data, use_threads
from mithridate.bundle import Bundle
from mithridate.defenses import Defence, Resources, build_defence
from mithridate.evaluation.findings import Gate
from mithridate.evaluation.paired import worst_case
from mithridate.evaluation.planted import PLANTED, attack_planted, planted
from mithridate.evaluation.probes import ProbeSettings
from mithridate.evaluation.repeated import score
from mithridate.evaluation.trust import run_gates
from mithridate.evaluation.verdict import describe, rule
from mithridate.types import Epsilon, Labels, Pixels


def main(
    bundle: Path,
    dataset: str,
    epsilon: str = "8/255",
    images: int = 100,
    queries: int = 1000,
    steps: int = 40,
    real: Annotated[list[str] | None, typer.Option()] = None,
    name: str = "planted-defences",
    seed: int = 0,
    threads: int | None = None,
) -> None:
    use_threads(threads)
    opened = Bundle.open(bundle)
    resources = Resources.load(opened)
    data = load_data(dataset, data_root=None, download=False, image_size=None, split="test")
    pixels, labels = torch.from_numpy(data.images)[:images], torch.from_numpy(data.labels)[:images]
    base = build_defence("none", resources)
    row = _Row(base, pixels, labels, Epsilon.parse(epsilon), seed, queries, ProbeSettings(images=images, steps=steps))
    defences = [base, *(planted(text, resources) for text in PLANTED)]
    defences += [build_defence(text, resources) for text in real or []]
    results.write(
        name,
        {
            "bundle": opened.digest,
            "dataset": data.spec,
            "images": len(labels),
            "epsilon": epsilon,
            "queries": queries,
            "steps": steps,
            "seed": seed,
            "rows": [row.measured(defence) for defence in defences],
        },
    )


class _Row:
    """Measures one after the other; the first is the base."""

    def __init__(
        self,
        base: Defence,
        pixels: Pixels,
        labels: Labels,
        epsilon: Epsilon,
        seed: int,
        queries: int,
        settings: ProbeSettings,
    ) -> None:
        self.base, self.pixels, self.labels, self.epsilon = base, pixels, labels, epsilon
        self.seed, self.queries, self.settings = seed, queries, settings
        self.of_base: tuple[tuple[bool, ...], tuple[bool, ...], tuple[Gate, ...]] | None = None

    def measured(self, defence: Defence) -> dict[str, Any]:
        began = time.perf_counter()
        where = (self.pixels, self.labels)
        clean = score(defence, *where, repeats=1, seed=self.seed).right
        tried = attack_planted(defence, self.base, *where, epsilon=self.epsilon, seed=self.seed, queries=self.queries)
        found = run_gates(
            defence, self.base, *where, tried, epsilon=self.epsilon, seed=self.seed, settings=self.settings
        )
        worst = worst_case([clean, *(t.right for t in tried)])
        self.of_base = self.of_base or (clean, worst, found)
        verdict = rule(
            defence.name,
            clean=clean,
            worst=worst,
            base_clean=self.of_base[0],
            base_worst=self.of_base[1],
            gates=found,
            base_gates=self.of_base[2],
            seed=self.seed,
        )
        flags = [gate.id for gate in found if gate.passed is False]
        print(f"{defence.name}: {100 * sum(worst) / len(worst):.0f} %, {verdict.ruling}, flags {flags}", flush=True)
        return {
            "defense": defence.name,
            "clean": sum(clean),
            "attacks": {t.attack: sum(t.right) for t in tried},
            "worst": sum(worst),
            "flags": flags,
            "gates": {gate.id: {"passed": gate.passed, "evidence": gate.evidence} for gate in found},
            "gain": None if verdict.gain is None else describe(verdict.gain),
            "ruling": verdict.ruling,
            "seconds": time.perf_counter() - began,
        }


if __name__ == "__main__":
    typer.run(main)
