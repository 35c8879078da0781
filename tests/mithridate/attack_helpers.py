"""A linear network, whose borders are known, and what every attack has to keep to."""

from __future__ import annotations

import torch

from mithridate.attacks import Attack, Forward
from mithridate.types import to_images

SHAPE = (3, 4, 4)


def linear(seed: int, classes: int = 4) -> tuple[Forward, torch.Tensor, torch.Tensor]:
    """A linear model, its weights ``[classes, pixels]`` and its biases ``[classes]``."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, 48, generator=generator)
    bias = -weight.sum(1) / 2  # no class is ahead in the middle
    return lambda images: images.flatten(1) @ weight.T + bias, weight, bias


def random_pixels(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(60, 196, (count, *SHAPE), generator=generator).to(torch.uint8)


def answers(forward: Forward, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return forward(to_images(pixels)).argmax(1)


def run(attack: Attack, forward: Forward, pixels: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return attack.run(forward, pixels, labels, generator=torch.Generator().manual_seed(seed))


def distances(found: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    return (to_images(found) - to_images(pixels)).flatten(1).norm(dim=1)


def border_distances(weight: torch.Tensor, bias: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """``[N]``: how far each image is, in L2, from the nearest other class of a linear model."""
    logits = to_images(pixels).flatten(1) @ weight.T + bias
    true = logits.argmax(1)
    leads = logits.gather(1, true[:, None]) - logits
    norms = (weight[true][:, None] - weight[None]).norm(dim=2)
    return (leads / norms).masked_fill(norms == 0, torch.inf).amin(1)


def noisy(forward: Forward, seed: int, amount: float) -> Forward:
    """Another answer at each call."""
    generator = torch.Generator().manual_seed(seed)

    def call(images: torch.Tensor) -> torch.Tensor:
        logits = forward(images)
        return logits + amount * torch.randn(logits.shape, generator=generator)

    return call
