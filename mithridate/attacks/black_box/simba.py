"""SimBA: one direction of a basis after the other, forwards or backwards, wherever it helps.

Guo, Gardner, You, Wilson, Weinberger 2019 (arXiv:1905.07121): directions without replacement from an orthogonal basis,
single pixels or cosine waves of low frequency. Theirs bounds the L2 norm by the number of steps; here every step is
projected into the L-infinity ball, and what judges it is the margin instead of the true class's score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mithridate.attacks.black_box.lock_step import Search, Target, run_searches
from mithridate.attacks.black_box.session import Session
from mithridate.attacks.oracle import BlackBoxResult, Oracle, Track
from mithridate.errors import OptionError
from mithridate.types import Epsilon, Labels, Pixels

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SimBA:
    """Needs scores. ``step``: what a direction changes at its highest point, as a share of epsilon.

    ``band``: with the ``dct`` basis, the share of the frequencies of each axis that is tried before the next.
    """

    epsilon: Epsilon
    basis: Literal["pixel", "dct"] = "pixel"
    step: float = 1.0
    band: float = 0.25
    random: bool = False

    def __post_init__(self) -> None:
        for key, value, most in (("step", self.step, 2), ("band", self.band, 1)):
            if not 0 < value <= most:
                raise OptionError(f"simba: {key}={value} is out of range; allowed: above 0, to {most}")

    @property
    def name(self) -> str:
        return "simba" if self.basis == "pixel" else "simba-dct"

    @property
    def track(self) -> Track:
        return "scores"

    def run(self, oracle: Oracle, pixels: Pixels, labels: Labels, *, seed: int, budget: int) -> BlackBoxResult:
        """See ``BlackBoxAttack``. Ends early where no direction helps any more."""
        session = Session(
            oracle, pixels, labels, epsilon=self.epsilon, budget=budget, needs=self.track, random=self.random
        )
        return run_searches(session, self._search, seed=seed, levels=self.epsilon.levels, random=self.random)

    def _search(self, target: Target) -> Search:
        best, margin = target.image.astype(np.float64), target.margin
        helped = True
        while helped:
            helped = False
            for direction in self._directions(target):
                for sign in (1, -1):
                    moved = np.clip(best + sign * direction, target.low, target.high)
                    point = target.inside(moved)
                    if np.array_equal(point, target.inside(best)):
                        continue  # it is at the border of the ball already
                    seen = yield point[None]
                    assert seen.margins is not None
                    if float(seen.margins[0]) < margin:
                        best, margin, helped = moved, float(seen.margins[0]), True
                        break

    def _directions(self, target: Target) -> Iterator[Array]:
        """All of the basis once, in levels ``[C, H, W]``, in random order."""
        height = self.step * target.levels
        shape = target.image.shape
        order = target.random.permutation(target.image.size)
        if self.basis == "pixel":
            for number in order:
                direction = np.zeros(shape)
                direction.flat[number] = height
                yield direction
            return
        band = np.maximum(*(np.indices(shape)[axis] // max(1, round(self.band * shape[axis])) for axis in (1, 2)))
        waves = [_waves(size) for size in shape[1:]]
        for number in order[np.argsort(band.flat[order], kind="stable")]:
            channel, down, across = np.unravel_index(number, shape)
            direction = np.zeros(shape)
            wave = np.outer(waves[0][down], waves[1][across])
            direction[channel] = wave * (height / np.abs(wave).max())
            yield direction


def _waves(size: int) -> Array:
    """``[size, size]``: the cosine waves of DCT-II, the slowest first."""
    numbers = np.arange(size)
    waves: Array = np.cos(np.pi * numbers[:, None] * (2 * numbers + 1) / (2 * size))
    return waves
