"""How hard an evaluation tries, and by how much less where a defence is too slow for that."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace

import torch

from mithridate.attacks.adaptive.simulation import shown
from mithridate.defenses.base import Budget, Defence
from mithridate.errors import OptionError
from mithridate.types import Pixels, to_images

_TIMED = 16
"""Images that an answer and a gradient are timed on."""

_TURNS = 11
"""For a latency factor."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """``rounds`` of ``steps`` for FPA and GMSA (and twice the steps for lock-step and hijack), ``least_rounds`` of
    GMSA-MIN, whose rounds grow with the models (as many unless given), ``queries`` an image for black-box attacks,
    ``repeats`` answers of a random defence for its score, ``checks`` (at least half as many) before an attacker
    believes that one is misread, ``probed`` images for the gates, ``curve`` images for accuracy against epsilon.
    ``seconds`` is what one attack on one defence may take; what would take longer is made smaller, and the report says
    so.
    """

    rounds: int = 10
    least_rounds: int | None = None
    steps: int = 40
    queries: int = 1000
    repeats: int = 20
    checks: int = 3
    probed: int = 50
    curve: int = 50
    seconds: float = 1200.0

    def __post_init__(self) -> None:
        limits = {"rounds": (1, 1000), "steps": (10, 10_000), "queries": (1, 1_000_000), "repeats": (1, 1000)}
        limits |= {"checks": (1, 100), "probed": (5, 100_000), "curve": (0, 100_000)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise OptionError(f"{name} {getattr(self, name)} is out of range; allowed: {low} to {high}")
        if not 0 < self.seconds < math.inf:
            raise OptionError(f"minutes {self.seconds / 60:g} is out of range; allowed: above 0, and finite")

    def in_numbers(self) -> dict[str, float]:
        """What a verdict rests on, as its card says it."""
        counts = {"rounds": self.rounds, "steps": self.steps, "queries": self.queries, "repeats": self.repeats}
        return {**counts, "gate_images": self.probed, "minutes": round(self.seconds / 60, 3)}

    def exceeds(self, other: Effort) -> bool:
        """Whether ``other`` attacks less hard."""
        rounds = min(other.rounds, other.least_rounds or other.rounds)
        return rounds < self.rounds or other.steps < self.steps or other.queries < self.queries


LEAST = Effort(rounds=4, steps=20, queries=200, probed=30)
"""No gain is declared on less. It does not make a gain sure: that is for the gates, and for whoever attacks harder."""


def too_weak(effort: Effort, suite: str) -> tuple[str, ...]:
    """Why attacks of ``effort`` are no ground for a gain; empty where they are."""
    found = [] if suite != "standard" else ["the standard suite has no attack that knows the defence"]
    taken, least = effort.rounds * effort.steps, LEAST.rounds * LEAST.steps
    if taken < least or effort.steps < LEAST.steps:
        found.append(f"{effort.rounds} rounds of {effort.steps} steps, at least {LEAST.rounds} of {LEAST.steps}")
    if effort.queries < LEAST.queries:
        found.append(f"{effort.queries} queries an image, at least {LEAST.queries}")
    if effort.probed < LEAST.probed:
        found.append(f"gates probed on {effort.probed} images, at least {LEAST.probed}")
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds an image: of an ``answer``, and of one gradient ``step`` through the surrogate."""

    answer: float
    step: float

    def fit(
        self, effort: Effort, images: int, *, asked: int | None = None, adapts: bool = True
    ) -> tuple[Effort, tuple[str, ...]]:
        """The effort that ``images`` still standing allow, and what had to be made smaller. Black-box attacks begin
        anew, with all images that they are ``asked`` about (unless given, those that stand). GMSA is another attack
        than FPA only where the defence ``adapts``."""
        wanted = (effort.rounds + 1) * (effort.steps * self.step + 2 * self.answer) * images
        notes, fitted = [], effort
        if wanted > effort.seconds:
            share = math.sqrt(effort.seconds / wanted)
            rounds, steps = max(2, round(effort.rounds * share)), max(10, round(effort.steps * share))
            fitted = replace(fitted, rounds=min(rounds, effort.rounds), steps=min(steps, effort.steps))
        if (fitted.rounds, fitted.steps) != (effort.rounds, effort.steps):
            notes.append(f"{fitted.rounds} rounds of {fitted.steps} steps instead of {effort.rounds} of {effort.steps}")
        growing = fitted.steps * self.step * images
        most = max(2, math.floor(math.sqrt(2 * effort.seconds / growing + 0.25) - 1.5)) if growing else fitted.rounds
        if adapts and most < fitted.rounds:
            fitted = replace(fitted, least_rounds=most)
            notes.append(f"{most} rounds of gmsa-min instead of {effort.rounds}")
        asking = effort.queries * self.answer * (images if asked is None else asked)
        if asking > effort.seconds:
            queries = max(20, round(effort.queries * effort.seconds / asking))
            fitted = replace(fitted, queries=min(queries, effort.queries))
        if fitted.queries != effort.queries:
            notes.append(f"{fitted.queries} queries an image instead of {effort.queries}")
        probing = 40 * 14 * self.step * effort.probed
        if probing > 2 * effort.seconds:
            probed = max(10, round(effort.probed * 2 * effort.seconds / probing))
            fitted = replace(fitted, probed=min(probed, effort.probed))
        if fitted.probed != effort.probed:
            notes.append(f"gates probed on {fitted.probed} images instead of {effort.probed}")
        return fitted, tuple(notes)


def pace_of(defence: Defence, pixels: Pixels, *, seed: int) -> Pace:
    """Times one answer and one gradient for a few of ``pixels`` uint8 ``[N, C, H, W]``, the second time each."""
    few, generator = to_images(pixels[:_TIMED]), torch.Generator().manual_seed(seed)
    answer = step = 0.0
    for _ in range(2):
        started = time.perf_counter()
        defence.predict(few, generator=generator, budget=Budget())
        answer, started = time.perf_counter() - started, time.perf_counter()
        point = few.clone().requires_grad_()
        shown(defence, point, generator=generator).logsumexp(1).sum().backward()
        step = time.perf_counter() - started
    return Pace(answer=answer / len(few), step=step / len(few))


def latency_factor(defence: Defence, base: Defence, pixels: Pixels, *, seed: int) -> float:
    """Time of an answer over the base model's: medians of both asked in turn, for the first of ``pixels`` (repeated
    where they are few), so that whatever else the machine does meets both."""
    if defence is base:
        return 1.0
    few = to_images(pixels[torch.arange(_TIMED) % len(pixels)])
    generator, seconds = torch.Generator().manual_seed(seed), (list[float](), list[float]())
    for turn in range(_TURNS + 1):
        for asked, taken in zip((defence, base), seconds, strict=True):
            started = time.perf_counter()
            asked.predict(few, generator=generator, budget=Budget())
            if turn:  # the first warms up
                taken.append(time.perf_counter() - started)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])
