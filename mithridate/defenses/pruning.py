"""Stochastic activation pruning of one layer: which activations stay, and how much those then count.

Dhillon et al. 2018 (ICLR), as their own code and the erratum (arXiv 2010.00071) have it: of a layer's ``M`` activations
``r`` are drawn with replacement, activation j with probability p_j = |h_j| / sum |h|; what was drawn at least once
stays and is divided by the probability of that, q_j = 1 - (1 - p_j)^r, so that the layer's mean does not change. Kept
apart from networks and defences so that it can be checked against a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Sampling = Literal["multinomial", "binomial"]
"""``multinomial``: as published. ``binomial``: every activation for itself, with probability q_j: the same means and
variances, without the slight negative correlation, several times faster.
"""

_NUMBERS_AT_A_TIME = 250_000
"""Draws made and counted at a time: a few copies of them stay in a processor's cache."""


def prune(
    activations: torch.Tensor, *, fraction: float, sampling: Sampling, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """``[B, ...]`` to the same: each row, as one flat vector of ``M``, pruned with ``round(fraction * M)`` draws.

    Row i draws from ``generators[i]`` (on the CPU) alone. Mask and scale are constants of the backward pass, as in the
    authors' operator. A row that is 0 throughout, or not finite, comes back as it is. Half precision is computed in
    float32.
    """
    flat = activations.flatten(1)
    with torch.no_grad():
        wide = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
        draws = max(1, round(fraction * flat.shape[1]))
        scale = _scale(wide, draws, sampling, generators).to(flat.dtype)
    return (flat * scale).view_as(activations)


def keep_probabilities(shares: torch.Tensor, draws: int) -> torch.Tensor:
    """1 - (1 - p)^r without cancellation: p = 1e-8 and r = 163,840 give 1.6e-3, where float32 would have 0."""
    return shares.neg().log1p_().mul_(draws).expm1_().neg_()


def _scale(rows: torch.Tensor, draws: int, sampling: Sampling, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """``[B, M]``: 1 / q where the activation stays, else 0."""
    step = max(1, _NUMBERS_AT_A_TIME // max(draws, rows.shape[1]))
    scale = torch.empty_like(rows)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        scale[part] = _scale_of_some(rows[part], draws, sampling, generators[part])
    return scale


def _scale_of_some(
    rows: torch.Tensor, draws: int, sampling: Sampling, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    sizes = rows.abs()
    totals = sizes.sum(1, keepdim=True)
    usable = totals.isfinite() & (totals > 0)
    shares = sizes.div_(totals.where(usable, 1))
    keep = keep_probabilities(shares, draws)
    if sampling == "binomial":
        chances = torch.empty_like(keep, device="cpu")
        for row, generator in zip(chances, generators, strict=True):
            row.uniform_(generator=generator)
        drawn = chances.to(keep.device)
        torch.lt(drawn, keep, out=drawn)
    else:
        drawn = _drawn(shares, draws, generators).to(keep.dtype)
    # Where nothing can be drawn the scale is 1, and 0 or not a number stays what it is. Numbers instead of flags, and a
    # division instead of a choice: random flags cost a processor a wrong guess every other time.
    return drawn.div_(keep.clamp_min_(torch.finfo(keep.dtype).tiny)).where(usable, 1)


def _drawn(shares: torch.Tensor, draws: int, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """bool ``[B, M]``: what ``draws`` draws with replacement hit at least once.

    Sorted uniform numbers are the partial sums of exponential ones (Renyi 1953), so nothing is sorted and no index is
    kept: an activation is hit where a number lies between the cumulated shares on its either side.
    """
    gaps = torch.empty(len(shares), draws + 1, dtype=torch.float64)
    for row, generator in zip(gaps, generators, strict=True):
        row.uniform_(generator=generator)
    points = gaps.to(shares.device).neg_().log1p_().cumsum_(1)  # -log(1 - u) is exponential; the sign goes out below
    points /= points[:, -1:].clone()
    edges = shares.double().cumsum(1)
    edges /= edges[:, -1:].clone().clamp_min(1e-300)  # all 0 where there are no shares
    below = torch.searchsorted(points[:, :-1].contiguous(), edges, right=True)
    return below.diff(dim=1, prepend=below.new_zeros(len(below), 1)) > 0
