"""Gradient attack through a defence's surrogate, or through a twin whose path is smoother.

The surrogate of closed-form RMC runs the search and the fit again at every step, and its gradient goes through the fit
and through the soft weights of the neighbours. A defence that has none of that (fine-tuned weights, hard selection) is
attacked through a ``twin`` that has, and through the base model where a guard may let that answer: what counts is what
the defence itself says of the points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from mithridate.attacks.adaptive.rounds import CONFIDENCE, Loss, ascend, in_parts, losses
from mithridate.attacks.adaptive.simulation import Found, Simulation, begin, random_start, shown
from mithridate.attacks.white_box.apgd import APGD
from mithridate.defenses.base import Defence
from mithridate.types import Epsilon, Images, Labels, Logits, Pixels, to_pixels

_CHECKS = 3
"""Calls of a random surrogate, on the way, that a point has to fool. The defence itself is asked more often."""


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
                    logits = shown(defence, images, generator=generator)[:, None]
                    if self.twin is not None and simulation.answers_as_base:
                        classifier = simulation.defence.resources.classifier
                        base = classifier(images.to(classifier.device)).to(logits.device, logits.dtype)
                        logits = torch.cat([logits, base[:, None]], 1)
                    return losses(logits, truth, self.loss, confidence=self.confidence).mean(1)

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


@dataclass(frozen=True, kw_only=True)
class AutoThroughSurrogate:
    """Auto-PGD through the surrogate: what the base model has to stand, its defences have to stand too. The defence
    itself is asked about where it ended."""

    attack: APGD
    rows: int = 64

    @property
    def name(self) -> str:
        return self.attack.name

    @property
    def gradient_steps(self) -> int:
        """A targeted one takes its steps for each target."""
        return self.attack.steps * self.attack.restarts * (self.attack.targets if self.attack.loss == "t" else 1)

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
        attack = replace(self.attack, checks=min(simulation.checks, _CHECKS))

        def forward(images: Images) -> Logits:
            return shown(simulation.defence, images, generator=generator)

        for rows in judge.groups(self.rows):
            judge.look(rows, attack.run(forward, pixels[rows], labels[rows], generator=generator))
        judge.remember()
        return judge.found()
