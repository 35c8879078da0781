"""The head by gradient descent: the published loss and optimiser, all images of a batch at once.

Mean cross-entropy of the neighbours over a linear head, from the base head on: a small convex problem an image. Written
out by hand (gradient and Adam, Kingma and Ba 2015) because the heads of a batch end at different steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from mithridate.defenses.base import Adaptation, Budget, StopReason, interruptions
from mithridate.defenses.options import require
from mithridate.types import Logits

_BETA1, _BETA2, _TINY = 0.9, 0.999, 1e-8  # Adam's published constants


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam's ``learning_rate``; at most ``steps`` full-batch steps; an image is done (``converged``) once the mean
    cross-entropy of its neighbours is below ``tolerance``.

    ``anchor`` times the squared distance from the base head is added to the loss, as a proximal step after each of
    Adam's (decoupled, as the weight decay of Loshchilov and Hutter 2019: inside the gradient, Adam's scaling would
    cancel it). ``held_out``: the nearest share of the neighbours that decides (0: none), each weighted as in the fit:
    the steps with the lowest loss there are kept, none of them where that is the base head's, and it is over after
    ``patience`` steps without a better one. With ``refit`` that many steps are then made on all neighbours.
    """

    learning_rate: float = 0.1
    steps: int = 50
    tolerance: float = 0.1
    anchor: float = 0.0
    held_out: float = 0.2
    patience: int = 50
    refit: bool = True

    def __post_init__(self) -> None:
        require("rmc", "learning_rate", self.learning_rate, 1e-9, 100)
        require("rmc", "steps", self.steps, 1, 10_000)
        require("rmc", "tolerance", self.tolerance, 0, 100)
        require("rmc", "anchor", self.anchor, 0, 1e9)
        require("rmc", "held_out", self.held_out, 0, 0.9)
        require("rmc", "patience", self.patience, 1, 10_000)


@dataclass(frozen=True, kw_only=True)
class HeadFit:
    """Fitted heads: float64 ``weight`` ``[B, C, D + 1]`` (the bias is the last column), and how each fit ended."""

    weight: torch.Tensor
    adaptations: tuple[Adaptation, ...]

    def logits(self, head_input: torch.Tensor) -> Logits:
        """``[B, D]``, one point a head, to logits ``[B, C]``, or ``[B, P, D]`` to ``[B, P, C]``; differentiable in
        ``head_input``."""
        return torch.einsum("bcd,b...d->b...c", self.weight, F.pad(head_input.double(), (0, 1), value=1.0))

    def __call__(self, points: torch.Tensor) -> Logits:
        return self.logits(points)

    def held(self) -> HeadFit:
        return self

    def rows(self, start: int, stop: int) -> HeadFit:
        """Those of some of the images."""
        return HeadFit(weight=self.weight[start:stop], adaptations=self.adaptations[start:stop])


def fit_heads(
    features: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    head: torch.nn.Linear,
    config: AdamConfig,
    budgets: Sequence[Budget],
    held: int,
) -> HeadFit:
    """Fits a head of its own to each row's neighbours, starting from ``head``.

    ``features`` ``[B, K, D]``, ``labels`` int64 ``[B, K]``, ``weights`` ``[B, K]``, the first ``held`` of K to validate
    on (``Selection.hold_out``); a budget a row.
    The arithmetic is float64: what another batch size changes in the rounding then stays far below any score a client
    sees.
    """
    bias = head.weight.new_zeros(head.out_features) if head.bias is None else head.bias
    one = 0.0 if head.bias is None else 1.0  # the bias is one more weight; with an input of 0 it stays where it is
    problem = _Problem(
        inputs=F.pad(features.double(), (0, 1), value=one),
        targets=F.one_hot(labels, head.out_features).double(),
        weights=weights.double(),
        start=torch.cat([head.weight, bias[:, None]], 1).double(),
    )
    limits = [budget.steps(config.steps) for budget in budgets]
    first = _Descent(problem.without(held), config, budgets, limits).run()
    last = first
    if held and config.refit:
        # Where the nearest neighbours speak for it, they are learned from too: as many steps again, now on all of them.
        again = [_steps_again(first, row, budget) for row, budget in enumerate(budgets)]
        last = _Descent(problem, replace(config, tolerance=0.0), budgets, again).run()
        for row, steps in enumerate(again):
            if not steps:  # its fit has ended, whatever its budget says by now
                last.reasons[row] = first.reasons[row]
            if not steps or last.steps[row] < steps:  # what was cut short, nobody has validated
                last.weight[row] = first.weight[row]
    fates = tuple(_fate(first, last, row, bool(held)) for row in range(len(features)))
    return HeadFit(weight=last.weight, adaptations=fates)


