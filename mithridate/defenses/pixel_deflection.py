"""``pixel-deflection``: some pixels are replaced by others nearby, then wavelets take the noise away.

Prakash, Moran, Garber, DiLillo, Storer: Deflecting Adversarial Attacks with Pixel Deflection (CVPR 2018), with the
authors' constants and without their activation map (their ``-disable_map``): every place is as likely. Broken by
gradients that take the transformation for the identity (Athalye and Carlini 2018), which is what attackers are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mithridate.defenses.averaging import Draws, Generators, bytes_of_a_pass
from mithridate.defenses.base import Resources
from mithridate.defenses.options import require
from mithridate.types import Images


@dataclass(frozen=True, kw_only=True)
class PixelDeflectionConfig:
    """``deflections`` values (one colour of one pixel each) are replaced, one after the other, by the same colour of a
    pixel at most ``window`` rows and columns away; then wavelet shrinkage (BayesShrink, soft, in YCbCr) for noise of
    standard deviation ``sigma`` (0: none). ``passes`` are averaged.
    """

    deflections: int = 200
    window: int = 10
    sigma: float = 0.04
    passes: int = 1
    attack_passes: int = 10

    def __post_init__(self) -> None:
        require("pixel-deflection", "deflections", self.deflections, 0, 100_000)
        require("pixel-deflection", "window", self.window, 1, 10_000)
        require("pixel-deflection", "sigma", self.sigma, 0, 1)
        require("pixel-deflection", "passes", self.passes, 1, 100_000)
        require("pixel-deflection", "attack_passes", self.attack_passes, 1, 100_000)


@dataclass(frozen=True, kw_only=True)
class Deflector:
    """The image with some values deflected."""

    resources: Resources
    config: PixelDeflectionConfig

    @property
    def bytes_a_row(self) -> int:
        return bytes_of_a_pass(self.resources)

    @property
    def attack_is_fixed(self) -> bool:
        return False

    def apply(self, images: Images, generators: Generators) -> Images:
        return denoise(deflect(images, self.config, generators), self.config.sigma)

    def apply_attack(self, images: Images, draws: Draws) -> Images:
        """Forward what was changed, backward the identity (BPDA)."""
        with torch.no_grad():
            changed = self.apply(images, draws.generators)
        return images + (changed - images).detach()


def deflect(images: Images, config: PixelDeflectionConfig, generators: Generators) -> Images:
    """``[R, C, H, W]`` to the same; one deflection at a time for all rows, as a later one may take up an earlier."""
    rows, channels, height, width = images.shape
    shape = (5, config.deflections)
    draws = torch.stack([torch.rand(shape, generator=generator, dtype=torch.float64) for generator in generators])
    channel = (draws[:, 0] * channels).long()
    y, x = (draws[:, 1] * height).long(), (draws[:, 2] * width).long()
    from_y, from_x = (
        _nearby(place, side, config.window, share)
        for place, side, share in ((y, height, draws[:, 3]), (x, width, draws[:, 4]))
    )
    to, source = (
        ((channel * height + row) * width + column).to(images.device) for row, column in ((y, x), (from_y, from_x))
    )
    flat = images.reshape(rows, -1).clone()
    for number in range(config.deflections):
        here, there = to[:, number : number + 1], source[:, number : number + 1]
        flat.scatter_(1, here, flat.gather(1, there))
    return flat.view_as(images)


def _nearby(place: torch.Tensor, side: int, window: int, share: torch.Tensor) -> torch.Tensor:
    """Uniformly one of the places at most ``window`` away that are there."""
    low, high = (place - window).clamp_min(0), (place + window).clamp_max(side - 1)
    return low + (share * (high - low + 1)).long()


def denoise(images: Images, sigma: float) -> Images:
    """Wavelet shrinkage, image by image (scikit-image)."""
    if not sigma:
        return images
    from skimage.restoration import denoise_wavelet

    found = []
    for image in images.detach().cpu().permute(0, 2, 3, 1).numpy():
        colour = image.shape[2] == 3
        clean = denoise_wavelet(
            image if colour else image[..., 0],
            sigma=sigma,
            mode="soft",
            method="BayesShrink",
            convert2ycbcr=colour,
            channel_axis=-1 if colour else None,
            rescale_sigma=True,
        )
        found.append(clean if colour else clean[..., None])
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).to(images).clamp(0, 1)
