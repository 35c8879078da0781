"""Defences that answer with many random passes: SAP, random resizing, pixel deflection, the vote of a region.

What a pass is belongs to each of them; that every pass draws for itself, that memory is bounded, and that a budget is
looked at between runs, is written here once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from mithridate.defenses.base import (
    Batch,
    Budget,
    Outcome,
    PhaseClock,
    Prediction,
    Request,
    Resources,
    answer_one,
    draw_seed,
    gather,
)
from mithridate.defenses.none import base_pass
from mithridate.defenses.options import canonical
from mithridate.defenses.randomness import pass_generators
from mithridate.errors import BudgetExceededError
from mithridate.types import Images, Logits, Scores

_BYTES_AT_A_TIME = 256 * 2**20
"""What one run of several passes may take, roughly."""

_IMAGES_AT_A_TIME = 64

_COPIES = 40
"""Of an image: what a network holds of it at a time, roughly."""

Run = Callable[[Sequence[torch.Generator], int], Logits]
"""``run(generators, copies) -> logits [N * copies, C]``, the copies of an image side by side; row i draws from
``generators[i]`` alone.
"""


class Sampler(Protocol):
    """One way to make a pass random."""

    @property
    def bytes_a_row(self) -> int:
        """What one pass of one image takes, roughly."""
        ...

    def begin(self, images: Images) -> Run:
        """For ``[N, C, H, W]``; what all passes share is done once."""
        ...

    def begin_attack(self, images: Images) -> Run:
        """The same values, differentiable in ``images`` along the path that suits an attacker best."""
        ...


def bytes_of_a_pass(resources: Resources) -> int:
    """What the whole network takes for one image, roughly."""
    return _COPIES * 4 * int(torch.Size(resources.classifier.spec.image_shape).numel())


class PassConfig(Protocol):
    """The options that all of them have."""

    @property
    def passes(self) -> int: ...
    @property
    def attack_passes(self) -> int: ...


def sampled(
    family: str,
    resources: Resources,
    config: PassConfig,
    sampler: Sampler,
    reduce: Literal["softmax", "vote"] = "softmax",
) -> Sampled:
    """The defence called ``family``, whose options are ``config``."""
    return Sampled(
        name=canonical(family, config, type(config)()),
        resources=resources,
        sampler=sampler,
        passes=config.passes,
        attack_passes=config.attack_passes,
        reduce=reduce,
    )


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Answers with the mean of ``passes`` (softmax, or one vote each); attackers are given ``attack_passes`` of them,
    with fresh draws at every call."""

    name: str
    resources: Resources
    sampler: Sampler
    passes: int
    attack_passes: int
    reduce: Literal["softmax", "vote"] = "softmax"

    @property
    def batches(self) -> bool:
        """One image's passes fill a batch by themselves."""
        return self.passes == 1

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        return answer_one(self.predict_together, images, generator, budget)

    @torch.no_grad()
    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        """One after the other. Looks at the budget between runs."""
        outcomes: list[Outcome] = []
        for request in requests:
            try:
                request.budget.check()
                outcomes.append(self._answer(gather([request], self.resources.classifier.device), request.budget))
            except BudgetExceededError as error:
                outcomes.append(error)
        return outcomes

    def _answer(self, batch: Batch, budget: Budget) -> Prediction:
        classifier = self.resources.classifier
        clock = PhaseClock(classifier.device)
        with clock.phase("embed"):
            base = base_pass(classifier, batch.images).logits.softmax(1).float().cpu()
        with clock.phase("predict"):
            scores = self._mean_scores(batch, budget).float().cpu()
        nothing = (None,) * len(batch.images)
        return Prediction(
            scores=scores, base_scores=base, adaptations=nothing, neighborhoods=nothing, seconds=clock.seconds
        )

    def _mean_scores(self, batch: Batch, budget: Budget) -> Scores:
        """float64 ``[N, C]``. Raises BudgetExceededError where the budget ends."""
        count = min(_IMAGES_AT_A_TIME, self._rows_at_a_time())
        parts = [
            self._mean(batch.images[start : start + count], batch.seeds[start : start + count], budget)
            for start in range(0, len(batch.images), count)
        ]
        return torch.cat(parts)

    def _mean(self, images: Images, seeds: Sequence[int], budget: Budget) -> Scores:
        run, done, total = self.sampler.begin(images), 0, torch.zeros(())
        while done < self.passes:
            budget.check()
            copies = min(max(1, self._rows_at_a_time() // len(images)), self.passes - done)
            logits = run(pass_generators(seeds, images, range(done, done + copies)), copies)
            total = total.to(logits.device) + self._opinions(logits).view(len(images), copies, -1).sum(1)
            done += copies
        return total / self.passes

    def _opinions(self, logits: Logits) -> Scores:
        if self.reduce == "softmax":
            return logits.double().softmax(1)
        return torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).double()

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        """log of the mean softmax of ``attack_passes``: a vote has no slope, and the mean leads where it will go."""
        budget.check()
        generators = pass_generators([draw_seed(generator)] * len(images), images, range(self.attack_passes))
        logits = self.sampler.begin_attack(images)(generators, self.attack_passes)
        each = logits.double().log_softmax(1).view(len(images), self.attack_passes, -1)
        return each.logsumexp(1)

    def _rows_at_a_time(self) -> int:
        return max(1, _BYTES_AT_A_TIME // self.sampler.bytes_a_row)
