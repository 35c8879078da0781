"""What may be said of a defence: one word, and the sentences that it rests on. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mithridate.evaluation.findings import Gate, Paired, Ruling, Share
from mithridate.evaluation.paired import SIGNIFICANCE, compare, is_gain, is_harm

POINT = 0.01
"""How far below its base a defence may be before the card says so, whatever the interval."""

BELOW_BASE = "below its base by more than a point"
"""In a reason: what a card and ``serve`` look for is ``Verdict.below_base``."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``clean_cost`` and ``gain``: defence minus base on clean images and in the worst case; None for the base itself.

    ``below_base``: in the worst case more than a point below the base, by the paired difference itself. An interval
    that includes zero does not excuse it: what is served must not be worse, so the doubt counts against it.
    """

    ruling: Ruling
    reasons: tuple[str, ...]
    clean_cost: Paired | None
    gain: Paired | None
    below_base: bool


def rule(
    name: str,
    *,
    clean: Sequence[bool],
    worst: Sequence[bool],
    base_clean: Sequence[bool],
    base_worst: Sequence[bool],
    gates: Sequence[Gate],
    seed: int,
    base_gates: Sequence[Gate] = (),
    is_base: bool | None = None,
    weak: Sequence[str] = (),
) -> Verdict:
    """The ruling on one defence, from per-image lists over the same images.

    ``gain`` only where the paired interval over the base lies above zero, McNemar's exact p agrees and no gate of the
    defence failed; ``harmful`` where the interval lies below zero, gates or not; ``not trustworthy`` where a gate
    failed; else ``no evidence of gain``. ``is_base``: unless given, the defence called ``none`` is. ``weak``: why it
    was not attacked hard enough for a ``gain``: by too little (``effort.too_weak``), or, being slow, by less than was
    asked for.
    """
    failed = _failed(gates)
    if name == "none" if is_base is None else is_base:
        about = [f"Stands on {_share(worst)} in the worst case, on {_share(clean)} clean.", *failed]
        return Verdict(ruling="base", reasons=tuple(about), clean_cost=None, gain=None, below_base=False)
    gain, cost = compare(worst, base_worst, seed=seed), compare(clean, base_clean, seed=seed + 1)
    below = gain.difference < -POINT
    ruling: Ruling = "no evidence of gain"
    if is_harm(gain):
        ruling = "harmful"
    elif failed:
        ruling = "not trustworthy"
    elif is_gain(gain) and not weak:
        ruling = "gain"
    reasons = [
        f"Worst case: {_share(worst)}; its base {_share(base_worst)}.",
        f"Paired difference: {describe(gain)}.",
        _what_follows(gain),
        f"Clean: {_share(clean)}; its base {_share(base_clean)}; paired difference {describe(cost)}.",
        *failed,
    ]
    if is_gain(gain) and weak:
        reasons.append(f"It was not attacked hard enough for a gain ({'; '.join(weak)}): that is no evidence.")
    if below:
        reasons.insert(3, f"In the worst case {BELOW_BASE} ({100 * gain.difference:+.1f} points, paired).")
    if _failed(base_gates):
        missed = ", ".join(gate.id for gate in base_gates if gate.passed is False)
        reasons.append(f"The base failed {missed}: its own worst case may be lower than stated.")
    return Verdict(ruling=ruling, reasons=tuple(reasons), clean_cost=cost, gain=gain, below_base=below)


def describe(paired: Paired) -> str:
    """As in ``-0.5 points (95 % interval -1.6 to +0.6; 3 images gained, 4 lost of 200; McNemar p = 1)``."""
    low, high = (100 * end for end in paired.interval)
    return (
        f"{100 * paired.difference:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}; {paired.gained} images "
        f"gained, {paired.lost} lost of {paired.n}; McNemar p = {paired.p:.2g})"
    )


def _what_follows(gain: Paired) -> str:
    if is_harm(gain):
        return "The interval lies below zero: the defence takes away what its base had."
    if is_gain(gain):
        return "The interval lies above zero."
    if gain.interval[0] > 0:
        return (
            f"The interval lies above zero, but only {gain.gained + gain.lost} images decide it: "
            f"p = {gain.p:.2g} is above {SIGNIFICANCE}, so it is no evidence."
        )
    return "The interval includes zero: a gain is not shown."


def _failed(gates: Sequence[Gate]) -> list[str]:
    return [f"{gate.id} failed, {gate.name}: {gate.evidence}" for gate in gates if gate.passed is False]


def _share(right: Sequence[bool]) -> str:
    share = Share(right=sum(right), n=len(right))
    low, high = share.interval
    return f"{100 * share.value:.1f} % of {share.n} images (95 % {100 * low:.1f} to {100 * high:.1f})"
