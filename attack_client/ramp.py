"""The search for the knee: the highest rate that a service sustains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mithridate.evaluation.service_load import Knee, LoadStep

PRECISION = 1.05
"""The search ends once the lowest rate that failed is within this factor of the highest that did not."""
ATTEMPTS = 2
"""A rate counts as too high when it fails this often in a row: a busy second of the machine is no saturation."""


def find_knee(
    measure: Callable[[float], LoadStep], rates: Sequence[float], *, doubling: bool, ceiling: float
) -> tuple[list[LoadStep], Knee]:
    """Measures at ``rates``, in ascending order; ``doubling``: and from the last of them on at twice the rate, up to
    ``ceiling``. The first rate that is not sustained ends this, and bisection (in proportion) goes on between it and
    the last one that was. Gives all steps in the order in which they were run."""
    steps: list[LoadStep] = []
    sustained: float | None = None
    saturated: float | None = None
    remaining = sorted(set(rates))
    while remaining and saturated is None:
        rate = remaining.pop(0)
        if _sustains(measure, rate, steps):
            sustained = rate
            if doubling and not remaining and rate < ceiling:
                remaining.append(min(2 * rate, ceiling))
        else:
            saturated = rate
    while sustained and saturated and saturated / sustained > PRECISION:
        middle = math.sqrt(sustained * saturated)
        if _sustains(measure, middle, steps):
            sustained = middle
        else:
            saturated = middle
    return steps, Knee(sustained=sustained, saturated=saturated, words=_words(sustained, saturated, remaining, steps))


def _sustains(measure: Callable[[float], LoadStep], rate: float, steps: list[LoadStep]) -> bool:
    for _ in range(ATTEMPTS):
        steps.append(measure(rate))
        if steps[-1].sustained:
            return True
    return False


def _words(sustained: float | None, saturated: float | None, skipped: Sequence[float], steps: list[LoadStep]) -> str:
    if saturated is None:
        return f"Not saturated at {sustained:.4g} requests/s, the highest rate tried: the knee is above."
    limited = any(step.generator.limited for step in steps if step.set_rate == saturated)
    doubt = " The generator was the bottleneck at the latter, so the service may sustain more." if limited else ""
    left_out = f" Not measured: {', '.join(f'{rate:g}' for rate in skipped)}." if skipped else ""
    failed = f"{saturated:.4g} requests/s were not (tried {ATTEMPTS} times)."
    if sustained is None:
        return f"Saturated at the lowest rate: {failed}{doubt}{left_out}"
    return f"The knee: {sustained:.4g} requests/s were sustained, {failed}{doubt}{left_out}"
