"""Projected gradient descent in the L-infinity ball, on the 8-bit lattice.

Madry et al. 2018 (arXiv:1706.06083). The iterate moves in real numbers, so that steps of less than one level add
up, but the network only ever sees it rounded to 8 bits: what is optimised is what can be sent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mithridate.attacks.judging import Forward
from mithridate.errors import OptionError
from mithridate.types import Epsilon, Images, Labels, Pixels, to_images, to_pixels

_PUBLISHED_STEPS = {10: 0.01, 30: 0.005, 100: 0.001}
"""RMC's own attacks at epsilon 16/255 (authors' code): steps to step size. Scaled with epsilon."""

_PUBLISHED_EPSILON = 16 / 255
_MAX_STEPS = 10_000


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Untargeted L-infinity PGD.

    ``step_size`` is in units of the [0, 1] pixel range. With ``random_start`` the first iterate is uniform in the ball.
    """

    epsilon: Epsilon
    steps: int
    step_size: float
    random_start: bool = True

    @property
    def name(self) -> str:
        """``fgsm``, or ``pgd10`` and the like: what ``parse_attack`` reads."""
        return "fgsm" if self.steps == 1 and not self.random_start else f"pgd{self.steps}"

    def run(
        self,
        forward: Forward,
        pixels: Pixels,
        labels: Labels,
        *,
        generator: torch.Generator,
        mask: torch.Tensor | None = None,
    ) -> Pixels:
        """Raises the cross-entropy of ``labels`` ``[N]`` for uint8 ``pixels`` ``[N, C, H, W]``; gives uint8 back.

        Of all points visited the best is returned: a misclassified one before a correct one, then the highest loss.
        ``generator`` (on the CPU) draws the start. ``mask``, bool ``[H, W]`` or what else broadcasts to the images,
        says which pixels may change; it holds within every step and for the start, so the others never do. Raises
        ValueError for another mask.
        """
        clean, allowed = to_images(pixels), _allowed(mask, pixels)
        best_pixels = pixels.clone()
        best_rank = torch.full((len(pixels),), -torch.inf, dtype=torch.float64, device=pixels.device)
        delta = _only(allowed, self._start(clean, generator))
        for step in range(self.steps + 1):
            point = to_images(to_pixels(clean + delta)).requires_grad_(step < self.steps)
            with torch.set_grad_enabled(step < self.steps):
                logits = forward(point)
                losses = F.cross_entropy(logits, labels, reduction="none")  # [N]
            rank = losses.detach().double() + 1e6 * (logits.detach().argmax(1) != labels)
            better = rank > best_rank
            best_rank = torch.where(better, rank, best_rank)
            best_pixels[better] = to_pixels(point.detach()[better])
            if step < self.steps:
                (gradient,) = torch.autograd.grad(losses.sum(), point)
                delta = self._project(clean, delta + self.step_size * _only(allowed, gradient.sign()))
        return best_pixels

    def _start(self, clean: Images, generator: torch.Generator) -> torch.Tensor:
        if not self.random_start:
            return torch.zeros_like(clean)
        noise = torch.rand(clean.shape, generator=generator).to(clean.device)
        return self._project(clean, (2 * noise - 1) * self.epsilon.value)

    def _project(self, clean: Images, delta: torch.Tensor) -> torch.Tensor:
        """Into the ball and into [0, 1]; both end on whole levels, so rounding cannot leave them."""
        delta = delta.clamp(-self.epsilon.value, self.epsilon.value)
        return (clean + delta).clamp(0, 1) - clean


def _allowed(mask: torch.Tensor | None, pixels: Pixels) -> torch.Tensor | None:
    """The mask where the pixels are, if it is one."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is bool; seen: {mask.dtype}")
    try:
        return mask.to(pixels.device).broadcast_to(pixels.shape)
    except RuntimeError as error:
        raise ValueError(f"a mask of {list(mask.shape)} does not fit images of {list(pixels.shape)}") from error


def _only(allowed: torch.Tensor | None, change: torch.Tensor) -> torch.Tensor:
    """0 where nothing may change, whatever was there: 0 times NaN would be NaN."""
    return change if allowed is None else torch.where(allowed, change, 0.0)


def parse_attack(name: str, *, epsilon: Epsilon) -> PGD:
    """``pgdN`` with N steps, or ``fgsm`` (one step, no random start).

    The three published step counts keep their published step size, scaled to ``epsilon``; others use
    2.5 * epsilon / steps (Madry et al.). Raises OptionError for another name.
    """
    if name == "fgsm":
        return PGD(epsilon=epsilon, steps=1, step_size=epsilon.value, random_start=False)
    match = re.fullmatch(r"pgd([1-9][0-9]{0,4})", name)
    steps = int(match.group(1)) if match else 0
    if not 1 <= steps <= _MAX_STEPS:
        raise OptionError(f"unknown attack {name!r}; allowed: fgsm, or pgdN with N from 1 to {_MAX_STEPS}, as in pgd20")
    if steps in _PUBLISHED_STEPS:
        return PGD(
            epsilon=epsilon,
            steps=steps,
            step_size=_PUBLISHED_STEPS[steps] * epsilon.value / _PUBLISHED_EPSILON,
        )
    return PGD(epsilon=epsilon, steps=steps, step_size=2.5 * epsilon.value / steps)
