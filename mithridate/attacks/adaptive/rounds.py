"""FPA, GMSA and lock-step BPDA: attacks that run the defence, hold what it became, and ascend that.

Chen, Liang, Jha et al.: Towards Evaluating the Robustness of Neural Networks Learned by Transduction (ICLR 2022),
sections 5.1 and 5.2 (fixed point attack, greedy model space attack); Athalye et al. 2018 for BPDA. Four differences,
each in the attacker's favour: the loss is a margin that stops growing (``loss=ce`` is theirs); where no round succeeds
the most promising point is sent (theirs: the clean image); a round begins where the last one ended; and where a guard
may answer with the base model instead, the base model is attacked together with the adapted one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mithridate.attacks.adaptive.simulation import Found, Judge, Simulation, begin, random_start
from mithridate.attacks.losses import LOSSES
from mithridate.types import Epsilon, Images, Labels, Logits, Pixels, to_images, to_pixels

Loss = Literal["ce", "margin"]
Objective = Callable[[Images], torch.Tensor]
"""Images ``[N, C, H, W]`` to what is to become large, ``[N]``."""


CONFIDENCE = 3.0
"""The lead of a wrong class, in logits, beyond which the margin loss pushes no further. An image that is just over the
border is nearest to exemplars that say little about it, and a model that is fooled already does not drown the others.
Of 32 images on a normally trained base, FPA without it left 72 % standing, with it none (5 rounds of 20 steps)."""


def losses(logits: Logits, labels: Labels, loss: Loss, *, confidence: float = torch.inf) -> torch.Tensor:
    """``[N, M]`` of ``[N, M, C]``: cross-entropy, or by how much the strongest other class leads, up to
    ``confidence``."""
    targets = labels.repeat_interleave(logits.shape[1])
    found = LOSSES[loss](logits.flatten(0, 1), targets).view(logits.shape[:2])
    return found.clamp_max(confidence) if loss == "margin" else found


def in_parts(steps: int, every: int) -> list[int]:
    """``steps`` in parts of ``every``, the last one shorter where it does not go into them.

    >>> in_parts(25, 10)
    [10, 10, 5]
    """
    return [min(every, steps - start) for start in range(0, steps, every)]


def ascend(
    objective: Objective, clean: Pixels, start: Images, *, epsilon: Epsilon, steps: int, step_size: float
) -> tuple[Images, Pixels]:
    """Signed steps in the ball around ``clean``, the network seeing 8-bit images: where it ended, in real numbers, and
    the 8-bit point of the highest objective on the way."""
    centre = to_images(clean)
    low, high = (centre - epsilon.value).clamp_min(0), (centre + epsilon.value).clamp_max(1)
    point, best = start.clamp(low, high), to_pixels(start.clamp(low, high))
    height = torch.full((len(clean),), -torch.inf, dtype=torch.float64, device=clean.device)
    for step in range(steps + 1):
        seen = to_images(to_pixels(point)).requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            values = objective(seen)
        better = values.detach().double() > height
        height = torch.where(better, values.detach().double(), height)
        best[better] = to_pixels(seen.detach()[better])
        if step < steps:
            (gradient,) = torch.autograd.grad(values.sum(), seen)
            point = torch.clamp(point + step_size * gradient.sign(), low, high)  # the sign of NaN is 0
    return point, best


@dataclass(frozen=True, kw_only=True)
class FPA:
    """Fixed point attack: ``rounds`` of ``steps`` against what the defence became for the last round's end."""

    epsilon: Epsilon
    rounds: int = 10
    steps: int = 40
    step_size: float = 1 / 255
    loss: Loss = "margin"
    confidence: float = CONFIDENCE
    rows: int = 64

    @property
    def name(self) -> str:
        return "fpa"

    @property
    def gradient_steps(self) -> int:
        return (1 + self.rounds) * self.steps

    def run(
        self,
        simulation: Simulation,
        pixels: Pixels,
        labels: Labels,
        *,
        generator: torch.Generator,
        candidates: Sequence[Pixels] = (),
    ) -> Found:
        plan = _Plan(attack=self, keep=1, reduce="avg", widen=False)
        return _in_rounds(plan, simulation, pixels, labels, generator, candidates)


