"""What all attacks ask of a network, and which of the points they visited they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from mithridate.types import Images, Labels, Logits, Pixels, to_images

Forward = Callable[[Images], Logits]
"""Differentiable: images ``[N, C, H, W]`` in [0, 1] to logits ``[N, classes]``.

Called with some of the images, or with several copies of them; a random defence may answer otherwise at each call.
"""


class Attack(Protocol):
    """Makes images that are misread."""

    def run(self, forward: Forward, pixels: Pixels, labels: Labels, *, generator: torch.Generator) -> Pixels:
        """uint8 ``pixels`` ``[N, C, H, W]`` with true classes ``labels`` ``[N]`` to what should be sent instead."""
        ...


def margins(logits: Logits, labels: Labels) -> torch.Tensor:
    """``[N]``: how far the true class is ahead of the strongest other one. Negative: misread; a tie is not.

    >>> margins(torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([1]))
    tensor([2.])
    """
    true = logits.gather(1, labels[:, None])[:, 0]
    return true - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def confirmed(forward: Forward, pixels: Pixels, labels: Labels, misread: torch.Tensor, *, checks: int) -> torch.Tensor:
    """Bool ``[N]``: which of ``misread``, by one call, ``checks`` - 1 more calls misread as well.

    One call says enough of a network that always answers the same. Of a random defence it shows one draw, and an attack
    that stops at the first point misread there stops at luck.
    """
    still = misread.clone()
    for _ in range(checks - 1):
        rows = still.nonzero()[:, 0]
        if not len(rows):
            break
        with torch.no_grad():
            still[rows] = margins(forward(to_images(pixels[rows])), labels[rows]) < 0
    return still


class BestPoints:
    """For each image the point of the lowest cost so far; the image itself before there is one."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels.clone()
        self.cost = torch.full((len(pixels),), torch.inf, dtype=torch.float64, device=pixels.device)

    def offer(self, rows: torch.Tensor, points: Pixels, cost: torch.Tensor) -> None:
        """``points`` ``[R, C, H, W]`` for the images ``rows`` ``[R]``, each once. NaN is no cost: it is left out."""
        cost, before = cost.double(), self.cost[rows]
        better = cost < before  # by torch.where below: an index of bools would make a GPU wait
        self.pixels[rows] = torch.where(better.view(-1, 1, 1, 1), points, self.pixels[rows])
        self.cost[rows] = torch.where(better, cost, before)
