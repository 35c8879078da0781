"""Extra attacks on a defence's surrogate that show whether the evaluation's own could have worked.

The climb is written out here, and is none of the engine's: what checks the engine does not rest on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mithridate.attacks.adaptive.simulation import shown
from mithridate.attacks.judging import Forward, margins
from mithridate.defenses.base import Defence
from mithridate.evaluation.repeated import answered_right
from mithridate.types import Epsilon, Labels, Pixels, to_images, to_pixels


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How hard the probes try. ``images``: the first so many; ``steps`` of projected gradient descent in the ball and
    ``unbounded_steps`` without one; ``noise`` random points each; ``asks`` answers of a random defence where one draw
    could mislead; ``draws`` of it averaged for a gradient."""

    images: int = 100
    steps: int = 40
    unbounded_steps: int = 100
    noise: int = 20
    asks: int = 20
    draws: int = 1
    batch: int = 50


@dataclass(frozen=True, kw_only=True)
class Climb:
    """Where a climb ended: the best ``pixels`` ``[N, C, H, W]``; ``broken`` bool ``[N]`` by the surrogate; and
    ``losses`` ``[steps + 1, N]``, the highest margin of the strongest wrong class so far."""

    pixels: Pixels
    broken: torch.Tensor
    losses: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Prober:
    """Asks and attacks one defence on the same few images: uint8 ``pixels`` ``[N, C, H, W]``, ``labels`` ``[N]``."""

    defence: Defence
    pixels: Pixels
    labels: Labels
    random: bool
    seed: int
    settings: ProbeSettings

    def right(self, pixels: Pixels, *, salt: int) -> torch.Tensor:
        """Bool ``[N]``: answered rightly by the defence itself, one fresh draw."""
        generator = self.generator(salt)
        return answered_right(self.defence, pixels, self.labels, generator=generator, batch=self.settings.batch)

    def climb(
        self,
        epsilon: Epsilon,
        steps: int,
        *,
        salt: int,
        draws: int = 1,
        single: bool = False,
        whole: bool = True,
        of: Defence | None = None,
    ) -> Climb:
        """Plain PGD on the cross-entropy of the surrogate (of ``of``, unless it is this defence's), with a random
        start; ``single``: one full step from the image itself. Unless ``whole``, no further than all are broken."""
        size = epsilon.value if single else 2.5 * epsilon.value / steps
        generator, parts = self.generator(salt), []
        forward = averaged(surrogate(self.defence if of is None else of, generator), draws)
        for pixels, labels in zip(
            self.pixels.split(self.settings.batch), self.labels.split(self.settings.batch), strict=True
        ):
            start = torch.zeros(pixels.shape) if single else 2 * torch.rand(pixels.shape, generator=generator) - 1
            start = start.mul_(epsilon.value).to(pixels.device)
            parts.append(
                _ascend(forward, pixels, labels, epsilon=epsilon, steps=steps, size=size, start=start, whole=whole)
            )
        return Climb(
            pixels=torch.cat([part.pixels for part in parts]),
            broken=torch.cat([part.broken for part in parts]),
            losses=torch.cat([_filled(part.losses, steps + 1) for part in parts], dim=1),
        )

    def slopes(self, pixels: Pixels) -> torch.Tensor:
        """``[N, C * H * W]`` gradients of the cross-entropy, as they come: zeros, NaN and all."""
        forward, found = averaged(surrogate(self.defence, self.generator(3)), self.settings.draws), []
        for few, labels in zip(pixels.split(self.settings.batch), self.labels.split(self.settings.batch), strict=True):
            point = to_images(few).requires_grad_()
            loss = F.cross_entropy(forward(point), labels, reduction="sum")
            found.append(_slope(loss, point).flatten(1).cpu())
        return torch.cat(found)

    def noise(self, epsilon: Epsilon, *, salt: int) -> torch.Tensor:
        """Bool ``[N]``: stood at ``settings.noise`` random corners of the ball; a random defence at half of them, since
        of so many draws some miss a clean image too."""
        generator, missed = self.generator(salt), torch.zeros(len(self.labels))
        for draw in range(self.settings.noise):
            sign = torch.randint(0, 2, self.pixels.shape, generator=generator) * 2 - 1
            point = (self.pixels.int() + epsilon.levels * sign.to(self.pixels.device)).clamp(0, 255).to(torch.uint8)
            missed += ~self.right(point, salt=salt + 1 + draw)
        return 2 * missed <= self.settings.noise if self.random else missed == 0

    def wrong_share(self, pixels: Pixels, rows: Sequence[int], *, by_surrogate: bool = False) -> torch.Tensor:
        """float64 ``[R]``: how often the images ``rows`` are misread at ``pixels``, in ``settings.asks`` answers of a
        random defence or of its surrogate; one of any other."""
        chosen = torch.tensor(list(rows), dtype=torch.long)
        few, labels, generator = pixels[chosen], self.labels[chosen], self.generator(4)
        asks = self.settings.asks if self.random else 1
        wrong = torch.zeros(len(chosen), dtype=torch.float64)
        for _ in range(asks if len(chosen) else 0):
            if by_surrogate:
                wrong += self._fooled(few, labels, generator).double()
            else:
                right = answered_right(self.defence, few, labels, generator=generator, batch=self.settings.batch)
                wrong += (~right).double()
        return wrong / asks

    def _fooled(self, pixels: Pixels, labels: Labels, generator: torch.Generator) -> torch.Tensor:
        forward, found = surrogate(self.defence, generator), []
        for few, true in zip(pixels.split(self.settings.batch), labels.split(self.settings.batch), strict=True):
            with torch.no_grad():
                found.append((margins(forward(to_images(few)), true) < 0).cpu())
        return torch.cat(found)

    def generator(self, salt: int) -> torch.Generator:
        """A stream of its own for each use."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + salt) & (2**63 - 1))


def surrogate(defence: Defence, generator: torch.Generator) -> Forward:
    """What a white-box attacker is given of a defence, as a plain function."""
    return lambda images: shown(defence, images, generator=generator)


def averaged(forward: Forward, draws: int) -> Forward:
    """Logarithm of the mean softmax of ``draws`` calls (expectation over transformation, Athalye et al. 2018)."""
    if draws == 1:
        return forward
    return lambda images: torch.stack([forward(images).log_softmax(1) for _ in range(draws)]).logsumexp(0)


def _ascend(
    forward: Forward,
    pixels: Pixels,
    labels: Labels,
    *,
    epsilon: Epsilon,
    steps: int,
    size: float,
    start: torch.Tensor,
    whole: bool,
) -> Climb:
    clean, delta = to_images(pixels), start
    best, highest, losses = pixels.clone(), torch.full((len(pixels),), -torch.inf, device=pixels.device), []
    for step in range(steps + 1):
        low, high = (clean - epsilon.value).clamp(min=0), (clean + epsilon.value).clamp(max=1)
        delta = torch.maximum(torch.minimum(clean + delta, high), low) - clean
        levels = to_pixels(clean + delta)
        point = to_images(levels).requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            logits = forward(point)
            loss = F.cross_entropy(logits, labels, reduction="sum")
        lead = -margins(logits.detach(), labels)
        better = lead > highest
        highest, best[better] = torch.where(better, lead, highest), levels[better]
        losses.append(highest.cpu())
        if not whole and bool((highest > 0).all()):
            break
        if step < steps:
            delta = delta + size * _slope(loss, point).nan_to_num(0, 0, 0).sign()
    return Climb(pixels=best, broken=(highest > 0).cpu(), losses=torch.stack(losses))


def _filled(losses: torch.Tensor, length: int) -> torch.Tensor:
    """The last row again for the steps that were not needed."""
    return torch.cat([losses, losses[-1:].expand(length - len(losses), -1)])


def _slope(loss: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """The gradient; zeros where the surrogate has cut itself off from its input."""
    if not loss.requires_grad:
        return torch.zeros_like(point)
    (gradient,) = torch.autograd.grad(loss, point, allow_unused=True)
    return torch.zeros_like(point) if gradient is None else gradient
