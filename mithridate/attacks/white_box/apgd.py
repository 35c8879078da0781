"""Auto-PGD: gradient ascent with momentum that chooses its own step size.

Croce and Hein 2020 (arXiv:2003.01690), algorithm 1 with their constants; APGD-T is their attack on targeted DLR. As in
PGD here, the iterate moves in real numbers and the network only ever sees it on the 8-bit lattice: losses and
gradients are those of what can be sent.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch

from mithridate.attacks.balls import Ball, Norm, ball_around
from mithridate.attacks.judging import BestPoints, Forward
from mithridate.attacks.losses import LOSSES, Loss, dlr, targeted_dlr
from mithridate.attacks.trace import Trace
from mithridate.attacks.white_box.looking import look, misread, offer, steady
from mithridate.attacks.white_box.masks import allowed_by, only, started
from mithridate.types import Epsilon, Images, Labels, Pixels, to_images

APGDLoss = Literal["ce", "margin", "dlr", "t"]

_MOMENTUM = 0.75
_RISING = 0.75
"""rho: the share of steps that have to raise the loss, else they are too long."""


@dataclass(frozen=True, kw_only=True)
class APGD:
    """Untargeted attack. ``loss`` ``ce``, ``margin`` or ``dlr``; ``t``: targeted DLR, one run for each of the
    ``targets`` most likely other classes (all there are, where there are fewer).

    A run takes ``steps`` of them, from a point drawn from the ball. An image that is misread is left
    alone in later runs, with ``early_stop`` in later steps too. ``norm`` ``l2``: ``epsilon`` is the length of the whole
    change. A point counts as misread when ``checks`` calls in a row misread it: 1 is right for a network that is not
    random.
    """

    epsilon: Epsilon
    steps: int = 100
    loss: APGDLoss = "ce"
    restarts: int = 1
    targets: int = 9
    norm: Norm = "linf"
    early_stop: bool = False
    checks: int = 1

    @property
    def name(self) -> str:
        """``apgd-ce100``, ``apgd-t50x2-l2`` and the like: what ``parse_attack`` reads."""
        repeated = f"x{self.restarts}" if self.restarts > 1 else ""
        return f"apgd-{self.loss}{self.steps}{repeated}" + ("-l2" if self.norm == "l2" else "")

    def run(
        self,
        forward: Forward,
        pixels: Pixels,
        labels: Labels,
        *,
        generator: torch.Generator,
        mask: torch.Tensor | None = None,
        trace: Trace | None = None,
    ) -> Pixels:
        """As ``PGD.run``: uint8 ``[N, C, H, W]``, the best of all points visited in all runs."""
        ball, allowed = ball_around(pixels, norm=self.norm, epsilon=self.epsilon), allowed_by(mask, pixels)
        best, rows = BestPoints(pixels), torch.arange(len(pixels), device=pixels.device)
        aims = self._aims(forward, pixels, labels)
        for run in range(self.restarts * len(aims)):
            start = started(ball, allowed, generator)
            if run:
                rows = rows[~misread(best, rows)]
            if trace is not None:
                trace.begin(steps=self.steps, like=pixels)
            if run and not len(rows):
                continue
            climb = _Climb(
                rows=rows,
                labels=labels[rows],
                aims=aims[run % len(aims)][rows],
                ball=ball.only(rows),
                allowed=None if allowed is None else allowed[rows],
                point=start[rows],
                step_size=2 * ball.radius,
            )
            self._climb(climb, forward, best, trace)
        return best.pixels

    def _aims(self, forward: Forward, pixels: Pixels, labels: Labels) -> list[Labels]:
        """For each run of a restart the class gone for ``[N]``; the true one, from which to get away, untargeted."""
        if self.loss != "t":
            return [labels]
        with torch.no_grad():
            logits = forward(to_images(pixels))
        others = logits.scatter(1, labels[:, None], -torch.inf)
        return list(others.topk(min(self.targets, logits.shape[1] - 1), dim=1).indices.unbind(1))

    def _climb(self, climb: _Climb, forward: Forward, best: BestPoints, trace: Trace | None) -> None:
        turns = checkpoints(self.steps)
        for step in range(self.steps + 1):
            sent = climb.ball.sent(climb.point)
            seen = look(forward, self._loss(climb.aims), sent, climb.labels, slope=step < self.steps)
            if trace is not None:
                trace.record(step, climb.rows, seen.losses, seen.slope)
            # How far one target was come near says nothing beside another.
            value = dlr(seen.logits, climb.labels) if self.loss == "t" else seen.losses
            offer(best, forward, climb.rows, sent, climb.labels, seen.logits, value, checks=self.checks)
            if seen.slope is None:
                break
            climb.see(seen.losses, only(climb.allowed, steady(seen.slope)))
            if step in turns:
                climb.turn(turns[step])
            if self.early_stop:
                on = ~misread(best, climb.rows)
                if not bool(on.all()):
                    climb.keep(on)
                if not len(climb.rows):
                    break
            climb.move()

    def _loss(self, aims: Labels) -> Loss:
        if self.loss == "t":
            return lambda logits, labels: targeted_dlr(logits, labels, aims)
        return LOSSES[self.loss]


def checkpoints(steps: int) -> dict[int, int]:
    """The steps after which the step size is looked at (section 3.2), and how many have passed since the last.

    >>> checkpoints(100)
    {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    """
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    ends = sorted({min(ceil(round(share * steps, 9)), steps) for share in shares})
    return {end: end - before for before, end in itertools.pairwise(ends) if end < steps}


class _Climb:
    """The state of one run, for the images that are still in it: every tensor has a row for each of them."""

    def __init__(
        self,
        *,
        rows: torch.Tensor,
        labels: Labels,
        aims: Labels,
        ball: Ball,
        allowed: torch.Tensor | None,
        point: Images,
        step_size: float,
    ) -> None:
        self.rows, self.labels, self.aims, self.ball, self.allowed = rows, labels, aims, ball, allowed
        self.point, self.before = point, point
        self.slope = torch.zeros_like(point)
        self.top, self.top_slope = point, self.slope
        self.loss = torch.full((len(rows),), torch.nan, dtype=torch.float64, device=point.device)
        self.top_loss = torch.full_like(self.loss, -torch.inf)
        self.step_size = torch.full((len(rows), 1, 1, 1), step_size, device=point.device)
        self.rises = torch.zeros_like(self.loss)
        self.top_at_turn, self.halved = self.top_loss, torch.ones_like(self.loss, dtype=torch.bool)

    def see(self, losses: torch.Tensor, slope: torch.Tensor) -> None:
        """What the network said of ``point``."""
        self.rises += losses > self.loss  # never at the start, where the last one is NaN
        higher = losses > self.top_loss
        self.loss, self.slope = losses, slope
        self.top_loss = torch.where(higher, losses, self.top_loss)
        here = higher.view(-1, 1, 1, 1)
        self.top, self.top_slope = torch.where(here, self.point, self.top), torch.where(here, slope, self.top_slope)

    def turn(self, passed: int) -> None:
        """Half the step, from the best point, where too few of the ``passed`` steps rose (condition 1) or neither the
        step size nor the best loss has changed since the last turn (condition 2)."""
        stuck = ~self.halved & (self.top_loss <= self.top_at_turn)
        halve = (self.rises < _RISING * passed) | stuck
        self.halved, self.top_at_turn, self.rises = halve, self.top_loss, torch.zeros_like(self.rises)
        here = halve.view(-1, 1, 1, 1)
        self.step_size = torch.where(here, self.step_size / 2, self.step_size)
        self.point, self.slope = torch.where(here, self.top, self.point), torch.where(here, self.top_slope, self.slope)
        self.loss = torch.where(halve, self.top_loss, self.loss)

    def move(self) -> None:
        """One step along the slope, with momentum; the first has none."""
        ahead = self.ball.onto(self.point + self.step_size * self.ball.steepest(self.slope))
        if self.before is not self.point:
            ahead = self.point + _MOMENTUM * (ahead - self.point) + (1 - _MOMENTUM) * (self.point - self.before)
            ahead = self.ball.onto(ahead)
        self.before, self.point = self.point, ahead

    def keep(self, on: torch.Tensor) -> None:
        """Leaves out all but the images ``on``, bool ``[R]``."""
        first = self.before is self.point
        for name, value in list(vars(self).items()):
            if isinstance(value, torch.Tensor):
                setattr(self, name, value[on])
        self.ball = self.ball.only(on)
        if first:
            self.before = self.point
