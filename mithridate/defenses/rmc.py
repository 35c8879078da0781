"""RMC, runtime masking and cleansing: each image is answered by weights that were fine-tuned on its neighbours.

Wu, Yuan, Wu: Adversarial Robustness via Runtime Masking and Cleansing (ICML 2020). Which weights move is the scope,
each in a file of its own (``rmc_head``, ``rmc_tail``, ``rmc_all``); everything around that is here. Unlike the
published procedure nothing is carried from one image to the next: every image starts from the base weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from mithridate.defenses.adapting import Adapted, Adapter, Query
from mithridate.defenses.base import (
    Adaptation,
    Batch,
    Budget,
    Outcome,
    PhaseClock,
    Prediction,
    Request,
    Resources,
    answer_one,
    answer_together,
    describe_neighbors,
    draw_seed,
)
from mithridate.defenses.guard import GuardConfig, guard, guarded_logits, neighbor_votes
from mithridate.defenses.none import base_pass
from mithridate.defenses.selection import SelectionConfig, Selector
from mithridate.types import Images, Logits


@dataclass(frozen=True, kw_only=True)
class RMC:
    """Serves ``rmc`` in every scope: what ``adapter`` adapts, on what ``selection`` selects, let through by
    ``guarding``.
    """

    name: str
    resources: Resources
    adapter: Adapter
    selection: SelectionConfig
    guarding: GuardConfig
    _selector: Selector = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_selector", Selector(resources=self.resources, config=self.selection))

    @property
    def batches(self) -> bool:
        """Whether requests gain by being answered together."""
        return self.adapter.batches

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        return answer_one(self.predict_together, images, generator, budget)

    @torch.no_grad()
    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        return answer_together(requests, self.resources.classifier.device, self._answer)

    def _answer(self, batch: Batch) -> Prediction:
        classifier, exemplars = self.resources.classifier, self.resources.exemplars
        clock = PhaseClock(classifier.device)
        with clock.phase("embed"):
            base = base_pass(classifier, batch.images)
        with clock.phase("search"):
            selection = self._selector.select(base.embedding)
            query = Query(images=batch.images, base=base, selection=selection, budgets=batch.budgets, seeds=batch.seeds)
        with clock.phase("adapt"):
            adapted = self._adapt(query)
        with clock.phase("predict"):
            guarded = guard(query, adapted, self._votes(query), self.guarding)
            scores, base_scores = guarded.scores.float().cpu(), base.logits.softmax(1).float().cpu()
            abstained = None if guarded.abstained is None else guarded.abstained.cpu()
            nearest = selection.by_distance()
            described = describe_neighbors(nearest.neighbors, exemplars, nearest.weights > 0)
        return Prediction(
            scores=scores,
            base_scores=base_scores,
            adaptations=guarded.adaptations,
            neighborhoods=described,
            seconds=clock.seconds,
            abstained=abstained,
        )

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        """Adapts to these very images. Which exemplars are chosen is held constant (BPDA); the adapted weights too, but
        for the closed-form head, through which the gradient goes, and through the soft weights where they are on."""
        budget.check()
        classifier = self.resources.classifier
        base = base_pass(classifier, images)
        query = Query(
            images=images,
            base=base,
            selection=self._selector.select(base.embedding),
            budgets=(budget,) * len(images),
            seeds=(draw_seed(generator),) * len(images),
        )
        return guarded_logits(query, self._adapt(query), self._votes(query), self.guarding)

    def agreement(self, images: Images) -> torch.Tensor:
        """``[N]``: what base, neighbours and answer all grant the answer's class; ``abstain`` is a threshold on
        this.
        """
        with torch.no_grad():
            base = base_pass(self.resources.classifier, images.to(self.resources.classifier.device))
            count = len(images)
            query = Query(
                images=images.to(self.resources.classifier.device),
                base=base,
                selection=self._selector.select(base.embedding),
                budgets=(Budget(),) * count,
                seeds=(0,) * count,
            )
            return guard(query, self._adapt(query), self._votes(query), self.guarding).agreement.cpu()

    def _votes(self, query: Query) -> torch.Tensor:
        labels = self.resources.exemplars.gather_labels(query.selection.ids, query.base.logits.device)
        weights = query.selection.weights.detach().to(labels.device)
        return neighbor_votes(labels, weights, query.base.logits.shape[1])

    def _adapt(self, query: Query) -> Adapted:
        """Images that have no neighbour within the radius keep the base weights."""
        alone = query.selection.weights.detach().sum(1) == 0
        if not bool(alone.any()):
            return self.adapter.adapt(query)
        # A single neighbour of equal weight stands in, so that the arithmetic goes through; its result does not count.
        weights = torch.where(alone[:, None], 1.0 / query.selection.weights.shape[1], query.selection.weights)
        adapted = self.adapter.adapt(replace(query, selection=replace(query.selection, weights=weights)))
        untouched = Adaptation(steps=0, stop_reason="converged", weights="base")
        fates = tuple(
            untouched if flag else fate for flag, fate in zip(alone.tolist(), adapted.adaptations, strict=True)
        )
        return replace(adapted, adaptations=fates)
