"""What the extra questions are asked about: a defence, and what the run made for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mithridate.defenses.base import Budget, Defence, Prediction
from mithridate.evaluation.front import Front
from mithridate.types import Pixels, to_images

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Ground:
    """``worst`` uint8 ``[N, C, H, W]``: of each image the point of the run that the defence reads worst."""

    front: Front
    worst: Pixels

    @property
    def name(self) -> str:
        return self.front.name

    def affordable(self, asks: float, steps: float = 0) -> int:
        """Images: as many as the gates are probed on, or as many of them as ``asks`` answers and gradient ``steps``
        each fit into what an attack on one defence may take."""
        target, pace = self.front.target, self.front.pace
        fitting = target.effort.seconds / max(asks * pace.answer + steps * pace.step, 1e-9)
        return max(1, min(len(target.pixels), target.effort.probed, int(fitting)))

    def sample(self) -> Prediction:
        """Answers for one image: what kind of defence this is."""
        target = self.front.target
        generator = torch.Generator().manual_seed(target.seed)
        return target.defence.predict(to_images(target.pixels[:1]), generator=generator, budget=Budget())


def answers(defence: Defence, pixels: Pixels, *, seed: int) -> list[Prediction]:
    """For uint8 ``pixels`` ``[N, C, H, W]``, each alike wherever the same is asked with the same ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return [defence.predict(to_images(part), generator=generator, budget=Budget()) for part in pixels.split(_BATCH)]
