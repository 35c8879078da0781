"""The nouns that everything else uses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

import torch

from mithridate.errors import OptionError

Images: TypeAlias = torch.Tensor
"""Float ``[N, C, H, W]`` in [0, 1], un-normalised. On disk and on the wire: uint8."""

Pixels: TypeAlias = torch.Tensor
"""uint8 ``[N, C, H, W]``: what an attacker can really send."""

Labels: TypeAlias = torch.Tensor
"""int64 ``[N]``, class indices."""

Logits: TypeAlias = torch.Tensor
"""Float ``[N, C]`` before the softmax."""

Scores: TypeAlias = torch.Tensor
"""Float ``[N, C]``, non-negative, rows sum to 1."""

Embeddings: TypeAlias = torch.Tensor
"""Float ``[N, D]``: what the neighbour index is searched with."""


@dataclass(frozen=True, order=True)
class Epsilon:
    """An L-infinity radius of a whole number of 8-bit levels.

    >>> Epsilon.parse("8/255").levels
    8

    Fractions of a level do not survive an image file (0.031 * 255 = 7.9 leaves 7 levels), so there are none.
    """

    levels: int

    def __post_init__(self) -> None:
        if not 0 <= self.levels <= 255:
            raise OptionError(f"epsilon {self.levels}/255 is out of range; allowed: 0/255 to 255/255")

    @property
    def value(self) -> float:
        """The radius in units of the [0, 1] pixel range."""
        return self.levels / 255

    @classmethod
    def parse(cls, text: str) -> Epsilon:
        """Reads ``k/255``. Raises OptionError for anything else."""
        match = re.fullmatch(r"\s*([0-9]{1,3})\s*/\s*255\s*", text)
        if match is None:
            raise OptionError(f"epsilon {text!r} is not a whole number of levels; write it as k/255, as in 8/255")
        return cls(int(match.group(1)))

    def __str__(self) -> str:
        return f"{self.levels}/255"


def to_images(pixels: Pixels) -> Images:
    """uint8 ``[N, C, H, W]`` to float32 in [0, 1]."""
    return pixels.to(torch.float32).div_(255)


def to_pixels(images: Images) -> Pixels:
    """Float ``[N, C, H, W]`` in [0, 1] to the nearest uint8 levels."""
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)
