"""NES: projected steps along a gradient that is estimated from pairs of opposite points.

Ilyas, Engstrom, Athalye, Lin 2018 (arXiv:1804.08598): antithetic Gaussian samples, sign steps with momentum. Their
samples are thousandths of the pixel range apart; 8-bit pixels need whole levels. The estimate therefore uses the
differences as they were sent, after rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mithridate.attacks.black_box.lock_step import Search, Target, run_searches
from mithridate.attacks.black_box.session import Session
from mithridate.attacks.oracle import BlackBoxResult, Oracle, Track
from mithridate.errors import OptionError
from mithridate.types import Epsilon, Labels, Pixels


@dataclass(frozen=True, kw_only=True)
class NES:
    """Needs scores. ``pairs`` of points a step, ``spread`` levels from the iterate (standard deviation), all inside the
    ball. ``step``: as a share of epsilon.
    """

    epsilon: Epsilon
    pairs: int = 10
    spread: float = 2.5
    step: float = 0.25
    momentum: float = 0.9
    random: bool = False

    def __post_init__(self) -> None:
        for key, value, least, most in (
            ("pairs", self.pairs, 1, 1000),
            ("spread", self.spread, 0.5, 64),
            ("step", self.step, 0.001, 2),
            ("momentum", self.momentum, 0, 0.999),
        ):
            if not least <= value <= most:
                raise OptionError(f"nes: {key}={value} is out of range; allowed: {least:g} to {most:g}")

    @property
    def name(self) -> str:
        return "nes"

    @property
    def track(self) -> Track:
        return "scores"

    def run(self, oracle: Oracle, pixels: Pixels, labels: Labels, *, seed: int, budget: int) -> BlackBoxResult:
        """See ``BlackBoxAttack``."""
        session = Session(
            oracle, pixels, labels, epsilon=self.epsilon, budget=budget, needs=self.track, random=self.random
        )
        return run_searches(session, self._search, seed=seed, levels=self.epsilon.levels, random=self.random)

    def _search(self, target: Target) -> Search:
        point: NDArray[np.floating] = target.image.astype(np.float32)
        velocity: NDArray[np.floating] = np.zeros_like(point)
        while True:
            noise = self.spread * target.random.standard_normal((self.pairs, *point.shape), dtype=np.float32)
            ahead, behind = target.inside(point + noise), target.inside(point - noise)
            seen = yield np.concatenate([ahead, behind])
            assert seen.margins is not None
            rises = (seen.margins[: self.pairs] - seen.margins[self.pairs :]).numpy()
            gradient = np.tensordot(rises, ahead.astype(np.float32) - behind.astype(np.float32), axes=1)
            velocity = self.momentum * velocity + (1 - self.momentum) * gradient
            point = point - self.step * target.levels * np.sign(velocity)
            point = np.clip(point, target.low, target.high)
            yield target.inside(point)[None]
