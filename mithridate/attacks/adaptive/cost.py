"""Cost attack: images that make a defence work as long as it can.

Adaptation stops early where the neighbours agree. An image whose neighbours disagree keeps it busy: the embedding is
steered to where the soft votes of the classes are most equal, and of the points on the way the one is kept for which
the defence took the most steps. (As sponge examples, Shumailov et al. 2021, for networks of fixed depth.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mithridate.attacks.adaptive.hijack import Searched
from mithridate.attacks.adaptive.rounds import ascend, in_parts
from mithridate.attacks.adaptive.simulation import Simulation, random_start
from mithridate.defenses.base import Budget
from mithridate.types import Epsilon, Images, Pixels, to_images, to_pixels


@dataclass(frozen=True, kw_only=True)
class Costly:
    """``pixels`` uint8 ``[N, C, H, W]``; optimiser ``steps`` int64 ``[N]`` for them and ``clean_steps`` for the images
    as they were (0 where a defence takes none)."""

    pixels: Pixels
    steps: torch.Tensor
    clean_steps: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class CostAttack:
    """``steps`` of ``step_size``; every ``every`` of them the defence is run, and its steps are counted."""

    epsilon: Epsilon
    steps: int = 40
    step_size: float = 2 / 255
    guides: int = 64
    every: int = 10
    temperature: float = 0.1
    rows: int = 64

    def run(self, simulation: Simulation, pixels: Pixels, *, generator: torch.Generator) -> Costly:
        """For uint8 ``pixels`` ``[N, C, H, W]``; their classes do not matter."""
        searched = Searched.of(simulation, self.guides)
        clean = self._count(simulation, pixels, generator)
        best, most = pixels.clone(), clean.clone()
        points = random_start(pixels, self.epsilon, generator)
        for some in in_parts(self.steps, self.every):
            for rows in torch.arange(len(pixels)).split(self.rows):
                points[rows] = self._some_steps(searched, some, pixels[rows], points[rows], generator)
            seen = to_pixels(points)
            steps = self._count(simulation, seen, generator)
            better = steps > most
            best[better], most = seen[better], torch.maximum(most, steps)
        return Costly(pixels=best, steps=most, clean_steps=clean)

    def _some_steps(
        self, searched: Searched, steps: int, pixels: Pixels, start: Images, generator: torch.Generator
    ) -> Images:
        with torch.no_grad():
            guides = searched.guides(searched.embed(to_images(to_pixels(start)), generator))

        def disagreement(images: Images) -> torch.Tensor:
            votes = searched.votes(searched.embed(images, generator), guides, self.temperature).log_softmax(1)
            return -(votes.exp() * votes).sum(1).to(images.device)

        end, _ = ascend(disagreement, pixels, start, epsilon=self.epsilon, steps=steps, step_size=self.step_size)
        return end

    def _count(self, simulation: Simulation, pixels: Pixels, generator: torch.Generator) -> torch.Tensor:
        found: list[int] = []
        for rows in torch.arange(len(pixels)).split(self.rows):
            answer = simulation.defence.predict(to_images(pixels[rows]), generator=generator, budget=Budget())
            found += [0 if fate is None else fate.steps for fate in answer.adaptations]
        return torch.tensor(found)
