"""Gradient attack through a defence's surrogate, or through a twin whose path is smoother.

The surrogate of closed-form RMC runs the search and the fit again at every step, and its gradient goes through the fit
and through the soft weights of the neighbours. A defence that has none of that (fine-tuned weights, hard selection) is
attacked through a ``twin`` that has: what counts is what the defence itself says of the points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mithridate.attacks.adaptive.rounds import CONFIDENCE, Loss, ascend, in_parts, losses
from mithridate.attacks.adaptive.simulation import Found, Simulation, begin, random_start
from mithridate.defenses.base import Budget, Defence
from mithridate.types import Epsilon, Images, Labels, Pixels, to_pixels


@dataclass(frozen=True, kw_only=True)
class ThroughSurrogate:
    """``steps`` of ``step_size``; the defence itself is asked every ``every`` of them, and images that it misreads are
    left alone from there on."""

    epsilon: Epsilon
    steps: int = 40
    every: int = 10
    step_size: float = 1 / 255
    loss: Loss = "margin"
    confidence: float = CONFIDENCE
    twin: Defence | None = field(default=None, repr=False)
    rows: int = 64

    @property
    def name(self) -> str:
        return "white-box" if self.twin is None else "soft-knn"

    @property
    def gradient_steps(self) -> int:
        return self.steps

    def run(
        self,
        simulation: Simulation,
        pixels: Pixels,
        labels: Labels,
        *,
        generator: torch.Generator,
        candidates: Sequence[Pixels] = (),
    ) -> Found:
        judge = begin(simulation, pixels, labels, generator, candidates)
        points, defence = random_start(pixels, self.epsilon, generator), self.twin or simulation.defence
        for steps in in_parts(self.steps, self.every):
            for rows in judge.groups(self.rows):

                def objective(images: Images, truth: Labels = labels[rows]) -> torch.Tensor:
                    logits = defence.surrogate(images, generator=generator, budget=Budget())
                    return losses(logits[:, None], truth, self.loss, confidence=self.confidence)[:, 0]

                end, best = ascend(
                    objective,
                    pixels[rows],
                    points[rows],
                    epsilon=self.epsilon,
                    steps=steps,
                    step_size=self.step_size,
                )
                points[rows] = end
                judge.look(rows, best)
                standing = rows[judge.standing[rows]]
                judge.look(standing, to_pixels(points[standing]))
            judge.remember()
        return judge.found()
