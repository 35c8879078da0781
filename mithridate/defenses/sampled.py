"""Defences that answer with many random passes of the base model: SAP, PRM, random resizing, pixel deflection, the vote
of a region; and a transform before one that averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mithridate.defenses.averaging import Averaging, FirstStage, in_groups
from mithridate.defenses.base import (
    Batch,
    Budget,
    Outcome,
    PhaseClock,
    Prediction,
    Request,
    Resources,
    answer_one,
    answer_together,
    draw_seed,
    gather,
)
from mithridate.defenses.networks import BaseNetwork
from mithridate.defenses.none import base_pass
from mithridate.defenses.randomness import row_seeds
from mithridate.errors import BudgetExceededError
from mithridate.types import Images, Logits, Scores


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Answers with the mean that ``averaging`` takes, of images that went through ``first`` where there is one."""

    name: str
    resources: Resources
    averaging: Averaging
    first: FirstStage | None = None

    @property
    def batches(self) -> bool:
        """Whether requests gain by being answered together: many passes fill a batch by themselves."""
        return self.averaging.passes == 1

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        return answer_one(self.predict_together, images, generator, budget)

    @torch.no_grad()
    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        """Several at once where there is one pass; else one after the other, looking at the budget between runs."""
        device = self.resources.classifier.device
        if self.batches and len(requests) > 1:
            return answer_together(requests, device, lambda batch: self._answer(batch, Budget()))
        outcomes: list[Outcome] = []
        for request in requests:
            try:
                request.budget.check()
                outcomes.append(self._answer(gather([request], device), request.budget))
            except BudgetExceededError as error:
                outcomes.append(error)
        return outcomes

    def _answer(self, batch: Batch, budget: Budget) -> Prediction:
        classifier = self.resources.classifier
        clock = PhaseClock(classifier.device)
        with clock.phase("embed"):
            base = base_pass(classifier, batch.images)
            base_scores, embeddings = base.logits.softmax(1).float().cpu(), base.embedding.float().cpu()
        with clock.phase("predict"):
            rows = row_seeds(batch.seeds, batch.images)
            images = batch.images if self.first is None else self.first.apply(batch.images, rows, budget)
            scores = self._mean_scores(images, rows, budget).float().cpu()
        nothing = (None,) * len(batch.images)
        return Prediction(
            scores=scores,
            base_scores=base_scores,
            adaptations=nothing,
            neighborhoods=nothing,
            seconds=clock.seconds,
            embeddings=embeddings,
        )

    def _mean_scores(self, images: Images, rows: Sequence[int], budget: Budget) -> Scores:
        """float64 ``[N, C]``. Raises BudgetExceededError where the budget ends."""
        count, network = self.averaging.images_at_a_time, BaseNetwork(classifier=self.resources.classifier)
        starts = range(0, len(images), count)
        return torch.cat(
            [self.averaging.scores(images[s : s + count], rows[s : s + count], budget, network) for s in starts]
        )

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        """The log of the mean score of the passes that an attacker is given."""
        budget.check()
        rows = row_seeds([draw_seed(generator)] * len(images), images)
        return self._attack(images, rows) if self.first is None else self.first.attack(images, rows, self._attack)

    def _attack(self, images: Images, rows: Sequence[int]) -> Logits:
        averaging, network = self.averaging, BaseNetwork(classifier=self.resources.classifier)

        def some(start: int, stop: int) -> Logits:
            return averaging.attack(images[start:stop], rows[start:stop], network)

        return in_groups(some, len(images), averaging.images_attacked_at_a_time)
