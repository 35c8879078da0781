"""RayS: the direction, all plus and minus ones, in which the border lies nearest.

Chen, Gu 2020 (arXiv:2006.12792): flip the signs of a block; where the flipped direction is misread at the best radius
so far, bisect to its own. Blocks are halved when all have been tried. Whole levels are too coarse to see that a flip
has helped, so a fraction of a level moves that share of the values by one more, chosen once for an image.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mithridate.attacks.black_box.lock_step import Points, Search, Target, run_searches
from mithridate.attacks.black_box.session import Seen, Session
from mithridate.attacks.oracle import BlackBoxResult, Oracle, Track
from mithridate.types import Epsilon, Labels, Pixels

_FARTHEST = 255.0
_TOLERANCE = 0.25
"""Levels; 0.001 of the range, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class RayS:
    """Needs labels only. An image is done when its radius is within epsilon, unless the defence is ``random``."""

    epsilon: Epsilon
    random: bool = False

    @property
    def name(self) -> str:
        return "rays"

    @property
    def track(self) -> Track:
        return "labels"

    def run(self, oracle: Oracle, pixels: Pixels, labels: Labels, *, seed: int, budget: int) -> BlackBoxResult:
        """See ``BlackBoxAttack``."""
        session = Session(
            oracle, pixels, labels, epsilon=self.epsilon, budget=budget, needs=self.track, random=self.random
        )
        return run_searches(session, self._search, seed=seed, levels=self.epsilon.levels, random=self.random)

    def _search(self, target: Target) -> Search:
        size = target.image.size
        dither = target.random.random(target.image.shape)
        signs = np.ones(target.image.shape, dtype=np.int16)
        radius = yield from _radius(target, signs, dither, np.inf)
        blocks = 1
        while True:
            length = -(-size // blocks)
            for start in range(0, size, length):
                flipped = signs.copy()
                flipped.flat[start : start + length] *= -1
                found = yield from _radius(target, flipped, dither, radius)
                if found < radius:
                    signs, radius = flipped, found
            blocks = 1 if length == 1 else 2 * blocks


def _radius(
    target: Target, signs: NDArray[np.int16], dither: NDArray[np.float64], best: float
) -> Generator[Points, Seen, float]:
    """Levels to the border in this direction; infinity where it is not nearer than ``best``."""
    low = float(target.levels) if target.ends_in_ball else 0.0
    high = min(best, _FARTHEST)
    seen = yield _point(target, signs, dither, high)[None]
    if not bool(seen.misread[0]):
        return np.inf
    nearest = low
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        seen = yield _point(target, signs, dither, middle)[None]
        if bool(seen.misread[0]):
            high = middle
        else:
            low = middle
    if low == nearest and high > low:  # all the way down: is it misread in the ball?
        seen = yield _point(target, signs, dither, low)[None]
        high = low if bool(seen.misread[0]) else high
    return high


def _point(target: Target, signs: NDArray[np.int16], dither: NDArray[np.float64], radius: float) -> Points:
    whole = int(radius)
    levels = whole + (dither < radius - whole)
    return np.clip(target.image + signs * levels, 0, 255).astype(np.uint8)
