"""What white-box attacks raise: each ``[N, C]`` logits and the true classes to float64 ``[N]``.

All are taken in float64: of an image that a network is sure of, float32 leaves a wrong direction or none. Logits may as
well be log-probabilities. An entry below -1e15, -inf too, counts as no score at all: it stands just below the lowest
other one and gets no gradient. NaN stays NaN in its own row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional as F

from mithridate.types import Labels, Logits

Loss = Callable[[Logits, Labels], torch.Tensor]
"""Logits ``[N, C]`` and labels ``[N]`` to float64 ``[N]``; the larger, the nearer to a mistake."""

LossName = Literal["ce", "margin", "dlr"]

_MOST = 1e15
"""Beyond this, float64 cannot tell logits apart."""


def cross_entropy(logits: Logits, labels: Labels) -> torch.Tensor:
    """-log p of the true class, as softplus of the log-odds against it: log(1 - p) does not round to 0.

    Where the odds are beyond what float32 holds (some 100 logits apart) there is no gradient left: that is what a
    network of extreme logits does to everybody's cross-entropy, and what ``margin`` and ``dlr`` are for.

    >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([0.6931], dtype=torch.float64)
    """
    scores = _bounded(logits)
    return F.softplus(_others(scores, labels).logsumexp(1) - _true(scores, labels), threshold=50)


def margin(logits: Logits, labels: Labels) -> torch.Tensor:
    """How far the strongest other class is ahead of the true one; negative where the true one is. Its gradient has the
    same direction whatever the logits are multiplied by.

    >>> margin(torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([1]))
    tensor([-2.], dtype=torch.float64)
    """
    scores = _bounded(logits)
    return _others(scores, labels).amax(1) - _true(scores, labels)


def dlr(logits: Logits, labels: Labels) -> torch.Tensor:
    """Difference of Logits Ratio (Croce and Hein 2020, arXiv:2003.01690, equation 6): the margin over the distance of
    the first from the third logit. The same for all multiples of the logits. With two classes, which have no third, the
    ratio would be constant: there it is the margin.

    >>> dlr(torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([1]))
    tensor([-0.5000], dtype=torch.float64)
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    scores = _bounded(logits)
    first, _, third = scores.topk(3, dim=1).values.unbind(1)
    return (_others(scores, labels).amax(1) - _true(scores, labels)) / (first - third + 1e-12)


def targeted_dlr(logits: Logits, labels: Labels, targets: Labels) -> torch.Tensor:
    """The same towards one class each, ``targets`` ``[N]`` (equation 7): over the distance of the first from the mean
    of the third and fourth. With fewer than four classes it is how far the target is ahead of the true one.

    >>> targeted_dlr(torch.tensor([[1.0, 5.0, 3.0, 2.0]]), torch.tensor([1]), torch.tensor([3]))
    tensor([-0.8571], dtype=torch.float64)
    """
    scores = _bounded(logits)
    lead = _true(scores, targets) - _true(scores, labels)
    if logits.shape[1] < 4:
        return lead
    first, _, third, fourth = scores.topk(4, dim=1).values.unbind(1)
    return lead / (first - (third + fourth) / 2 + 1e-12)


LOSSES: dict[LossName, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def _bounded(logits: Logits) -> torch.Tensor:
    """Finite where it is not NaN."""
    scores = logits.double().clamp(max=_MOST)
    none = scores < -_MOST
    lowest = scores.detach().masked_fill(none, torch.inf).amin(1, keepdim=True).clamp(max=_MOST)
    return torch.where(none, lowest - 1, scores)


def _true(scores: torch.Tensor, labels: Labels) -> torch.Tensor:
    return scores.gather(1, labels[:, None])[:, 0]


def _others(scores: torch.Tensor, labels: Labels) -> torch.Tensor:
    return scores.scatter(1, labels[:, None], -torch.inf)
