"""HopSkipJump: steps along the border's normal, estimated from labels around a point on it.

Chen, Jordan, Wainwright 2020 (arXiv:1904.02144), the L-infinity version: bisect to the border, ask for a ball of points
around, step by the sign of the estimate as far as that is still misread, and bisect again. The points around differ by
one level in every value: less cannot be sent, and the published radius is less.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from mithridate.attacks.black_box.approach import Finding, nearest, starting_point
from mithridate.attacks.black_box.lock_step import Points, Search, Target, run_searches
from mithridate.attacks.black_box.session import Session
from mithridate.attacks.oracle import BlackBoxResult, Oracle, Track
from mithridate.errors import OptionError
from mithridate.types import Epsilon, Labels, Pixels

_MOST = 10_000


@dataclass(frozen=True, kw_only=True)
class HopSkipJump:
    """Needs labels only. ``samples`` for the first estimate; the t-th takes sqrt(t) times as many."""

    epsilon: Epsilon
    samples: int = 100
    random: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.samples <= _MOST:
            raise OptionError(f"hopskipjump: samples={self.samples} is out of range; allowed: 2 to {_MOST}")

    @property
    def name(self) -> str:
        return "hopskipjump"

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
        for number in count(1):
            samples = min(_MOST, int(self.samples * number**0.5))
            signs = target.random.integers(0, 2, size=(samples, *point.shape), dtype=np.int8) * 2 - 1
            around = np.clip(point + signs.astype(np.int16), 0, 255).astype(np.uint8)
            seen = yield around
            verdicts = 2 * seen.misread.numpy().astype(np.float32) - 1
            if abs(verdicts.mean()) < 1:
                verdicts -= verdicts.mean()  # where nearly all agree, the others say more
            normal = np.tensordot(verdicts, around.astype(np.float32) - point, axes=1)
            ahead = yield from _step(target, point, np.sign(normal).astype(np.float32), number)
            if ahead is not point:
                point = yield from nearest(target, ahead)


def _step(target: Target, point: Points, direction: NDArray[np.float32], number: int) -> Finding:
    """As far as the step's share of the distance, halved until it is misread; ``point`` where nothing is."""
    length = target.distance(point) / number**0.5
    while length >= 0.5:
        ahead: Points = np.clip(np.rint(point + length * direction), 0, 255).astype(np.uint8)
        seen = yield ahead[None]
        if bool(seen.misread[0]):
            return ahead
        length /= 2
    return point
