"""The names of attacks by gradients, as on the command line."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import cast

from mithridate.attacks.balls import Norm
from mithridate.attacks.losses import LossName
from mithridate.attacks.white_box.apgd import APGD, APGDLoss
from mithridate.attacks.white_box.pgd import PGD
from mithridate.errors import OptionError
from mithridate.types import Epsilon

_PUBLISHED_STEPS = {10: 0.01, 30: 0.005, 100: 0.001}
"""RMC's own attacks at epsilon 16/255 (authors' code): steps to step size. Scaled with epsilon."""

_PUBLISHED_EPSILON = 16 / 255
_MAX_STEPS = 10_000

_COUNT = r"(?P<steps>[1-9][0-9]{0,4})(?:x(?P<restarts>[1-9][0-9]{0,2}))?"
_PGD = re.compile(rf"(?:fgsm|pgd{_COUNT})(?:-(?P<loss>margin|dlr))?(?P<l2>-l2)?")
_APGD = re.compile(rf"apgd-(?P<loss>ce|margin|dlr|t)(?:{_COUNT})?(?P<l2>-l2)?")

_PLAIN = f"fgsm, or pgdN with N from 1 to {_MAX_STEPS}, as in pgd20"

_ALLOWED = (
    f"{_PLAIN}, pgdNxR with R restarts, each with -margin or -dlr for another loss; apgd-ce, apgd-margin, apgd-dlr or "
    "apgd-t, with N or NxR for other than 100 steps, as in apgd-t50x2; -l2 at the end of all for that norm"
)


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
        raise OptionError(f"unknown attack {name!r}; allowed: {_PLAIN}")
    if steps in _PUBLISHED_STEPS:
        return PGD(
            epsilon=epsilon,
            steps=steps,
            step_size=_PUBLISHED_STEPS[steps] * epsilon.value / _PUBLISHED_EPSILON,
        )
    return PGD(epsilon=epsilon, steps=steps, step_size=2.5 * epsilon.value / steps)


def parse_attack(name: str, *, epsilon: Epsilon) -> PGD | APGD:
    """What ``parse_pgd`` knows, and besides APGD, other losses, restarts and the L2 ball.

    - ``pgd20``, ``fgsm``, ``pgd20x5`` (5 restarts), ``pgd20-margin``, ``fgsm-dlr``, ``pgd20x5-dlr-l2``
    - ``apgd-ce``, ``apgd-margin``, ``apgd-dlr`` and ``apgd-t`` (100 steps), ``apgd-ce50``, ``apgd-t50x3-l2``

    ``-l2``: ``epsilon`` is the L2 length of the change, as large as that number; PGD's step is 2.5 * epsilon / steps.
    Raises OptionError for another name.
    """
    match = _PGD.fullmatch(name) or _APGD.fullmatch(name)
    if match is None or int(match["steps"] or 1) > _MAX_STEPS:
        raise OptionError(f"unknown attack {name!r}; allowed: {_ALLOWED}")
    norm: Norm = "l2" if match["l2"] else "linf"
    restarts = int(match["restarts"] or 1)
    if match.re is _APGD:
        steps, of = int(match["steps"] or 100), cast(APGDLoss, match["loss"])
        return APGD(epsilon=epsilon, steps=steps, loss=of, restarts=restarts, norm=norm)
    pgd = parse_pgd(f"pgd{match['steps']}" if match["steps"] else "fgsm", epsilon=epsilon)
    step_size = pgd.step_size if norm == "linf" or not pgd.random_start else 2.5 * epsilon.value / pgd.steps
    return replace(pgd, step_size=step_size, restarts=restarts, loss=cast(LossName, match["loss"] or "ce"), norm=norm)
