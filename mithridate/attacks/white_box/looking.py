"""One look of a white-box attack at the network: the loss, its slope, and whether the point is the best so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mithridate.attacks.judging import BestPoints, Forward, confirmed
from mithridate.attacks.losses import Loss
from mithridate.types import Labels, Logits, Pixels, to_images

_MISREAD, _MOST = 1e6, 4e5
"""What being misread is worth: more than any loss, which counts up to 4e5."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """``logits`` ``[R, C]``, ``losses`` float64 ``[R]`` and, where asked for, the ``slope`` ``[R, C, H, W]``."""

    logits: Logits
    losses: torch.Tensor
    slope: torch.Tensor | None


def look(forward: Forward, loss: Loss, sent: Pixels, labels: Labels, *, slope: bool) -> Look:
    """At uint8 ``sent`` ``[R, C, H, W]``. A network that passes no gradient on has slope 0 everywhere."""
    point = to_images(sent).requires_grad_(slope)
    with torch.set_grad_enabled(slope):
        logits = forward(point)
        losses = loss(logits, labels)
    gradient: torch.Tensor | None = None
    if slope:
        if losses.requires_grad:
            (gradient,) = torch.autograd.grad(losses.sum(), point, allow_unused=True)
        if gradient is None:
            gradient = torch.zeros_like(point)
    return Look(logits=logits.detach(), losses=losses.detach(), slope=gradient)


def steady(slope: torch.Tensor) -> torch.Tensor:
    """0 for what is NaN or infinite, so that the other entries still show the way. Overwrites ``slope``."""
    return slope.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def offer(
    best: BestPoints,
    forward: Forward,
    rows: torch.Tensor,
    sent: Pixels,
    labels: Labels,
    logits: Logits,
    value: torch.Tensor,
    *,
    checks: int,
) -> None:
    """The points ``sent`` for the images ``rows`` ``[R]``: misread ones before others, then by ``value`` ``[R]``.

    With ``checks`` > 1 a point that would be the best misread one is asked about so much more often, and counts as
    misread only if it always was.
    """
    cost = -value.clamp(max=_MOST)
    misread = logits.argmax(1) != labels
    if checks > 1:
        candidates = misread & (cost - _MISREAD < best.cost[rows])
        misread = confirmed(forward, sent, labels, candidates, checks=checks)
    best.offer(rows, sent, cost - _MISREAD * misread)


def misread(best: BestPoints, rows: torch.Tensor) -> torch.Tensor:
    """Bool ``[R]``: for which of the images ``rows`` there is a point that counts as misread."""
    return best.cost[rows] < -_MISREAD / 2
