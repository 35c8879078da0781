"""Where an attack may go: the points that can be sent and lie within a radius of the clean image.

The iterate moves in real numbers, so that steps of less than one level add up, but the network only ever sees it on
the 8-bit lattice, within the ball: what is optimised is what can be sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from mithridate.types import Epsilon, Images, Pixels, to_images, to_pixels

Norm = Literal["linf", "l2"]

_HALVINGS = 8
"""Of the search where L2 rounding turns: to a five hundredth of a level."""

_ROUNDING = 1e-4
"""In levels: more than float32 errs in a change, so that a level that was not reached is never counted as reached."""


class Ball(Protocol):
    """Around each of ``N`` clean images, cut at black and white."""

    @property
    def clean(self) -> Images:
        """Its middle."""
        ...

    @property
    def radius(self) -> float:
        """In units of the [0, 1] pixel range."""
        ...

    def start(self, generator: torch.Generator) -> Images:
        """A point drawn uniformly from the ball, then cut at black and white. The CPU's ``generator`` draws."""
        ...

    def onto(self, points: Images) -> Images:
        """The nearest in the ball; overwrites ``points``."""
        ...

    def steepest(self, slope: torch.Tensor) -> torch.Tensor:
        """Of all moves of length 1 the one that rises most along the gradients ``slope``; 0 where that is 0."""
        ...

    def sent(self, points: Images) -> Pixels:
        """Points of the ball to nearby levels that are in it too."""
        ...

    def only(self, rows: torch.Tensor) -> Ball:
        """Around the images ``rows`` (bool, or int64 indices) alone."""
        ...


def ball_around(pixels: Pixels, *, norm: Norm, epsilon: Epsilon) -> Ball:
    """Around uint8 ``pixels`` ``[N, C, H, W]``. In L2 the radius is ``epsilon.value`` too: 128/255 is about 0.5."""
    clean = to_images(pixels)
    if norm == "linf":
        low, high = (clean - epsilon.value).clamp_min_(0), (clean + epsilon.value).clamp_max_(1)
        return _LInf(clean, low, high, epsilon.value)
    return _L2(clean, epsilon)


@dataclass(frozen=True)
class _LInf:
    """Its sides are whole levels, so that rounding never leaves it."""

    clean: Images
    low: Images
    high: Images
    radius: float

    def start(self, generator: torch.Generator) -> Images:
        noise = torch.rand(self.clean.shape, generator=generator).to(self.clean.device)
        return self.onto(self.clean + (2 * noise - 1) * self.radius)

    def onto(self, points: Images) -> Images:
        return points.clamp_(self.low, self.high)

    def steepest(self, slope: torch.Tensor) -> torch.Tensor:
        return slope.sign()

    def sent(self, points: Images) -> Pixels:
        return to_pixels(points)

    def only(self, rows: torch.Tensor) -> Ball:
        return _LInf(self.clean[rows], self.low[rows], self.high[rows], self.radius)


@dataclass(frozen=True)
class _L2:
    clean: Images
    epsilon: Epsilon

    @property
    def radius(self) -> float:
        return self.epsilon.value

    def start(self, generator: torch.Generator) -> Images:
        direction = torch.randn(self.clean.shape, generator=generator)
        length = torch.rand(len(direction), 1, 1, 1, generator=generator) ** (1 / direction.shape[1:].numel())
        change = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-12) * length
        return self.onto(self.clean + change.to(self.clean.device) * self.radius)

    def onto(self, points: Images) -> Images:
        """Into the ball first: cutting then moves towards the clean image, which is within [0, 1]."""
        change = points - self.clean
        length = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min_(1e-12)
        inside: Images = change.mul_((self.radius / length).clamp_max_(1)).add_(self.clean).clamp_(0, 1)
        return inside

    def steepest(self, slope: torch.Tensor) -> torch.Tensor:
        """By the largest entry first: the squares of tiny gradients are 0 in float32."""
        largest = slope.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
        scaled = torch.where(largest > 0, slope / largest, 0.0)
        length: torch.Tensor = scaled.flatten(1).norm(dim=1).view(-1, 1, 1, 1)  # at least 1, or 0
        return scaled / length.clamp_min_(1)

    def sent(self, points: Images) -> Pixels:
        """Rounded to the nearest level, or, where that leaves the ball, with as much more rounded towards the clean
        image as it takes: fractions of a level below a threshold, the lowest of [1/2, 1] that is enough. At 1 all are,
        which never leaves. Judged in whole levels, so exactly.
        """
        change = (points - self.clean) * 255
        size = (change.abs() - _ROUNDING).clamp_min_(0)
        whole = size.floor()
        fraction = size - whole
        square, gain = whole.square().flatten(1).sum(1), 2 * whole + 1  # and what one level more adds to it

        def inside(threshold: torch.Tensor) -> torch.Tensor:
            """Bool ``[N, 1, 1, 1]``: whether the ball holds what is rounded up from there on."""
            added = (gain * (fraction >= threshold)).flatten(1).sum(1)
            return (square + added <= self.epsilon.levels**2).view(-1, 1, 1, 1)

        low = torch.full((len(points), 1, 1, 1), 0.5, device=points.device)
        high = torch.where(inside(low), low, 1.0)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            enough = inside(middle)
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        levels = whole + (fraction >= high)
        return (self.clean * 255 + levels.copysign(change)).round_().clamp_(0, 255).to(torch.uint8)

    def only(self, rows: torch.Tensor) -> Ball:
        return _L2(self.clean[rows], self.epsilon)
