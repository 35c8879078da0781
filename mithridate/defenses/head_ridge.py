"""The head in closed form: what the neighbours teach, as one ridge regression an image.

The base model gives exemplar i the probabilities p_i; its label says y_i. A linear map of the head's input is fitted to
what the base model gets wrong, y_i - p_i, by weighted least squares with a penalty, and its value at the query is added
to the base model's answer. So the base head is the anchor (a strong penalty leaves it as it is), nothing is iterated,
and the answer is a smooth function of the query and its neighbours. Hoerl and Kennard 1970; local fits as in Bottou and
Vapnik 1992.

Everything is float64: what another batch size changes in the rounding stays far below any score a client sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional as F

from mithridate.defenses.adapting import Adapted, Query, average_heads, join
from mithridate.defenses.base import Adaptation, Budget, Resources, interruptions
from mithridate.defenses.exemplar_scores import ExemplarScores
from mithridate.defenses.options import require
from mithridate.errors import BudgetExceededError
from mithridate.types import Logits

_ROUNDING = 1e-2
"""Fitted shares reach below 0 and above 1. Those below are rounded off smoothly, within about this much for all classes
together, so that every score is positive, keeps its rank, and has a gradient.
"""

_NUMBERS_AT_A_TIME = 8_000_000
"""float64 features and matrices of one chunk of images: 64 MB, in a few copies."""


@dataclass(frozen=True, kw_only=True)
class RidgeConfig:
    """``anchor``: the penalty on leaving the base head, relative to the mean square of the features. ``held_out``: the
    nearest share of the neighbours that decides whether the fit is any good (0: none, it is always used); it is, where
    it predicts them no worse than the base model does, each weighted as in the fit, and is then made again on all."""

    anchor: float = 1e-3
    held_out: float = 0.2

    def __post_init__(self) -> None:
        require("rmc", "anchor", self.anchor, 1e-9, 1e9)
        require("rmc", "held_out", self.held_out, 0, 0.9)


@dataclass(frozen=True, kw_only=True)
class RidgeHead:
    """Adapts the head with ``solver=ridge``."""

    resources: Resources
    config: RidgeConfig
    scores: ExemplarScores

    @property
    def batches(self) -> bool:
        return True

    @property
    def changes(self) -> Literal["head", "tail", "all"]:
        return "head"

    @property
    def repeatable(self) -> bool:
        return True

    def adapt(self, query: Query) -> Adapted:
        count, width = query.selection.ids.shape[1], self.resources.classifier.head.in_features + 1
        classes = query.base.logits.shape[1]
        rows = max(1, _NUMBERS_AT_A_TIME // (count * (width + classes) + 2 * min(count, width) ** 2))
        parts = [self._fit(query.rows(start, start + rows)) for start in range(0, max(1, len(query)), rows)]
        return join(parts)

    def _fit(self, query: Query) -> Adapted:
        over = interruptions(query.budgets)
        if all(over):
            if query.average is not None and over[0] is not None:
                raise BudgetExceededError(over[0])  # there is no average of the base model to answer with either
            fates = _fates(query.budgets, None, [False] * len(query))
            return Adapted(logits=query.base.logits.double(), adaptations=fates)
        head, (selection, held) = self.resources.classifier.head, query.selection.hold_out(self.config.held_out)
        device = query.base.logits.device
        features = self.resources.exemplars.gather_features(selection.ids, device)
        labels = self.resources.exemplars.gather_labels(selection.ids, device)
        one = 0.0 if head.bias is None else 1.0  # the bias is one more weight; with an input of 0 it stays where it is
        inputs = F.pad(features.double(), (0, 1), value=one)  # [B, K, D + 1]
        point = F.pad(query.base.head_input.double(), (0, 1), value=one)  # [B, D + 1]
        base_scores = self.scores.of(selection.ids, features).double()  # [B, K, C]
        missing = F.one_hot(labels, base_scores.shape[-1]).double() - base_scores
        weights = selection.weights.to(device)
        correction = fit_at(inputs, missing, weights, point, self.config.anchor)
        solved = correction.isfinite().all(1)
        correction = torch.where(solved[:, None], correction, 0.0)
        losses = self._held_out(inputs, missing, weights.detach(), held) if held else None
        fates = _fates(query.budgets, losses, solved.tolist())
        if query.average is None:
            return Adapted(
                logits=_positive(query.base.logits.double().softmax(1) + correction).log(), adaptations=fates
            )

        answer = FittedHeads(
            head=head,
            inputs=inputs,
            missing=missing,
            weights=weights,
            solved=solved,
            one=one,
            penalty=self.config.anchor,
        )
        return average_heads(query, self.resources.classifier, fates, answer)

    @torch.no_grad()
    def _held_out(
        self, inputs: torch.Tensor, missing: torch.Tensor, weights: torch.Tensor, held: int
    ) -> list[tuple[float, float]]:
        """Mean squared error of the first ``held`` neighbours' shares: the base model's, and that of a fit to the
        others, infinite where none of those counts for anything.
        """
        rest = weights[:, held:].sum(1, keepdim=True)
        learned = weights[:, held:] / rest.clamp_min(1e-300)
        corrections = fit_at(inputs[:, held:], missing[:, held:], learned, inputs[:, :held], self.config.anchor)
        shares = weights[:, :held] / weights[:, :held].sum(1, keepdim=True)
        before = (missing[:, :held].square().sum(-1) * shares).sum(1)
        after = ((missing[:, :held] - corrections).square().sum(-1) * shares).sum(1)
        after = after.masked_fill(rest[:, 0] == 0, torch.inf)
        return list(zip(before.tolist(), after.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class FittedHeads:
    """``B`` heads, fitted anew at every point: differentiable in the points and in the neighbours' ``weights``."""

    head: torch.nn.Linear
    inputs: torch.Tensor
    missing: torch.Tensor
    weights: torch.Tensor
    solved: torch.Tensor
    one: float
    penalty: float

    def __call__(self, points: torch.Tensor) -> Logits:
        places = F.pad(points.double(), (0, 1), value=self.one)  # [B, P, D + 1]
        corrections = fit_at(self.inputs, self.missing, self.weights, places, self.penalty)
        corrections = torch.where(self.solved[:, None, None], corrections, 0.0)
        return _positive(self.head(points).double().softmax(-1) + corrections).log()

    @torch.no_grad()
    def held(self) -> LinearCorrections:
        """The fit is linear in the point: what it gives at every axis is all of it."""
        width = self.inputs.shape[-1]
        axes = torch.eye(width, dtype=self.inputs.dtype, device=self.inputs.device).expand(len(self.inputs), -1, -1)
        fitted = fit_at(self.inputs, self.missing, self.weights.detach(), axes, self.penalty)
        fitted = torch.where(self.solved[:, None, None], fitted, 0.0)
        return LinearCorrections(head=self.head, weight=fitted, one=self.one)

    def rows(self, start: int, stop: int) -> FittedHeads:
        names = ("inputs", "missing", "weights", "solved")
        return replace(self, **{name: getattr(self, name)[start:stop] for name in names})


