"""Square attack: random search with squares at the border of the ball.

Andriushchenko, Croce, Flammarion, Hein 2020 (arXiv:1912.00049), the L-infinity version: start from vertical stripes,
then propose windows in which every colour is moved by epsilon up or down, and keep what lowers the margin. The window
shrinks with the number of queries; the schedule, given for 10,000, is scaled to the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mithridate.attacks.black_box.session import Session
from mithridate.attacks.oracle import BlackBoxResult, Oracle, Track
from mithridate.errors import OptionError
from mithridate.types import Epsilon, Labels, Pixels

_HALVED_AFTER = torch.tensor([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])
_OF = 10_000
_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Square:
    """Needs scores. ``share``: of the image's area that the first windows cover.

    ``repeats``: against ``random`` defences, the number of answers whose mean judges a point (EOT); each is a query.
    """

    epsilon: Epsilon
    share: float = 0.8
    repeats: int = 1
    random: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise OptionError(f"square: share={self.share} is out of range; allowed: above 0, to 1")
        if not 1 <= self.repeats <= 1000 or (self.repeats > 1 and not self.random):
            raise OptionError(
                f"square: repeats={self.repeats} is out of range; allowed: 1 to 1000, and above 1 with random=true"
            )

    @property
    def name(self) -> str:
        return "square"

    @property
    def track(self) -> Track:
        return "scores"

    def run(self, oracle: Oracle, pixels: Pixels, labels: Labels, *, seed: int, budget: int) -> BlackBoxResult:
        """See ``BlackBoxAttack``."""
        session = Session(
            oracle, pixels, labels, epsilon=self.epsilon, budget=budget, needs=self.track, random=self.random
        )
        session.start()
        low, high = session.ball()
        draws = _Draws(seed, session.pixels.shape)
        points = torch.where(draws.stripes(), high, low)
        best = torch.full((len(points),), torch.inf, dtype=torch.float64)  # the stripes are taken as they come
        kept, step = session.pixels.clone(), 0
        candidates, rows = points[session.rows], session.rows
        while len(rows):
            margins = self._judge(session, rows, candidates)
            better = margins < best[rows]
            kept[rows[better]], best[rows[better]] = candidates[better], margins[better]
            rows = session.rows
            window, up = draws.windows(rows, step, self._sides(session.spent[rows], budget, pixels.shape))
            candidates = torch.where(window, torch.where(up, high[rows], low[rows]), kept[rows])
            step += 1
        return session.result()

    def _judge(self, session: Session, rows: torch.Tensor, points: Pixels) -> torch.Tensor:
        """The margins ``[R]``, or their mean over as many repeats as there are queries left for."""
        if self.repeats == 1:
            seen = session.ask(rows, points)
            assert seen.margins is not None
            return seen.margins
        total, wrong, times = torch.zeros(3, len(rows), dtype=torch.float64).unbind()
        for _ in range(self.repeats):
            going = session.open[rows]
            if not bool(going.any()):
                break
            seen = session.ask(rows[going], points[going], rank=False)
            assert seen.margins is not None
            total[going] += seen.margins
            wrong[going] += seen.misread
            times[going] += 1
        session.offer(rows, points, total / times - 1e6 * (wrong > times / 2))
        return total / times

    def _sides(self, spent: torch.Tensor, budget: int, shape: torch.Size) -> torch.Tensor:
        """Of the windows, in pixels ``[R]``, after ``spent`` queries of ``budget``."""
        halvings = torch.bucketize(spent * _OF // budget, _HALVED_AFTER)
        area = self.share * shape[2] * shape[3] / 2.0**halvings
        return area.sqrt().round().long().clamp(1, min(shape[2:]))


class _Draws:
    """Stripes and windows. Every image draws from ``seed`` and its row, many windows at a time."""

    def __init__(self, seed: int, shape: torch.Size) -> None:
        self._images, self._channels, self._height, self._width = shape
        self._generators = [np.random.default_rng([seed, row]) for row in range(self._images)]
        self._block = np.zeros((self._images, _BLOCK, 2 + self._channels), dtype=np.float32)

    def stripes(self) -> torch.Tensor:
        """Bool ``[N, C, 1, W]``: up, or down."""
        drawn = [generator.random((self._channels, 1, self._width)) < 0.5 for generator in self._generators]
        return torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, self._channels, 1, self._width).bool()

    def windows(self, rows: torch.Tensor, step: int, sides: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For ``rows`` ``[R]``: bool windows ``[R, 1, H, W]`` of ``sides`` ``[R]``; bool ``[R, C, 1, 1]``: up?."""
        if step % _BLOCK == 0:
            for row in rows.tolist():
                self._block[row] = self._generators[row].random(self._block.shape[1:], dtype=np.float32)
        drawn = torch.from_numpy(self._block[rows.numpy(), step % _BLOCK])  # [R, 2 + C]
        inside = [
            _stretch((place * (size - sides + 1)).long().clamp(max=size - sides), sides, size)
            for place, size in ((drawn[:, 0], self._height), (drawn[:, 1], self._width))
        ]
        return (inside[0][:, :, None] & inside[1][:, None, :])[:, None], drawn[:, 2:, None, None] < 0.5


def _stretch(starts: torch.Tensor, lengths: torch.Tensor, size: int) -> torch.Tensor:
    """Bool ``[R, size]``."""
    places = torch.arange(size)
    return (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
