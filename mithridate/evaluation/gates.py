"""Checks of the evaluation itself: decisions on what was measured. Without torch.

An attack that fails says nothing unless it is known to work. Each function here takes counts or per-image lists and
gives a Gate; ``probes`` measures them, ``trust`` runs both. A gate that fails does not say that the defence is bad. It
says that the numbers beside it are no evidence that it is good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from mithridate.evaluation.findings import Gate
from mithridate.evaluation.paired import SIGNIFICANCE, mcnemar
from mithridate.evaluation.statistics import wilson_interval

MOVES = 0.01
"""Of the images, at most, that twice the steps, restarts or draws may find (Carlini et al. 2019, section 5.1)."""

ONLY_SINGLE_STEP = 0.005
"""Of the images, at most, that one step finds and many do not (Athalye et al. 2018, section 3.1, say none)."""

ONLY_BLACK_BOX = 0.002
"""Of the images, at most, that only a black-box attack finds (the warning of AutoAttack's checks.py: 0.2 points)."""

DEAD_GRADIENTS = 0.05
"""Of the gradients, at most, that may be zero or not finite. Ours; a working path has none."""

STILL_RISING = 0.05
"""Of all that an attack gained in loss, at most, in its last tenth (Pintor et al. 2022, incomplete optimisation)."""

ONLY_SURROGATE = 0.05
"""Of the images, at most, that fool the surrogate and not the defence. Ours (Pintor et al. 2022: transfer failure)."""

FEWEST = 5
"""Images still standing, below which there is no loss curve to speak of."""


def shown_above(count: int, n: int, tolerance: float) -> bool:
    """Whether the 95 % interval of ``count`` of ``n`` lies above ``tolerance``: at 1 % from 3 of 100, 18 of 1000."""
    return n > 0 and wilson_interval(count, n).low > tolerance


def more_than(count: int, n: int, tolerance: float) -> bool:
    """Whether ``count`` exceeds ``tolerance * n``, and one image: for what should never happen at all."""
    return count > max(1, tolerance * n)


def monotone(right: Mapping[int, Sequence[bool]], classes: int) -> Gate:
    """G1. ``right``: per image, by radius in levels; 255 is unbounded, and must leave no more than guessing would.

    Between neighbouring radii images may come back by a point, or by as many as a fair coin gives (McNemar).
    """
    radii, passed = sorted(right), True
    said = [f"{radius}/255: {_percent(sum(right[radius]), len(right[radius]))}" for radius in radii]
    for smaller, larger in pairwise(radii):
        back = sum(b and not a for a, b in zip(right[smaller], right[larger], strict=True))
        fell = sum(a and not b for a, b in zip(right[smaller], right[larger], strict=True))
        if more_than(back - fell, len(right[larger]), MOVES) and mcnemar(back, fell) <= SIGNIFICANCE:
            passed = False
            said.append(f"from {smaller}/255 to {larger}/255 {back} images come back and {fell} fall")
    n, left = len(right[radii[-1]]), sum(right[radii[-1]])
    if radii[-1] == 255 and left > n / classes:
        passed = False
        said.append(f"without a bound {left} of {n} images stand, guessing leaves {n / classes:.0f}")
    return _gate("G1", "accuracy falls with epsilon, to nothing without a bound", passed, said)


def doubling(found: Mapping[str, int], n: int) -> Gate:
    """G2. ``found``: images that twice the steps, restarts or draws break and nothing before them did."""
    said = [
        f"twice the {what}: {count} more of {n} images (95 % up to {100 * wilson_interval(count, n).high:.1f} %)"
        for what, count in found.items()
    ]
    passed = not any(shown_above(count, n, MOVES) for count in found.values())
    return _gate("G2", "twice the effort finds less than a point", passed, said)


def iterative(only_single: Sequence[int], n: int) -> Gate:
    """G3. ``only_single``: numbers of the images that one step breaks and many do not."""
    said = [f"{len(only_single)} of {n} images are broken by one step and not by many{_numbers(only_single)}"]
    return _gate("G3", "many steps beat one", not more_than(len(only_single), n, ONLY_SINGLE_STEP), said)


def black_box(only: Mapping[str, Sequence[int]], n: int) -> Gate:
    """G4. ``only``: by black-box attack, numbers of the images that no white-box attack broke."""
    if not only:
        return _gate("G4", _BLACK_BOX, None, ["no black-box attack was run"])
    every = sorted({image for images in only.values() for image in images})
    said = [f"{len(every)} of {n} images are broken by a black-box attack alone{_numbers(every)}"]
    said += [f"{attack}: {len(images)}" for attack, images in only.items() if images]
    return _gate("G4", _BLACK_BOX, not more_than(len(every), n, ONLY_BLACK_BOX), said)


_BLACK_BOX = "what sees answers alone finds nothing that gradients miss"


def weaker(pairs: Mapping[str, tuple[int, int]], n: int) -> Gate:
    """G5. ``pairs``: by transfer attack or noise, how many images it alone broke, and the adaptive attacks alone."""
    said, passed = [], True
    for attack, (alone, adaptive) in pairs.items():
        ahead = more_than(alone - adaptive, n, MOVES) and mcnemar(alone, adaptive) <= SIGNIFICANCE
        passed = passed and not ahead
        said.append(f"{attack} alone breaks {alone} of {n} images, the adaptive attacks alone {adaptive}")
    return _gate("G5", "transfer and noise do not beat the adaptive attacks", passed, said)


def gradients(zero: int, not_finite: int, n: int, cosine: float) -> Gate:
    """G6. Of ``n`` gradients of the cross-entropy; ``cosine``: mean between an image and a random point of its ball."""
    said = [
        f"{zero} of {n} gradients are zero, {not_finite} not finite",
        f"mean cosine between image and random point {cosine:.2f}",
    ]
    return _gate("G6", "there are gradients", zero + not_finite <= DEAD_GRADIENTS * n, said)


def converged(rises: Sequence[tuple[float, float]], silent: Mapping[str, int]) -> Gate:
    """G7. ``rises``: for each image that still stands, how far its loss rose in all and in the last tenth of the steps.
    ``silent``: by attack, images that were misread on its way and yet returned at a point that is not."""
    said = [f"{attack}: {count} images misread on the way, returned unbroken" for attack, count in silent.items()]
    passed = not silent
    if len(rises) < FEWEST:
        return _gate("G7", _CONVERGED, passed, [*said, f"{len(rises)} images still stand: no loss curve to judge"])
    whole, last = (sum(values) for values in zip(*rises, strict=True))
    if not whole > 0:
        return _gate("G7", _CONVERGED, False, [*said, f"on the {len(rises)} images that stand the loss never rose"])
    said.append(f"on the {len(rises)} that stand the last tenth of the steps brought {100 * last / whole:.1f} % of it")
    return _gate("G7", _CONVERGED, passed and last <= STILL_RISING * whole, said)


_CONVERGED = "the loss has converged, and the best point is returned"


def ball(outside: Mapping[str, str], checked: int) -> Gate:
    """G10. ``outside``: by attack, what is wrong with its images; ``checked`` attacks were looked at."""
    said = [f"{attack}: {what}" for attack, what in outside.items()]
    said = said or [f"{checked} attacks, every image uint8, of the right shape and within its radius"]
    return _gate("G10", "8-bit images within epsilon", not outside if checked else None, said)


def null_control(*, random: bool, tries: int, lucky: int, attacked: int, n: int) -> Gate:
    """G11. ``lucky``: of ``n`` images, how many clean ones are expected to be misread at least once in ``tries``
    answers; ``attacked``: how many were misread under one of as many attacks. Where asking again does as much, the
    attacks were none."""
    if not random:
        return _gate("G11", _NULL, None, ["the defence always answers the same"])
    said = [f"asked {tries} times, {lucky} of {n} clean images are misread at least once; attacked, {attacked}"]
    nothing = more_than(lucky, n, MOVES) and not wilson_interval(attacked, n).low > lucky / n
    everything = lucky >= n - max(1, MOVES * n)
    return _gate("G11", _NULL, not nothing or everything, said)


_NULL = "attacks find more than asking again does"


def repeatable(*, again: int, alone: int, n: int, asked_alone: int) -> Gate:
    """G12. How many of ``n`` clean answers differ with the same seed, and of ``asked_alone`` when asked alone."""
    said = [
        f"asked again with the same seed, {again} of {n} clean answers differ",
        f"asked alone, {alone} of {asked_alone}",
    ]
    return _gate("G12", "same image, same seed: same answer", again == 0 and alone == 0, said)


def surrogate(only_surrogate: Sequence[int], n: int) -> Gate:
    """G13. Numbers of the images that fool what the attackers are given, and not the defence."""
    said = [f"{len(only_surrogate)} of {n} images fool the surrogate and not the defence{_numbers(only_surrogate)}"]
    return _gate(
        "G13", "the surrogate speaks for the defence", not shown_above(len(only_surrogate), n, ONLY_SURROGATE), said
    )


def _gate(identifier: str, name: str, passed: bool | None, said: Sequence[str]) -> Gate:
    return Gate(id=identifier, name=name, passed=passed, evidence="; ".join(said))


def _percent(count: int, n: int) -> str:
    return f"{100 * count / max(n, 1):.1f} %"


def _numbers(images: Sequence[int]) -> str:
    """As in `` (numbers 3, 14, 15 and 2 more)``."""
    if not images:
        return ""
    more = f" and {len(images) - 10} more" if len(images) > 10 else ""
    return f" (numbers {', '.join(map(str, images[:10]))}{more})"