@dataclass(frozen=True, kw_only=True)
class LinearCorrections:
    """``B`` heads: the base head's scores, and a linear map of its input, ``weight`` ``[B, D + 1, C]``, added."""

    head: torch.nn.Linear
    weight: torch.Tensor
    one: float

    def __call__(self, points: torch.Tensor) -> Logits:
        places = F.pad(points.double(), (0, 1), value=self.one)  # [B, P, D + 1]
        return _positive(self.head(points).double().softmax(-1) + places @ self.weight).log()

    def held(self) -> LinearCorrections:
        return self

    def rows(self, start: int, stop: int) -> LinearCorrections:
        return replace(self, weight=self.weight[start:stop])


def _positive(shares: torch.Tensor) -> torch.Tensor:
    """Almost max(share, 0), without the corner: (share + root) / 2, below 0 in the form that does not cancel."""
    corner = _ROUNDING / shares.shape[-1]
    root = (shares.square() + corner**2).sqrt()
    below = shares < 0
    # Neither branch divides or cancels where the other one is meant: its gradient would be no number, times 0.
    divisor = root - torch.where(below, shares, 0.0)
    return torch.where(below, corner**2 / (2 * divisor), (torch.where(below, 0.0, shares) + root) / 2)


def fit_at(
    inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, points: torch.Tensor, penalty: float
) -> torch.Tensor:
    """Ridge regression of ``targets`` ``[B, K, C]`` on ``inputs`` ``[B, K, D]``, each row of ``weights`` ``[B, K]``
    summing to 1, at ``points`` ``[B, D]`` or ``[B, P, D]``: gives ``[B, C]`` or ``[B, P, C]``.

    ``penalty`` is relative to the inputs' mean square. Solved in the smaller of the two forms, D x D or K x K.
    """
    single = points.ndim == 2
    queries = points[:, None] if single else points  # [B, P, D]
    roots = weights.clamp_min(1e-200).sqrt()[..., None]  # at a weight of 0 the root has no slope; this has the slope 0
    scaled = inputs * roots  # [B, K, D]
    count, width = scaled.shape[1:]
    ridge = penalty * scaled.square().sum((1, 2)) / width  # [B]
    ridge = ridge.clamp_min(1e-12)[:, None, None]
    if width <= count:
        gram = scaled.mT @ scaled + ridge * torch.eye(width, dtype=scaled.dtype, device=scaled.device)
        factor, failed = torch.linalg.cholesky_ex(gram)
        influence = torch.cholesky_solve(queries.mT, factor).mT @ scaled.mT  # [B, P, K]
    else:
        gram = scaled @ scaled.mT + ridge * torch.eye(count, dtype=scaled.dtype, device=scaled.device)
        factor, failed = torch.linalg.cholesky_ex(gram)
        influence = torch.cholesky_solve(scaled @ queries.mT, factor).mT
    fitted = influence @ (targets * roots)  # [B, P, C]
    fitted = fitted.masked_fill((failed != 0)[:, None, None], torch.nan)
    return fitted[:, 0] if single else fitted


def _fates(
    budgets: tuple[Budget, ...], losses: list[tuple[float, float]] | None, solved: list[bool]
) -> tuple[Adaptation, ...]:
    """One step that lands on the minimum. It cannot be cut short: only a budget that is over by now says so."""
    fates = []
    for row, (budget, reason) in enumerate(zip(budgets, interruptions(budgets), strict=True)):
        loss = None if losses is None else losses[row]
        if reason is not None or budget.steps(1) < 1:
            fates.append(Adaptation(steps=0, stop_reason=reason or "max_steps", weights="base"))
        else:
            good = solved[row] and (loss is None or loss[1] <= loss[0])
            fates.append(
                Adaptation(
                    steps=1,
                    stop_reason="converged",
                    weights="adapted" if good else "base",
                    held_out_loss=loss if loss is not None and math.isfinite(loss[1]) else None,
                )
            )
    return tuple(fates)
