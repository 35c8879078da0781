"""``randomization``: the image at a random size, somewhere on a larger grey canvas.

Xie, Wang, Zhang, Ren, Yuille: Mitigating Adversarial Effects Through Randomization (ICLR 2018): 299 pixels to a random
299 to 330, nearest neighbour, padded to 331; other sizes in proportion (32 to 32 .. 35, padded to 36).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from mithridate.defenses.averaging import Draws, Generators, bytes_of_a_pass
from mithridate.defenses.base import Resources
from mithridate.defenses.options import require
from mithridate.errors import ModelError
from mithridate.types import Images


@dataclass(frozen=True, kw_only=True)
class RandomizationConfig:
    """``size=grow``: as published, the network sees a larger image. ``size=keep``, for networks that take one size
    only: the image shrinks by up to a tenth and is padded back.

    ``fill``: what is padded with, 0 to 1. ``flip``: half of the passes are mirrored. ``passes`` are averaged: 1 in the
    paper; 30, with flips, in the authors' entry to the NIPS 2017 competition. Attackers are given the exact gradient of
    ``attack_passes``.
    """

    size: Literal["grow", "keep"] = "grow"
    fill: float = 0.5
    flip: bool = False
    passes: int = 1
    attack_passes: int = 10

    def __post_init__(self) -> None:
        require("randomization", "fill", self.fill, 0, 1)
        require("randomization", "passes", self.passes, 1, 100_000)
        require("randomization", "attack_passes", self.attack_passes, 1, 100_000)


@dataclass(frozen=True, kw_only=True)
class Resizer:
    """The image at a size and place of its own. Raises ModelError where the network does not take the larger canvas."""

    resources: Resources
    config: RandomizationConfig

    def __post_init__(self) -> None:
        classifier = self.resources.classifier
        example = torch.zeros(1, *classifier.spec.image_shape, device=classifier.device)
        try:
            with torch.no_grad():
                classifier(self.apply(example, [torch.Generator()]))
        except Exception as error:  # a network may raise anything for a size that it does not take
            raise ModelError(
                f"{classifier.spec.arch} does not take images larger than {classifier.spec.image_shape[1]} pixels; use "
                "randomization:size=keep"
            ) from error

    @property
    def bytes_a_row(self) -> int:
        return bytes_of_a_pass(self.resources)

    @property
    def attack_is_fixed(self) -> bool:
        return False

    def apply_attack(self, images: Images, draws: Draws) -> Images:
        """The exact gradient: a nearest-neighbour resize copies pixels."""
        return self.apply(images, draws.generators)

    def apply(self, images: Images, generators: Generators) -> Images:
        sides = images.shape[2:]
        draws = torch.stack([torch.rand(4, generator=generator, dtype=torch.float64) for generator in generators])
        for axis, side in enumerate(sides):
            # One share for both sides: the image keeps its proportions.
            low, canvas = (side, canvas_of(side)) if self.config.size == "grow" else (math.ceil(0.9 * side), side)
            sizes = canvas - (self.config.size == "grow") - low + 1  # grow: low .. canvas - 1; keep: low .. canvas
            size = low + (draws[:, 0] * sizes).long()
            start = (draws[:, 1 + axis] * (canvas - size + 1)).long()
            place = torch.arange(canvas) - start[:, None]  # [R, canvas]
            inside = (place >= 0) & (place < size[:, None])
            source = (place * side // size[:, None]).clamp(0, side - 1)
            if axis == 1 and self.config.flip:
                source = torch.where(draws[:, 3:] < 0.5, side - 1 - source, source)
            images = taken(images, source.to(images.device), inside.to(images.device), 2 + axis, self.config.fill)
        return images


def canvas_of(side: int) -> int:
    """331 for 299, and in proportion."""
    return math.ceil(side * 331 / 299)


def taken(images: Images, source: torch.Tensor, inside: torch.Tensor, axis: int, fill: torch.Tensor | float) -> Images:
    """``[R, C, H, W]`` with ``source`` ``[R, canvas]`` along ``axis``, and ``fill`` where not ``inside``."""
    shape = [len(images), 1, 1, 1]
    shape[axis] = source.shape[1]
    full = [*images.shape]
    full[axis] = source.shape[1]
    found = images.gather(axis, source.view(shape).expand(full))
    return torch.where(inside.view(shape), found, fill)