@dataclass(frozen=True, kw_only=True)
class GMSA:
    """Greedy model space attack: each round ascends the mean (``avg``) or the least (``min``) loss of the base model
    and everything that it became in the rounds before. ``min`` takes ``steps`` for every model, as published."""

    epsilon: Epsilon
    reduce: Literal["avg", "min"]
    rounds: int = 10
    steps: int = 40
    step_size: float = 1 / 255
    loss: Loss = "margin"
    confidence: float = CONFIDENCE
    rows: int = 64

    @property
    def name(self) -> str:
        return f"gmsa-{self.reduce}"

    @property
    def gradient_steps(self) -> int:
        models = sum(range(1, self.rounds + 2)) if self.reduce == "min" else self.rounds + 1
        return models * self.steps

    def run(
        self,
        simulation: Simulation,
        pixels: Pixels,
        labels: Labels,
        *,
        generator: torch.Generator,
        candidates: Sequence[Pixels] = (),
    ) -> Found:
        plan = _Plan(attack=self, keep=None, reduce=self.reduce, widen=self.reduce == "min")
        return _in_rounds(plan, simulation, pixels, labels, generator, candidates)


@dataclass(frozen=True, kw_only=True)
class LockStep:
    """BPDA in lock step: the defence is run again every ``every`` steps, and its weights are constants in between."""

    epsilon: Epsilon
    steps: int = 100
    every: int = 5
    step_size: float = 1 / 255
    loss: Loss = "margin"
    confidence: float = CONFIDENCE
    rows: int = 64

    @property
    def name(self) -> str:
        return "lock-step"

    @property
    def gradient_steps(self) -> int:
        return self.steps

    def run(
        self,
        simulation: Simulation,
        pixels: Pixels,
        labels: Labels,
        *,
        generator: torch.Generator,
        candidates: Sequence[Pixels] = (),
    ) -> Found:
        plan = _Plan(attack=self, keep=1, reduce="avg", widen=False, base_round=False)
        return _in_rounds(plan, simulation, pixels, labels, generator, candidates)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What an attack's rounds are: ``keep`` so many held models (None: all), ``reduce`` their losses, ``widen`` the
    steps with their number, a first round on the base model alone or not."""

    attack: FPA | GMSA | LockStep
    keep: int | None
    reduce: Literal["avg", "min"]
    widen: bool
    base_round: bool = True

    @property
    def steps(self) -> list[int]:
        """Of each round, per model where they widen."""
        if isinstance(self.attack, LockStep):
            return in_parts(self.attack.steps, self.attack.every)
        return [self.attack.steps] * (self.attack.rounds + 1)


def _in_rounds(
    plan: _Plan,
    simulation: Simulation,
    pixels: Pixels,
    labels: Labels,
    generator: torch.Generator,
    candidates: Sequence[Pixels],
) -> Found:
    judge = begin(simulation, pixels, labels, generator, candidates)
    starts = random_start(pixels, plan.attack.epsilon, generator)
    looks = [judge.standing.clone() for _ in plan.steps]
    for rows in judge.groups(plan.attack.rows):  # one group to the end: what is held of all would fill the memory
        group = _Group(plan, simulation, judge, rows, generator)
        for number, look in enumerate(looks):
            group.advance(number, pixels, labels, starts)
            look[rows] = judge.standing[rows]
    for look in looks:
        judge.remember(look)
    return judge.found()


class _Group:
    """Some images, and what the defence became for them so far."""

    def __init__(
        self, plan: _Plan, simulation: Simulation, judge: Judge, rows: torch.Tensor, generator: torch.Generator
    ) -> None:
        self._plan, self._simulation, self._judge, self._generator = plan, simulation, judge, generator
        self._rows, self._held = rows, list[Any]()

    def advance(self, number: int, pixels: Pixels, labels: Labels, points: Images) -> None:
        """One round: adapts to where the images are now, ascends, and looks at where they came to, but for images that
        fell in an earlier round: what was found for those stays."""
        plan, rows, attack = self._plan, self._rows, self._plan.attack
        if not bool(self._judge.standing[rows].any()):
            return
        if number or not plan.base_round:
            self._held.append(self._simulation.hold(to_pixels(points[rows]), generator=self._generator))
            self._held = self._held[-plan.keep :] if plan.keep else self._held
        held = [models for models in self._held if models is not None]

        def objective(images: Images) -> torch.Tensor:
            logits = self._simulation.logits(images, held, generator=self._generator)
            each = losses(logits, labels[rows], attack.loss, confidence=attack.confidence)  # [R, 1 + M]
            if plan.keep and held and not self._simulation.answers_as_base:
                each = each[:, 1:]
            return each.mean(1) if plan.reduce == "avg" else each.amin(1)

        steps = plan.steps[number] * (1 + len(held) if plan.widen else 1)
        end, best = ascend(
            objective, pixels[rows], points[rows], epsilon=attack.epsilon, steps=steps, step_size=attack.step_size
        )
        points[rows] = end
        for found in (to_pixels(end), best):
            standing = self._judge.standing[rows]
            self._judge.look(rows[standing], found[standing])
