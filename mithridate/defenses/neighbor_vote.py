"""``webnn`` and ``deepnn``: what the neighbours are, instead of the network's last layer.

``deepnn`` asks the clean exemplars (the training set), ``webnn`` asks clean and adversarial ones. With ``scores=vote``
and uniform weights these are the two baselines of the RMC authors; ``scores=softmax`` and the two confidence weights
are those of Dubey, van der Maaten, Yalniz, Li and Mahajan: Defense against Adversarial Images using Web-Scale
Nearest-Neighbor Search (CVPR 2019, arXiv:1903.01612).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

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
    describe_neighbors,
)
from mithridate.defenses.exemplar_scores import ExemplarScores
from mithridate.defenses.guard import neighbor_votes
from mithridate.defenses.none import base_pass
from mithridate.defenses.options import canonical, require
from mithridate.errors import ModelError
from mithridate.neighbors import NeighborIndex
from mithridate.types import Images, Logits, Scores

_SURROGATE_TEMPERATURE = 0.5
"""Of the mean distance to the voters. Of 60 attacked digits the vote got 28 right at 0.1, 2 at 0.5 and 6 at 1."""

_SURROGATE_NEIGHBORS, _SURROGATE_NUMBERS = 2048, 500_000
"""How many exemplars the surrogate looks at: wide enough to see other classes, bounded for wide embeddings."""

_SURROGATE_GAP = 10.0
"""The most by which one class's soft logit may lead: beyond, the softmax of the others would round to nothing."""


@dataclass(frozen=True, kw_only=True)
class NeighborVoteConfig:
    """``neighbors``: how many are asked (Dubey et al.: 50).

    ``scores``: what is averaged, each neighbour's true label (``vote``) or what the base model says of it
    (``softmax``). ``weights``: how much a neighbour counts, by its own softmax s over C classes, the largest first:
    ``uniform``; ``cbw-e`` by its entropy gap, ``|log C + sum_c s_c log s_c| ** power``; ``cbw-d`` by the lead of its
    best class, ``sum_{m=2}^{top+1} (s_1 - s_m) ** power``, over at most C classes. ``top`` 20 and ``power`` 3 are those
    of a public re-implementation of ``cbw-d``; that ``cbw-e`` has the same ``power`` is our choice (there: 1).
    """

    neighbors: int = 64
    scores: Literal["vote", "softmax"] = "vote"
    weights: Literal["uniform", "cbw-e", "cbw-d"] = "uniform"
    power: float = 3.0
    top: int = 20

    def __post_init__(self) -> None:
        require("a neighbour vote", "neighbors", self.neighbors, 1, 65_536)
        require("a neighbour vote", "power", self.power, 0, 20)
        require("a neighbour vote", "top", self.top, 1, 65_536)

    @property
    def asks_the_model(self) -> bool:
        """Whether the base model's scores of the exemplars are needed."""
        return self.scores == "softmax" or self.weights != "uniform"


