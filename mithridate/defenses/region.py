"""``region``: the majority vote of the base model over the surroundings of an image.

Cao and Gong: Mitigating Evasion Attacks to Deep Neural Networks via Region-based Classification (ACSAC 2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mithridate.defenses.averaging import Draws, Run, bytes_of_a_pass
from mithridate.defenses.base import Resources
from mithridate.defenses.networks import Network
from mithridate.defenses.options import require
from mithridate.types import Images, Logits


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """``passes`` points of the cube of ``radius`` around the image (in pixel values, 0 to 1; cut to what an image may
    be) have one vote each. ``none`` is the authors' radius: 0.02 for colour images, 0.3 for grey ones.

    Attackers are given the mean softmax of ``attack_passes`` points.
    """

    radius: float | None = None
    passes: int = 1000
    attack_passes: int = 10

    def __post_init__(self) -> None:
        if self.radius is not None:
            require("region", "radius", self.radius, 1e-6, 1)
        require("region", "passes", self.passes, 1, 1_000_000)
        require("region", "attack_passes", self.attack_passes, 1, 100_000)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """A pass sees a point nearby."""

    resources: Resources
    config: RegionConfig

    @property
    def radius(self) -> float:
        """In pixel values, 0 to 1."""
        if self.config.radius is not None:
            return self.config.radius
        return 0.3 if self.resources.classifier.spec.image_shape[0] == 1 else 0.02

    @property
    def bytes_a_row(self) -> int:
        return bytes_of_a_pass(self.resources)

    def begin(self, images: Images, network: Network) -> Run:
        def run(draws: Draws) -> Logits:
            noise = torch.empty(len(images) * draws.copies, *images.shape[1:])
            for row, generator in zip(noise, draws.generators, strict=True):
                row.uniform_(-self.radius, self.radius, generator=generator)
            return network.logits((images.repeat_interleave(draws.copies, 0) + noise.to(images)).clamp(0, 1))

        return run

    def begin_attack(self, images: Images, network: Network) -> Run:
        """The exact gradient at the points."""
        return self.begin(images, network)
