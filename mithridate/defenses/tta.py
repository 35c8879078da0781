"""``tta``, test-time augmentation: the mean answer to an image, mirrored and moved by a pixel or two.

Nothing is random and nothing is hidden: the mean is as differentiable as the base model, and attackers are given all of
it. What it can gain over an adversarially trained base is what an ensemble gains: Perez et al., Enhancing Adversarial
Robustness via Test-Time Transformation Ensembling (ICCV workshops 2021), found one to two points under AutoAttack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from mithridate.defenses.averaging import Draws, Run, bytes_of_a_pass
from mithridate.defenses.base import Resources
from mithridate.defenses.networks import Network
from mithridate.defenses.options import require
from mithridate.errors import OptionError
from mithridate.types import Images, Logits

_PLACES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
"""The image where it is, and to the four sides."""


@dataclass(frozen=True, kw_only=True)
class TTAConfig:
    """``shift``: by how many pixels the image is moved up, down, left and right (0: not at all). ``flip``: each view is
    mirrored too; ``auto``: where images have colours (a mirrored digit is no digit). ``padding`` is what comes in at
    the edge: ``zeros``, as random crops have it in training, or the ``edge`` itself.
    """

    shift: int = 1
    flip: Literal["auto", "true", "false"] = "auto"
    padding: Literal["zeros", "edge"] = "zeros"

    def __post_init__(self) -> None:
        require("tta", "shift", self.shift, 0, 64)


@dataclass(frozen=True, kw_only=True)
class Views:
    """A pass sees one view."""

    resources: Resources
    config: TTAConfig

    def __post_init__(self) -> None:
        side = min(self.resources.classifier.spec.image_shape[1:])
        if self.config.shift >= side:
            raise OptionError(
                f"tta: shift={self.config.shift} moves all of a {side} pixel image out of itself; allowed: below {side}"
            )

    @property
    def views(self) -> tuple[tuple[int, int, bool], ...]:
        """Down, right, mirrored."""
        flip = self.config.flip == "true" or (
            self.config.flip == "auto" and self.resources.classifier.spec.image_shape[0] != 1
        )
        places = _PLACES if self.config.shift else _PLACES[:1]
        size = self.config.shift
        return tuple(
            (size * down, size * right, mirrored) for mirrored in (False, True)[: 1 + flip] for down, right in places
        )

    @property
    def bytes_a_row(self) -> int:
        return bytes_of_a_pass(self.resources)

    def begin(self, images: Images, network: Network) -> Run:
        views = self.views

        def run(draws: Draws) -> Logits:
            chosen = [views[number % len(views)] for number in draws.passes]
            seen = torch.stack([self._seen(images, *view) for view in chosen], 1)  # [N, copies, C, H, W]
            return network.logits(seen.flatten(0, 1))

        return run

    def begin_attack(self, images: Images, network: Network) -> Run:
        """The exact gradient."""
        return self.begin(images, network)

    def _seen(self, images: Images, down: int, right: int, mirrored: bool) -> Images:
        images = images.flip(3) if mirrored else images
        if not (down or right):
            return images
        sides = (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0))
        padded = F.pad(images, sides, mode="replicate") if self.config.padding == "edge" else F.pad(images, sides)
        height, width = images.shape[2:]
        return padded[:, :, max(-down, 0) : max(-down, 0) + height, max(-right, 0) : max(-right, 0) + width]
