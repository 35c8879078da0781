"""Which pixels a classifier listens to, and what an attacker gets who may change only those.

Hwang, Jang, Choi, Choi: Where to be Adversarial Perturbations Added? Investigating and Manipulating Pixel Robustness
Using Input Gradients (ICLR 2019 workshop). R is the mean over a data set of |dLoss/dx| at every pixel. The authors'
code takes its masks from a network of equal weights, in which the images have no say; these come from R itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mithridate.attacks import PGD, Forward
from mithridate.types import Labels, Pixels, to_images

Advance = Callable[[], None]
"""Called when a part of the work is done."""


@dataclass(frozen=True, kw_only=True)
class InputGradient:
    """R of one model: ``mean`` float64 ``[H, W]`` on the CPU. ``right`` bool ``[N]``: which images it classifies
    correctly as they are."""

    mean: torch.Tensor
    right: torch.Tensor


def input_gradient(
    forward: Forward, pixels: Pixels, labels: Labels, *, batch_size: int = 64, advance: Advance = lambda: None
) -> InputGradient:
    """The mean over uint8 ``pixels`` ``[N, C, H, W]`` and their channels of |d cross-entropy / d x| for the true
    ``labels`` ``[N]``. ``forward`` must treat each image by itself; ``advance`` is called after each batch.
    """
    total, right = torch.zeros(pixels.shape[2:], dtype=torch.float64), []
    for batch, truth in zip(pixels.split(batch_size), labels.split(batch_size), strict=True):
        images = to_images(batch).requires_grad_()
        logits = forward(images)
        # In float64: of an image that the model is sure of, float32 leaves no gradient at all.
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.double(), truth, reduction="sum"), images)
        total += gradient.abs().double().sum((0, 1)).cpu()
        right.append((logits.detach().argmax(1) == truth).cpu())
        advance()
    return InputGradient(mean=total / (pixels.shape[0] * pixels.shape[1]), right=torch.cat(right))


def by_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """``[H, W]`` to the places ``[H * W]`` of its pixels, the largest first; equal ones from left to right, then down.

    Its reverse is the order from the smallest, so that a share from one end and the rest from the other never meet.
    """
    return gradient.flatten().argsort(descending=True, stable=True)


def first_pixels(order: torch.Tensor, count: int, shape: Sequence[int]) -> torch.Tensor:
    """bool ``shape`` ``(H, W)``: the first ``count`` of ``order``, never more, whatever is equal."""
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(*shape)


def share_count(share: float, pixels: int) -> int:
    """How many pixels a share in [0, 1] is, a half up."""
    return int(share * pixels + 0.5)


def overlap(mask: torch.Tensor, other: torch.Tensor) -> float:
    """Intersection over union of two bool masks; 1 where both are empty."""
    union = int((mask | other).sum())
    return int((mask & other).sum()) / union if union else 1.0


def masked_attacks(
    forward: Forward,
    pixels: Pixels,
    labels: Labels,
    *,
    attack: PGD,
    orders: Mapping[str, torch.Tensor],
    shares: Sequence[float],
    batch_size: int = 64,
    seed: int = 0,
    advance: Advance = lambda: None,
) -> dict[str, dict[float, torch.Tensor]]:
    """Which images ``[N]`` bool are still right after ``attack`` on the first ``share`` of the pixels of each order.

    The masks of an order are nested, so what a smaller share can do a larger one can: an image that fell stays
    fallen, and only the others are attacked again. All pixels are the same whatever their order: one attack, after
    all of them. ``advance`` is called after each share of each order.
    """
    shape, total = pixels.shape[2:], pixels.shape[2] * pixels.shape[3]
    clean = _right(forward, pixels, labels, batch_size)
    standing = dict.fromkeys(orders, clean)
    found: dict[str, dict[float, torch.Tensor]] = {name: {} for name in orders}

    def attacked(still: torch.Tensor, order: torch.Tensor, count: int) -> torch.Tensor:
        mask = first_pixels(order, count, shape).to(pixels.device)
        return _after(forward, pixels, labels, still, attack=attack, mask=mask, batch_size=batch_size, seed=seed)

    for share in sorted(shares):
        count = share_count(share, total)
        if count == total:
            everywhere = torch.stack(list(standing.values())).all(0)
            everywhere = attacked(everywhere, torch.arange(total), total)
            standing = dict.fromkeys(orders, everywhere)
        for name, order in orders.items():
            if 0 < count < total:
                standing[name] = attacked(standing[name], order, count)
            found[name][share] = standing[name]
            advance()
    return found


def _after(
    forward: Forward,
    pixels: Pixels,
    labels: Labels,
    still: torch.Tensor,
    *,
    attack: PGD,
    mask: torch.Tensor,
    batch_size: int,
    seed: int,
) -> torch.Tensor:
    """bool ``[N]``: those of ``still`` that withstand."""
    places, generator, held = still.nonzero()[:, 0], torch.Generator().manual_seed(seed), still.clone()
    for some in places.split(batch_size) if len(places) else ():  # of nothing, split gives one empty part
        rows = some.to(pixels.device)
        moved = attack.run(forward, pixels[rows], labels[rows], generator=generator, mask=mask)
        held[some] = _right(forward, moved, labels[rows], batch_size)
    return held


@torch.no_grad()
def _right(forward: Forward, pixels: Pixels, labels: Labels, batch_size: int) -> torch.Tensor:
    """bool ``[N]`` on the CPU: which are classified as ``labels``."""
    pairs = zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
    return torch.cat([(forward(to_images(batch)).argmax(1) == truth).cpu() for batch, truth in pairs])
