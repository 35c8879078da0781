"""The lab's attack as the engine sees it: one more defence, with the same deadline and the same cancelling between two
steps. It is given the image twice, and answers for it as it was and for what the attack made of it.

Nothing of the web is needed for that, and an engine process loads nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from mithridate.attacks import PGD
from mithridate.defenses import Budget, Defence, Outcome, Prediction, Resources
from mithridate.defenses import Request as Asked
from mithridate.defenses.base import PhaseClock, answer_one
from mithridate.errors import BudgetExceededError
from mithridate.types import Epsilon, Images, Logits, to_images, to_pixels
from service.loading import Loaded

AttackName = Literal["static", "adaptive"]
STEPS = 20
PREFIX = "lab:"
_CHECKS = 3
"""Calls of a surrogate that may be random, which a point has to fool on the way."""


@dataclass(frozen=True, kw_only=True)
class LabDefence:
    """An attack in a defence's clothes: of two images, which should be the same, the second is replaced by what the
    attack makes of the first, and ``inner`` answers for both. ``label`` None: the base model's answer is attacked."""

    inner: Defence
    attack: AttackName
    epsilon: Epsilon
    label: int | None = None

    batches = False
    divides = False
    """Its two images are one question: there is nothing to halve."""

    @property
    def name(self) -> str:
        """Says all about it: ``read_lab`` makes the same one from it, in whichever process the bundle is loaded."""
        label = "" if self.label is None else self.label
        return f"{PREFIX}{self.attack},{self.epsilon.levels},{label},{self.inner.name}"

    @property
    def resources(self) -> Resources:
        return self.inner.resources

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        return answer_one(self.predict_together, images, generator, budget)

    def predict_together(self, requests: Sequence[Asked]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for request in requests:
            try:
                outcomes.append(self._answer(request))
            except BudgetExceededError as error:
                outcomes.append(error)
        return outcomes

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        return self.inner.surrogate(images, generator=generator, budget=budget)

    def _answer(self, request: Asked) -> Prediction:
        clock = PhaseClock(self.resources.classifier.device)
        with clock.phase("attack"):
            found = self._attack(request)
        both = torch.cat([request.images[:1].cpu(), to_images(found)])  # [2, C, H, W]
        # The generator has moved on: the answer does not repeat the draws that the attack has seen.
        answer = self.inner.predict(both, generator=request.generator, budget=request.budget)
        return replace(answer, pixels=to_pixels(both), seconds={**answer.seconds, **clock.seconds})

    def _attack(self, request: Asked) -> torch.Tensor:
        classifier, budget = self.resources.classifier, request.budget
        adaptive = self.attack == "adaptive"

        def forward(images: Images) -> Logits:
            budget.check()
            moved = images.to(classifier.device)
            if not adaptive:
                base: Logits = classifier(moved)
                return base.to(images.device)
            return self.inner.surrogate(moved, generator=request.generator, budget=budget).to(images.device)

        clean = request.images[:1].cpu()
        with torch.no_grad():
            label = classifier(clean.to(classifier.device)).argmax(1).cpu()
        if self.label is not None:
            label = torch.tensor([self.label])
        pgd = PGD(
            epsilon=self.epsilon,
            steps=STEPS,
            step_size=2.5 * self.epsilon.value / STEPS,
            loss="margin",
            checks=_CHECKS if adaptive else 1,
        )
        return pgd.run(forward, to_pixels(clean), label, generator=request.generator)


def read_lab(name: str, loaded: Loaded[Any]) -> LabDefence | None:
    """The one of that ``name``, for an engine that was given nothing else; None where it is not the lab's."""
    if not name.startswith(PREFIX):
        return None
    attack, levels, label, inner = name.removeprefix(PREFIX).split(",", 3)
    return LabDefence(
        inner=loaded.defences[inner],
        attack="adaptive" if attack == "adaptive" else "static",
        epsilon=Epsilon(int(levels)),
        label=int(label) if label else None,
    )
