"""Random points of the ball: what an attack that learns nothing finds. No other may do worse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mithridate.attacks.black_box.lock_step import Search, Target, run_searches
from mithridate.attacks.black_box.session import Session
from mithridate.attacks.oracle import BlackBoxResult, Oracle, Track
from mithridate.types import Epsilon, Labels, Pixels

_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class RandomNoise:
    """Needs labels only. ``uniform`` over the levels of the ball, or its ``corners``: every value moved by epsilon."""

    epsilon: Epsilon
    kind: Literal["uniform", "corners"] = "uniform"
    random: bool = False

    @property
    def name(self) -> str:
        return "random-noise" if self.kind == "uniform" else "random-corners"

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
        shape = (_AT_ONCE, *target.image.shape)
        while True:
            if self.kind == "corners":
                yield np.where(target.random.random(shape, dtype=np.float32) < 0.5, target.low, target.high)
            else:
                yield target.random.integers(target.low, target.high, size=shape, dtype=np.uint8, endpoint=True)
