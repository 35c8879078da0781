"""The published fine-tuning, for one image or many at once, each with weights of its own.

Adam on mini-batches of the neighbours, the nearest of them held out to say when it is enough (Wu, Yuan, Wu 2020). All
images step together; one that is done leaves, and costs nothing any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mithridate.defenses.base import Adaptation, Budget, StopReason, interruptions
from mithridate.defenses.learner import Examples, Learner
from mithridate.defenses.options import require

_BETA1, _BETA2, _TINY = 0.9, 0.999, 1e-8  # Adam's published constants

_HELD_AT_A_TIME = 256
"""Held-out neighbours in one run of the network."""


class Settings(Protocol):
    """The options that all fine-tuning has.

    Adam with ``learning_rate`` on mini-batches of ``batch_size``; at most ``epochs``, stopping after ``patience`` of
    them without a better loss on the nearest share of the neighbours, ``held_out`` (0: none), or once the mean loss of
    an epoch is below ``tolerance``. ``anchor`` times the squared distance from the base weights is added to the loss,
    as a proximal step after each of Adam's (decoupled, as the weight decay of Loshchilov and Hutter 2019).
    """

    @property
    def learning_rate(self) -> float: ...
    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def patience(self) -> int: ...
    @property
    def held_out(self) -> float: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def anchor(self) -> float: ...


def check(settings: Settings) -> None:
    """Raises OptionError for a setting that is out of range."""
    require("rmc", "learning_rate", settings.learning_rate, 1e-9, 100)
    require("rmc", "epochs", settings.epochs, 1, 1_000)
    require("rmc", "batch_size", settings.batch_size, 1, 65_536)
    require("rmc", "patience", settings.patience, 1, 1_000)
    require("rmc", "held_out", settings.held_out, 0, 0.9)
    require("rmc", "tolerance", settings.tolerance, 0, 100)
    require("rmc", "anchor", settings.anchor, 0, 1e9)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings for ``neighbors`` of them, of which the first ``held`` are not learned from.

    ``restore_best``: the weights that suit the held-out ones best stay, the base weights among them; else the last.
    """

    settings: Settings
    neighbors: int
    held: int
    restore_best: bool

    @property
    def learned(self) -> int:
        """The neighbours that are learned from."""
        return self.neighbors - self.held

    @property
    def batches(self) -> int:
        """Steps an epoch."""
        return -(-self.learned // self.settings.batch_size)


@dataclass(kw_only=True)
class Tuned:
    """How one image fared: its ``weights`` ``[P]``, ``steps`` taken, ``kept`` (those the weights are of), why it ended,
    and the held-out loss before and with these weights, None where it was not looked at."""

    weights: torch.Tensor
    steps: int = 0
    kept: int = 0
    reason: StopReason = "max_steps"
    losses: tuple[float, float] | None = None

    @property
    def adaptation(self) -> Adaptation:
        """As the answer says it."""
        return Adaptation(
            steps=self.steps,
            stop_reason=self.reason,
            weights="adapted" if self.kept else "base",
            held_out_loss=self.losses,
        )


@dataclass(kw_only=True)
class _Row:
    """An image that is being tuned: its ``number``, the ``place`` of its examples, its ``limit`` of steps; the held-out
    loss ``before`` and ``now``, after ``looked`` steps; the ``best`` one, the weights and steps ``kept`` for that, and
    the epochs ``waited`` since."""

    number: int
    limit: int
    weights: torch.Tensor
    place: int = 0
    before: float = math.nan
    now: float = math.nan
    looked: int = 0
    best: float = math.inf
    kept: int = 0
    waited: int = 0


@dataclass(kw_only=True)
class _Moving:
    """Of all that are being tuned: ``weights`` ``[q, P]``, Adam's moments, the ``order`` ``[q, M]`` of this epoch and
    its ``loss`` ``[q]``, summed."""

    weights: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    order: torch.Tensor
    loss: torch.Tensor

    def rows(self, stay: list[int]) -> _Moving:
        return _Moving(**{name: value[stay] for name, value in vars(self).items()})


class FineTuning:
    """Adam on every image's weights until it converges, loses patience, reaches its limit or its budget ends.

    ``load`` gives the examples of the images whose budget is not over before they begin. ``limits``: steps an image,
    None for as many as plan and budget allow. An image's mini-batches follow from its seed alone.
    """

    def __init__(
        self,
        learner: Learner,
        start: torch.Tensor,
        plan: Plan,
        *,
        load: Callable[[list[int]], Examples],
        budgets: Sequence[Budget],
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> None:
        self._learner, self._start, self._plan = learner, start, plan
        self._load, self._budgets, self._seeds = load, budgets, seeds
        if limits is None:
            limits = [budget.steps(plan.settings.epochs * plan.batches) for budget in budgets]
        self._tuned = [Tuned(weights=start) for _ in budgets]
        self._rows = [_Row(number=number, limit=limit, weights=start) for number, limit in enumerate(limits)]
        self._generators = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
        nothing = start.new_empty(len(budgets), 0)  # until they begin
        self._moving = _Moving(weights=nothing, first=nothing, second=nothing, order=nothing, loss=nothing)

    def run(self) -> list[Tuned]:
        """One Tuned an image. Looks at each budget before each step."""
        self._leave(0, self._interruptions())
        self._leave(0, ["max_steps" if row.limit == 0 else None for row in self._rows])
        if self._rows:
            self._begin()
        step = 0
        while self._rows:
            step += 1
            self._step(step)
            self._judge(step)
            self._leave(step, self._interruptions())
        return self._tuned

    def _interruptions(self) -> list[StopReason | None]:
        return list(interruptions([self._budgets[row.number] for row in self._rows]))

    def _begin(self) -> None:
        """Reads the examples, and takes the held-out loss of the base weights."""
        examples, held = self._load([row.number for row in self._rows]), self._plan.held
        parts = (examples.weights[:, :held], examples.weights[:, held:])
        sums = parts[1].sum(1)
        # The mean over what is learned from becomes 1, and that over what is held out.
        means = [part / part.sum(1, keepdim=True).clamp_min(1e-30) * part.shape[1] for part in parts]
        weights = torch.cat(means, 1).to(self._start.dtype)
        self._examples = Examples(inputs=examples.inputs, labels=examples.labels, weights=weights)
        start = self._start.repeat(len(self._rows), 1)  # [q, P]
        self._moving.weights = start
        self._moving.first, self._moving.second = torch.zeros_like(start), torch.zeros_like(start)
        for place, row in enumerate(self._rows):
            row.place = place
        for row, loss in zip(self._rows, self._held_losses(range(len(self._rows))), strict=True):
            row.before = row.now = loss
            row.best = loss if self._plan.restore_best else math.inf
        # Neighbours that are too far away to count for anything teach nothing.
        self._leave(0, [None if total else "converged" for total in sums.tolist()])

    def _step(self, step: int) -> None:
        """One step of Adam for all."""
        settings, moving = self._plan.settings, self._moving
        begin = (step - 1) % self._plan.batches * settings.batch_size
        if begin == 0:
            self._shuffle()
        batch = self._examples.take(self._places(), moving.order[:, begin : begin + settings.batch_size])
        gradient, losses = self._learner.gradients(moving.weights, batch)
        moving.loss += losses * batch.labels.shape[1]
        moving.first.lerp_(gradient, 1 - _BETA1)
        moving.second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
        scale = (moving.second.sqrt() / math.sqrt(1 - _BETA2**step)).add_(_TINY)
        moving.weights.addcdiv_(moving.first, scale, value=-settings.learning_rate / (1 - _BETA1**step))
        if settings.anchor:
            stay = 1 / (1 + 2 * settings.learning_rate * settings.anchor)
            moving.weights.sub_(self._start).mul_(stay).add_(self._start)

    def _shuffle(self) -> None:
        """Each image's order for the coming epoch."""
        seeds = [self._seeds[row.number] for row in self._rows]
        orders = {seed: torch.randperm(self._plan.learned, generator=self._generators[seed]) for seed in set(seeds)}
        order = torch.stack([orders[seed] for seed in seeds]) + self._plan.held
        self._moving.order = order.to(self._start.device)
        self._moving.loss = self._start.new_zeros(len(seeds))

    def _judge(self, step: int) -> None:
        """After an epoch, and for an image at its limit: remembers the best weights, lets go those that are done."""
        settings, epoch_over = self._plan.settings, step % self._plan.batches == 0
        judged = [position for position, row in enumerate(self._rows) if epoch_over or step >= row.limit]
        if not judged:
            return
        means = (self._moving.loss / self._plan.learned).tolist()
        reasons: list[StopReason | None] = [None] * len(self._rows)
        for position, loss in zip(judged, self._held_losses(judged), strict=True):
            row = self._rows[position]
            row.now, row.looked = loss, step
            self._remember(row, position)
            if epoch_over and means[position] < settings.tolerance:
                reasons[position] = "converged"
            elif epoch_over and row.waited >= settings.patience:
                reasons[position] = "patience"
            elif step >= row.limit:
                reasons[position] = "max_steps"
        self._leave(step, reasons)

    def _remember(self, row: _Row, position: int) -> None:
        if not self._plan.held:
            return
        if row.now < row.best:
            row.best, row.waited = row.now, 0
            if self._plan.restore_best:
                row.kept, row.weights = row.looked, self._moving.weights[position].clone()
        else:
            row.waited += 1

    def _held_losses(self, positions: Sequence[int]) -> list[float]:
        """Weighted mean cross-entropy of the held-out neighbours with the weights at ``positions``; NaN without any."""
        held, where = self._plan.held, list(positions)
        if not held:
            return [math.nan] * len(where)
        everyone = len(where) == len(self._rows)
        weights = self._moving.weights if everyone else self._moving.weights[where]
        places = self._places()[where]
        total = weights.new_zeros(len(where))
        for part in torch.arange(held, device=weights.device).split(_HELD_AT_A_TIME):
            total += self._learner.losses(weights, self._examples.take(places, part.expand(len(where), -1)))
        return (total / held).tolist()

    def _places(self) -> torch.Tensor:
        return torch.tensor([row.place for row in self._rows], device=self._start.device)

    def _leave(self, step: int, reasons: Sequence[StopReason | None]) -> None:
        """Files the images that have a reason; the others go on."""
        if not any(reasons):
            return
        stay = [position for position, reason in enumerate(reasons) if reason is None]
        for position, (row, reason) in enumerate(zip(self._rows, reasons, strict=True)):
            if reason is not None:
                tuned = self._tuned[row.number]
                tuned.steps, tuned.reason = step, reason
                self._keep(tuned, row, position)
        self._rows = [self._rows[position] for position in stay]
        self._moving = self._moving.rows(stay)

    def _keep(self, tuned: Tuned, row: _Row, position: int) -> None:
        """Gives ``tuned`` its weights."""
        if self._plan.held and self._plan.restore_best:
            tuned.weights, tuned.kept = row.weights, row.kept
            tuned.losses = None if math.isnan(row.before) else (row.before, row.best)
        elif tuned.steps:
            last = self._moving.weights[position].clone()
            if bool(last.isfinite().all()):  # too large a learning rate must not answer NaN
                tuned.weights, tuned.kept = last, tuned.steps
            if self._plan.held and row.looked == tuned.steps:
                tuned.losses = (row.before, row.now)
