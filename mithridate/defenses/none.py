"""``none``: the base model as it is. Always in the table, always the start of the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mithridate.defenses.base import Budget, PhaseClock, Prediction, Resources
from mithridate.models import Classifier
from mithridate.types import Images, Logits


@dataclass(frozen=True, kw_only=True)
class NoDefence:
    """The undefended base model."""

    resources: Resources

    @property
    def name(self) -> str:
        return "none"

    @torch.no_grad()
    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        del generator
        budget.check()
        classifier = self.resources.classifier
        clock = PhaseClock(classifier.device)
        with clock.phase("predict"):
            scores = base_pass(classifier, images.to(classifier.device)).logits.softmax(1).cpu()
        nothing = (None,) * len(images)
        return Prediction(
            scores=scores,
            base_scores=scores,
            adaptations=nothing,
            neighborhoods=nothing,
            seconds=clock.seconds,
        )

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        del generator
        budget.check()
        return base_pass(self.resources.classifier, images).logits


@dataclass(frozen=True, kw_only=True)
class BasePass:
    """One run of the base model: ``logits`` ``[N, C]``, ``embedding`` ``[N, D]``, ``head_input`` ``[N, D']``."""

    logits: Logits
    embedding: torch.Tensor
    head_input: torch.Tensor


def base_pass(classifier: Classifier, images: Images) -> BasePass:
    """Embedding and logits of the base model from one run of its trunk."""
    embedding, head_input = classifier.features(images)
    logits = classifier.head(head_input) if classifier.has_head else classifier(images)
    return BasePass(logits=logits, embedding=embedding, head_input=head_input)
