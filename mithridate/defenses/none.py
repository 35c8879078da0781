"""``none``: the base model as it is. Always in the table, always the start of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    answer_together,
)
from mithridate.models import Classifier
from mithridate.types import Images, Logits


@dataclass(frozen=True, kw_only=True)
class NoDefence:
    """The undefended base model."""

    resources: Resources

    @property
    def name(self) -> str:
        return "none"

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        return answer_one(self.predict_together, images, generator, budget)

    @torch.no_grad()
    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        return answer_together(requests, self.resources.classifier.device, self._answer)

    def _answer(self, batch: Batch) -> Prediction:
        classifier = self.resources.classifier
        clock = PhaseClock(classifier.device)
        with clock.phase("predict"):
            base = base_pass(classifier, batch.images)
            scores = base.logits.softmax(1).cpu()
        nothing = (None,) * len(batch.images)
        return Prediction(
            scores=scores,
            base_scores=scores,
            adaptations=nothing,
            neighborhoods=nothing,
            seconds=clock.seconds,
            embeddings=base.embedding.float().cpu(),
        )

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        del generator
        budget.check()
        return base_pass(self.resources.classifier, images).logits


@dataclass(frozen=True, kw_only=True)
class BasePass:
    """One run of the base model: ``logits`` ``[N, C]``, ``embedding`` ``[N, D]``, ``head_input`` ``[N, D']``, and the
    ``activation`` ``[N, ...]`` at the tail's cut where the classifier has one."""

    logits: Logits
    embedding: torch.Tensor
    head_input: torch.Tensor
    activation: torch.Tensor | None = None

    def rows(self, start: int, stop: int) -> BasePass:
        """The same for some of the images."""
        return BasePass(
            logits=self.logits[start:stop],
            embedding=self.embedding[start:stop],
            head_input=self.head_input[start:stop],
            activation=None if self.activation is None else self.activation[start:stop],
        )


def base_pass(classifier: Classifier, images: Images) -> BasePass:
    """Embedding and logits of the base model from one run of its trunk."""
    trace = classifier.trace(images)
    logits = classifier.head(trace.head_input) if classifier.has_head else classifier(images)
    return BasePass(logits=logits, embedding=trace.embedding, head_input=trace.head_input, activation=trace.activation)
