"""Intervals and percentiles. Without torch: the attack client reports with them too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

_Z95 = 1.959963984540054


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def wilson_interval(successes: int, trials: int) -> Interval:
    """95 % score interval of a proportion (Wilson 1927); ``(0, 1)`` where nothing was tried.

    >>> wilson_interval(0, 1000).high < 0.004
    True
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    if trials == 0:
        return Interval(0.0, 1.0)
    share, z2 = successes / trials, _Z95**2
    centre = share + z2 / (2 * trials)
    spread = _Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    low = 0.0 if successes == 0 else max(0.0, (centre - spread) / scale)
    high = 1.0 if successes == trials else min(1.0, (centre + spread) / scale)
    return Interval(low, high)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of ``values`` do not exceed (nearest rank); NaN of nothing."""
    if not 0 < share <= 1:
        raise ValueError(f"share {share} is not in (0, 1]")
    if not values:
        return math.nan
    rank = math.ceil(Fraction(str(share)) * len(values))  # 0.07 means 7 of 100; as a double it is a little more
    return sorted(values)[rank - 1]
