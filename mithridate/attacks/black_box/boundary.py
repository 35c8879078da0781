"""Boundary attack: a random walk along the border, towards the image.

Brendel, Rauber, Bethge 2018 (arXiv:1712.04248): a step on the sphere around the image, then one towards it, both as
long as experience says. The walk shortens the L2 distance; every few steps its point, projected into the
L-infinity ball, is asked for as well, since that is what counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import numpy as np
from numpy.typing import NDArray

from mithridate.attacks.black_box.approach import nearest, starting_point
from mithridate.attacks.black_box.lock_step import Points, Search, Target, run_searches
from mithridate.attacks.black_box.session import Session
from mithridate.attacks.oracle import BlackBoxResult, Oracle, Track
from mithridate.types import Epsilon, Labels, Pixels

Array = NDArray[np.float32]

_EVERY = 10
_ADAPTED = 1.5


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Needs labels only. The first steps are 0.01 of the distance, as the authors'."""

    epsilon: Epsilon
    random: bool = False

    @property
    def name(self) -> str:
        return "boundary"

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
        start = yield from starting_point(target)
        point = yield from nearest(target, start)
        image, steps = target.image.astype(np.float32), _Steps()
        for number in count():
            around = _around(target, image, point, steps.around)
            ahead = around + steps.ahead * (image - around)
            points = _levels(ahead)[None]
            if number % _EVERY == 0:
                points = np.stack([points[0], _levels(around), target.inside(point)])
            seen = yield points
            misread = seen.misread.tolist()
            if misread[0] and _length(points[0] - image) < _length(point - image):
                point = points[0]
            steps.tried(ahead=misread[0], around=misread[1] if len(misread) > 1 else None)


@dataclass
class _Steps:
    """How long the next ones are, as shares of the distance: half of those around should be misread, and a third of
    those ahead.
    """

    around: float = 0.01
    ahead: float = 0.01
    _around: list[bool] = field(default_factory=list)
    _ahead: list[bool] = field(default_factory=list)

    def tried(self, *, ahead: bool, around: bool | None) -> None:
        """What came of a step."""
        self._ahead.append(ahead)
        if around is not None:
            self._around.append(around)
        if len(self._around) == 5:
            factor = _factor(self._around, 0.2, 0.5)
            self.around, self.ahead, self._around = min(1.0, self.around * factor), self.ahead * factor, []
        if len(self._ahead) == 30:
            self.ahead, self._ahead = self.ahead * _factor(self._ahead, 0.1, 0.25), []
        self.ahead = min(0.5, self.ahead)


def _factor(tried: list[bool], low: float, high: float) -> float:
    share = sum(tried) / len(tried)
    return _ADAPTED if share > high else 1 / _ADAPTED if share < low else 1.0


def _around(target: Target, image: Array, point: Points, step: float) -> Array:
    """A random point as far from the image as ``point``, ``step`` times that distance from it."""
    outward = point - image
    distance = _length(outward)
    unit: Array = outward / np.float32(distance)
    noise = target.random.standard_normal(image.shape, dtype=np.float32)
    noise -= np.float32(np.vdot(noise, unit)) * unit
    moved: Array = outward + noise * np.float32(step * distance / _length(noise))
    beside: Array = image + moved * np.float32(distance / _length(moved))
    return beside


def _levels(point: Array) -> Points:
    return np.clip(np.rint(point), 0, 255).astype(np.uint8)


def _length(difference: NDArray[np.floating]) -> float:
    return max(float(np.linalg.norm(difference)), 1e-6)
