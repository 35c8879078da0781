"""The names of attacks by gradients, as on the command line."""

from __future__ import annotations

import re

from mithridate.attacks.white_box.pgd import PGD
from mithridate.errors import OptionError
from mithridate.types import Epsilon

_PUBLISHED_STEPS = {10: 0.01, 30: 0.005, 100: 0.001}
"""RMC's own attacks at epsilon 16/255 (authors' code): steps to step size. Scaled with epsilon."""

_PUBLISHED_EPSILON = 16 / 255
_MAX_STEPS = 10_000


def parse_pgd(name: str, *, epsilon: Epsilon) -> PGD:
    """``pgdN`` with N steps, or ``fgsm`` (one step, no random start).

    The three published step counts keep their published step size, scaled to ``epsilon``; others use
    2.5 * epsilon / steps (Madry et al.). Raises OptionError for another name.
    """
    if name == "fgsm":
        return PGD(epsilon=epsilon, steps=1, step_size=epsilon.value, random_start=False)
    match = re.fullmatch(r"pgd([1-9][0-9]{0,4})", name)
    steps = int(match.group(1)) if match else 0
    if not 1 <= steps <= _MAX_STEPS:
        raise OptionError(f"unknown attack {name!r}; allowed: fgsm, or pgdN with N from 1 to {_MAX_STEPS}, as in pgd20")
    if steps in _PUBLISHED_STEPS:
        return PGD(
            epsilon=epsilon,
            steps=steps,
            step_size=_PUBLISHED_STEPS[steps] * epsilon.value / _PUBLISHED_EPSILON,
        )
    return PGD(epsilon=epsilon, steps=steps, step_size=2.5 * epsilon.value / steps)


parse_attack = parse_pgd
