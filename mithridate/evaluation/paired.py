"""Defence against base on the same images: difference, interval, exact test. Without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from mithridate.evaluation.findings import Paired

RESAMPLES = 10_000
SIGNIFICANCE = 0.05
"""Two-sided, so each direction is declared by chance in at most 2.5 % of the comparisons."""

_Z95 = 1.959963984540054


def compare(
    defence_right: Sequence[bool], base_right: Sequence[bool], *, seed: int, resamples: int = RESAMPLES
) -> Paired:
    """Defence minus base. ``*_right`` say for each of the same ``n`` images whether it was answered rightly.

    The interval is the 95 % percentile bootstrap over images (Efron 1979). A resample of the images only matters
    through how many were gained and lost, which is one multinomial draw, so all ``resamples`` are drawn at once. Where
    all images fared alike (nothing gained or lost, or all) resamples do not differ and would give an interval without
    width: there it is the score interval of Tango (Statistics in Medicine 17, 1998). Raises ValueError for lists of
    different length or none.

    >>> compare([True, True], [True, False], seed=0).difference
    0.5
    """
    if len(defence_right) != len(base_right) or not len(defence_right):
        raise ValueError(f"{len(defence_right)} answers against {len(base_right)}; allowed: as many, at least one")
    defence, base = np.asarray(defence_right, dtype=bool), np.asarray(base_right, dtype=bool)
    n, gained, lost = len(defence), int((defence & ~base).sum()), int((base & ~defence).sum())
    same = n - gained - lost
    if n in (gained, lost, same):
        interval = tango_interval(gained, lost, n)
    else:
        drawn = np.random.default_rng(seed).multinomial(n, np.array([gained, lost, same]) / n, size=resamples)
        low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5])
        interval = (float(low), float(high))
    return Paired(
        n=n,
        gained=gained,
        lost=lost,
        difference=(gained - lost) / n,
        interval=interval,
        p=mcnemar(gained, lost),
    )


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p: of the images that changed, each direction is a fair coin's.

    >>> mcnemar(6, 0)
    0.03125
    """
    changed, fewer = gained + lost, min(gained, lost)
    if changed == 0:
        return 1.0
    ways = tail = 1
    for k in range(fewer):
        ways = ways * (changed - k) // (k + 1)  # of k + 1 among all that changed
        tail += ways
    return min(1.0, tail / (1 << changed - 1))


def tango_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """95 % score interval of (gained - lost) / n; never without width. +-z^2 / (n + z^2) where nothing changed."""

    def statistic(delta: float) -> float:
        a, b = 2 * n, -gained - lost + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        share_lost = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = n * (2 * share_lost + delta * (1 - delta))
        distance = gained - lost - n * delta
        return distance / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, distance)

    def solve(level: float, low: float, high: float) -> float:
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if statistic(middle) > level else (low, middle)
        return (low + high) / 2

    observed = (gained - lost) / n
    return (
        -1.0 if lost == n else solve(_Z95, -1.0, observed),
        1.0 if gained == n else solve(-_Z95, observed, 1.0),
    )


def is_gain(paired: Paired) -> bool:
    """The interval lies above zero, and McNemar's exact p agrees.

    Of few changed images alone the bootstrap is too sure: 4 gained and none lost leave an interval above zero, which a
    fair coin does once in 16 times; their p is 0.125. With both, a gain is declared by chance at most once in 40.
    """
    return paired.interval[0] > 0 and paired.p <= SIGNIFICANCE


def is_harm(paired: Paired) -> bool:
    """The interval lies below zero. No second condition: a doubt is not counted for the defence."""
    return paired.interval[1] < 0


def worst_case(rights: Iterable[Sequence[bool]]) -> tuple[bool, ...]:
    """For each image whether it stood under everything: the mean of minima, never the minimum of means.

    >>> worst_case([[True, False, True], [True, True, False]])
    (True, False, False)
    """
    rows = [tuple(row) for row in rights]
    if not rows or len({len(row) for row in rows}) != 1:
        raise ValueError(f"lists of {[len(row) for row in rows]} answers; allowed: at least one, all of one length")
    return tuple(all(answers) for answers in zip(*rows, strict=True))