def _steps_again(first: _Run, row: int, budget: Budget) -> int:
    """The kept steps, or none where the budget has no room for them."""
    if first.reasons[row] in ("deadline", "cancelled"):
        return 0
    fits = budget.max_steps is None or first.steps[row] + first.kept[row] <= budget.max_steps
    return first.kept[row] if fits else 0


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """``inputs`` ``[B, K, D + 1]``, one-hot ``targets`` ``[B, K, C]``, ``weights`` ``[B, K]``, ``start`` ``[C, D +
    1]``; the first ``held`` neighbours are not learned from. Each part's weights sum to 1, or to 0."""

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    start: torch.Tensor
    held: int = 0

    def without(self, held: int) -> _Problem:
        """The same, with the first ``held`` neighbours kept for validation."""
        if not held:
            return self
        parts = (self.weights[:, :held], self.weights[:, held:])
        weights = torch.cat([part / part.sum(1, keepdim=True).clamp_min(1e-300) for part in parts], 1)
        return replace(self, weights=weights, held=held)

    def rows(self, keep: torch.Tensor) -> _Problem:
        """Only some of the images."""
        return replace(self, inputs=self.inputs[keep], targets=self.targets[keep], weights=self.weights[keep])

    def losses(self, log_probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted mean cross-entropy ``[B]`` of the neighbours that are learned from, and of the held out ones."""
        each = -(log_probabilities * self.targets).sum(-1) * self.weights  # [B, K]
        return each[:, self.held :].sum(1), each[:, : self.held].sum(1)

    def gradient(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """Of the loss of the neighbours that are learned from: ``[B, C, D + 1]``."""
        learned = slice(self.held, None)
        error = (log_probabilities[:, learned].exp() - self.targets[:, learned]) * self.weights[:, learned, None]
        gradient: torch.Tensor = error.mT @ self.inputs[:, learned]
        return gradient


@dataclass(kw_only=True)
class _Run:
    """How each row went: its ``weight``, ``steps`` taken, ``kept`` (those the weight is of), why it ended, and the held
    out neighbours' loss at the start and with the kept weight."""

    weight: torch.Tensor
    steps: list[int]
    kept: list[int]
    reasons: list[StopReason]
    losses: list[tuple[float, float]]


class _Descent:
    """Adam on every row until it converges, loses patience, reaches its limit or its budget ends; then the row
    leaves.
    """

    def __init__(self, problem: _Problem, config: AdamConfig, budgets: Sequence[Budget], limits: list[int]) -> None:
        count, device = len(problem.inputs), problem.inputs.device
        self._problem, self._config, self._budgets, self._limits = problem, config, budgets, limits
        self._rows = torch.arange(count)  # which image each remaining row belongs to
        weight = problem.start.expand(count, -1, -1).clone()
        self._weight, self._best_weight = weight, weight
        self._first, self._second = torch.zeros_like(weight), torch.zeros_like(weight)  # Adam's moments
        self._best = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
        self._initial = self._best
        self._best_step = torch.zeros(count, dtype=torch.int64, device=device)
        self._result = _Run(
            weight=weight.clone(),
            steps=[0] * count,
            kept=[0] * count,
            reasons=["max_steps"] * count,
            losses=[(0.0, 0.0)] * count,
        )

    def run(self) -> _Run:
        step = 0
        while len(self._rows):
            log_probabilities = (self._problem.inputs @ self._weight.mT).log_softmax(-1)  # [rows, K, C]
            losses, held_losses = self._problem.losses(log_probabilities)
            self._remember(step, held_losses)
            stay = self._leave(step, self._reasons(step, losses))
            step += 1
            self._step(step, log_probabilities if stay is None else log_probabilities[stay])
        return self._result

    def _remember(self, step: int, held_losses: torch.Tensor) -> None:
        """The best weights so far: the last ones where nothing is held out."""
        if not self._problem.held:
            self._best_step, self._best_weight = torch.full_like(self._best_step, step), self._weight
            return
        better = held_losses < self._best
        self._initial = held_losses if step == 0 else self._initial
        self._best = torch.where(better, held_losses, self._best)
        self._best_step = self._best_step.masked_fill(better, step)
        self._best_weight = torch.where(better[:, None, None], self._weight, self._best_weight)

    def _reasons(self, step: int, losses: torch.Tensor) -> list[StopReason | None]:
        """Why each row has to leave now, or None."""
        held = bool(self._problem.held)
        converged = (losses < self._config.tolerance).tolist()
        waited = (step - self._best_step).tolist()
        interrupted = interruptions([self._budgets[row] for row in self._rows.tolist()])
        reasons: list[StopReason | None] = []
        for place, row in enumerate(self._rows.tolist()):
            if converged[place]:
                reasons.append("converged")
            elif interrupted[place]:
                reasons.append(interrupted[place])
            elif held and waited[place] >= self._config.patience:
                reasons.append("patience")
            else:
                reasons.append("max_steps" if step >= self._limits[row] else None)
        return reasons

    def _leave(self, step: int, reasons: list[StopReason | None]) -> torch.Tensor | None:
        """Files the rows that have a reason; gives the mask of those that stay, None where all do."""
        if not any(reasons):
            return None
        result, steps = self._result, self._best_step.tolist()
        losses = list(zip(self._initial.tolist(), self._best.tolist(), strict=True))
        for place, (row, reason) in enumerate(zip(self._rows.tolist(), reasons, strict=True)):
            if reason is not None:
                result.steps[row], result.kept[row] = step, steps[place]
                result.reasons[row], result.losses[row] = reason, losses[place]
        leaving = torch.tensor([reason is not None for reason in reasons])
        there = leaving.to(self._weight.device)
        result.weight[self._rows[leaving].to(there.device)] = self._best_weight[there]
        stay = ~there
        self._rows = self._rows[~leaving]
        self._problem = self._problem.rows(stay)
        self._weight, self._best_weight = self._weight[stay], self._best_weight[stay]
        self._first, self._second = self._first[stay], self._second[stay]
        self._best, self._best_step, self._initial = self._best[stay], self._best_step[stay], self._initial[stay]
        return stay

    def _step(self, step: int, log_probabilities: torch.Tensor) -> None:
        gradient, config = self._problem.gradient(log_probabilities), self._config
        self._first = _BETA1 * self._first + (1 - _BETA1) * gradient
        self._second = _BETA2 * self._second + (1 - _BETA2) * gradient.square()
        scale = (self._second / (1 - _BETA2**step)).sqrt_().add_(_TINY)
        self._weight = self._weight - config.learning_rate * (self._first / (1 - _BETA1**step)) / scale
        if config.anchor:
            start = self._problem.start
            self._weight = start + (self._weight - start) / (1 + 2 * config.learning_rate * config.anchor)


def _fate(first: _Run, last: _Run, row: int, held: bool) -> Adaptation:
    """``first`` decided how long; ``last`` (the same, or the second fit) gave the weights."""
    steps = first.steps[row] + (last.steps[row] if last is not first else 0)
    reason = last.reasons[row] if last.reasons[row] in ("deadline", "cancelled") else first.reasons[row]
    return Adaptation(
        steps=steps,
        stop_reason=reason,
        weights="adapted" if first.kept[row] else "base",
        held_out_loss=first.losses[row] if held else None,
    )