@dataclass(frozen=True, kw_only=True)
class NeighborVote:
    """Scores are the (weighted) mean of what the neighbours say; of equal classes the one with the lower index wins.

    Raises ModelError where the base model's scores of the exemplars are needed and the network has no head.
    """

    resources: Resources
    kind: Literal["webnn", "deepnn"]
    config: NeighborVoteConfig = NeighborVoteConfig()
    _index: NeighborIndex = field(init=False, repr=False, compare=False)
    _scores: ExemplarScores | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        index, exemplars, classifier = self.resources.index, self.resources.exemplars, self.resources.classifier
        if self.config.asks_the_model and not classifier.has_head:
            raise ModelError(
                f"{classifier.spec.arch} does not end in a linear layer, so there are no scores of the exemplars; "
                f"use {self.kind} with scores=vote and weights=uniform"
            )
        if self.kind == "deepnn":
            index = index.only(torch.arange(len(exemplars)) < exemplars.clean_count)
        object.__setattr__(self, "_index", index)
        object.__setattr__(self, "_scores", ExemplarScores(self.resources) if self.config.asks_the_model else None)

    @property
    def name(self) -> str:
        return canonical(self.kind, self.config, NeighborVoteConfig())

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        return answer_one(self.predict_together, images, generator, budget)

    @torch.no_grad()
    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        return answer_together(requests, self.resources.classifier.device, self._answer)

    def _answer(self, batch: Batch) -> Prediction:
        classifier = self.resources.classifier
        clock = PhaseClock(classifier.device)
        with clock.phase("embed"):
            base = base_pass(classifier, batch.images)
        with clock.phase("search"):
            neighbors = self._index.search(base.embedding, self.config.neighbors)
        with clock.phase("predict"):
            scores = self._ask(neighbors.ids).shares().float().cpu()
            base_scores = base.logits.softmax(1).float().cpu()
            described = describe_neighbors(neighbors, self.resources.exemplars)
        return Prediction(
            scores=scores,
            base_scores=base_scores,
            adaptations=(None,) * len(batch.images),
            neighborhoods=described,
            seconds=clock.seconds,
            embeddings=base.embedding.float().cpu(),
        )

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        """Forward the answer's own shares, backward each class's soft nearness (see ``_soft_logits``).

        As in the ASK attack (Wang et al. 2021). More exemplars count than are asked: where all that are asked agree
        there would be no gradient, and an attack would stop before it began. Which they are is held constant (BPDA).
        For the same reason a trace of the soft shares is mixed into the answer's, too little to outweigh a vote.
        """
        del generator
        budget.check()
        embedding, config = self.resources.classifier.embed(images), self.config
        classes = self.resources.classifier.spec.num_classes
        numbers = embedding.shape[1] + (classes if config.asks_the_model else 0)
        wider = max(config.neighbors, min(_SURROGATE_NEIGHBORS, _SURROGATE_NUMBERS // numbers))
        with torch.no_grad():
            ids = self._index.search(embedding, wider).ids
            asked, seen = self._ask(ids[:, : config.neighbors]), self._ask(ids)
        distances = self._index.distances(embedding, ids).to(embedding.device)
        soft = _soft_logits(_nearness(distances, config.neighbors), seen)
        with torch.no_grad():
            trace = 0.5 / config.neighbors  # less than one vote
            answered = ((1 - trace) * asked.shares() + trace * soft.softmax(1)).clamp_min(1e-30).log()
        return soft + (answered - soft).detach()

    def _ask(self, ids: torch.Tensor) -> _Opinions:
        """What the exemplars ``ids`` ``[B, K]`` say."""
        device, exemplars = self.resources.classifier.device, self.resources.exemplars
        classes = self.resources.classifier.spec.num_classes
        labels, table = exemplars.gather_labels(ids, device), None
        weights = torch.ones(ids.shape, dtype=torch.float64, device=device)
        if self._scores is not None:
            table = self._scores.of(ids, exemplars.gather_features(ids, device)).to(device).double()
            weights = _confidence(table, self.config)
        says = table if self.config.scores == "softmax" else None
        return _Opinions(labels=labels, weights=weights, classes=classes, softmax=says)


@dataclass(frozen=True, kw_only=True)
class _Opinions:
    """Of ``[B, K]`` exemplars: ``labels``, ``weights`` (of any sum), ``softmax`` ``[B, K, C]`` if that is averaged."""

    labels: torch.Tensor
    weights: torch.Tensor
    classes: int
    softmax: torch.Tensor | None

    def shares(self) -> Scores:
        """float64 ``[B, C]``: the weighted mean; where no exemplar has any weight, all count alike."""
        total = self.weights.sum(1, keepdim=True)
        weights = torch.where(total > 0, self.weights, 1.0)
        weights = weights / weights.sum(1, keepdim=True)
        if self.softmax is None:
            return neighbor_votes(self.labels, weights, self.classes)
        shares = (weights[:, None] @ self.softmax)[:, 0]
        return shares / shares.sum(1, keepdim=True)


def _confidence(softmax: torch.Tensor, config: NeighborVoteConfig) -> torch.Tensor:
    """``[..., C]`` to ``[...]``: how much each counts, as ``config`` says."""
    if config.weights == "cbw-e":
        return (math.log(softmax.shape[-1]) + torch.xlogy(softmax, softmax).sum(-1)).abs().pow(config.power)
    if config.weights == "cbw-d":
        best = softmax.topk(min(config.top + 1, softmax.shape[-1]), dim=-1).values
        return (best[..., :1] - best[..., 1:]).pow(config.power).sum(-1)
    return torch.ones(softmax.shape[:-1], dtype=softmax.dtype, device=softmax.device)


def _nearness(distances: torch.Tensor, voters: int) -> torch.Tensor:
    """``[B, K]``: 0 for the nearest, falling with the distance, on the scale of the nearest ``voters``."""
    known = distances.detach()
    nearest = known.amin(1, keepdim=True)
    # The mean distance, or, for inner products (which may be negative), the mean beyond the nearest.
    scale = (known[:, :voters] - nearest).mean(1, keepdim=True) + nearest.clamp_min(0)
    return -(distances - nearest) / (_SURROGATE_TEMPERATURE * scale + 1e-12)


def _soft_logits(nearness: torch.Tensor, opinions: _Opinions) -> Logits:
    """float64 ``[B, C]``: log of the sum over exemplars of exp(nearness), times weight, times what each says."""
    heights = nearness + opinions.weights.clamp_min(1e-30).log()
    if opinions.softmax is not None:
        top = heights.detach().amax(1, keepdim=True)
        logits = top + (((heights - top).exp()[:, None] @ opinions.softmax)[:, 0] + 1e-30).log()
    else:
        floor = heights.detach().amin(1, keepdim=True) - 1.0  # a class that is nowhere near still has a finite logit
        peaks = floor.expand(-1, opinions.classes).scatter_reduce(1, opinions.labels, heights.detach(), "amax")
        sums = (floor - peaks).exp().scatter_add(1, opinions.labels, (heights - peaks.gather(1, opinions.labels)).exp())
        logits = peaks + sums.log()
    best = logits.detach().topk(2, dim=1).values
    return logits * (_SURROGATE_GAP / (best[:, :1] - best[:, 1:])).clamp_max(1)
