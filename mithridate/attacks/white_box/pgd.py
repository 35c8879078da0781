"""Projected gradient descent in the L-infinity or L2 ball, on the 8-bit lattice.

Madry et al. 2018 (arXiv:1706.06083). The iterate moves in real numbers, so that steps of less than one level add
up, but the network only ever sees it rounded to 8 bits: what is optimised is what can be sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mithridate.attacks.balls import Ball, Norm, ball_around
from mithridate.attacks.judging import BestPoints, Forward
from mithridate.attacks.losses import LOSSES, LossName
from mithridate.attacks.trace import Trace
from mithridate.attacks.white_box.looking import look, misread, offer, steady
from mithridate.attacks.white_box.masks import allowed_by, at, only, started
from mithridate.types import Epsilon, Images, Labels, Pixels


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Untargeted PGD.

    ``step_size`` is in units of the [0, 1] pixel range. With ``random_start`` each of the ``restarts`` begins at a
    point drawn from the ball; an image that is misread is left alone in later ones, with ``early_stop`` in later steps
    too. ``norm`` ``l2``: ``epsilon`` and ``step_size`` are lengths of the whole change. A point counts as misread when
    ``checks`` calls in a row misread it: 1 is right for a network that is not random.
    """

    epsilon: Epsilon
    steps: int
    step_size: float
    random_start: bool = True
    restarts: int = 1
    loss: LossName = "ce"
    norm: Norm = "linf"
    early_stop: bool = False
    checks: int = 1

    @property
    def name(self) -> str:
        """``fgsm``, ``pgd10``, ``pgd20x5-margin-l2`` and the like: what ``parse_attack`` reads."""
        count = "fgsm" if self.steps == 1 and not self.random_start else f"pgd{self.steps}"
        repeated = f"x{self.restarts}" if self.restarts > 1 else ""
        return count + repeated + ("" if self.loss == "ce" else f"-{self.loss}") + ("-l2" if self.norm == "l2" else "")

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
        """Raises the loss of ``labels`` ``[N]`` for uint8 ``pixels`` ``[N, C, H, W]``; gives uint8 back.

        Of all points visited the best is returned: a misclassified one before a correct one, then the highest loss.
        ``generator`` (on the CPU) draws the starts, for every image in every restart, whoever still needs it.
        ``mask``, bool ``[H, W]`` or what else broadcasts to the images, says which pixels may change; it holds within
        every step and for the start, so the others never do. ``trace`` is told every loss and gradient. Raises
        ValueError for another mask.
        """
        ball, allowed = ball_around(pixels, norm=self.norm, epsilon=self.epsilon), allowed_by(mask, pixels)
        best, rows = BestPoints(pixels), torch.arange(len(pixels), device=pixels.device)
        for restart in range(self.restarts):
            start = started(ball, allowed, generator if self.random_start else None)
            if restart:
                rows = rows[~misread(best, rows)]
            if trace is not None:
                trace.begin(steps=self.steps, like=pixels)
            if restart == 0 or len(rows):
                self._climb(forward, ball, labels, start, rows, allowed, best, trace)
        return best.pixels

    def _climb(
        self,
        forward: Forward,
        ball: Ball,
        labels: Labels,
        point: Images,
        rows: torch.Tensor,
        allowed: torch.Tensor | None,
        best: BestPoints,
        trace: Trace | None,
    ) -> None:
        """From ``point`` ``[N, C, H, W]``, for the images ``rows``. Offers every point on the way to ``best``."""
        loss = LOSSES[self.loss]
        if len(rows) < len(point):
            ball, labels, point, allowed = ball.only(rows), labels[rows], point[rows], at(rows, allowed)
        for step in range(self.steps + 1):
            sent = ball.sent(point)
            seen = look(forward, loss, sent, labels, slope=step < self.steps)
            if trace is not None:
                trace.record(step, rows, seen.losses, seen.slope)
            offer(best, forward, rows, sent, labels, seen.logits, seen.losses, checks=self.checks)
            if seen.slope is None:
                break
            slope = only(allowed, steady(seen.slope))
            if self.early_stop:
                on = ~misread(best, rows)
                if not bool(on.all()):
                    rows, slope = rows[on], slope[on]
                    ball, labels, point, allowed = ball.only(on), labels[on], point[on], at(on, allowed)
                if not len(rows):
                    break
            point = ball.onto(point + self.step_size * ball.steepest(slope))
