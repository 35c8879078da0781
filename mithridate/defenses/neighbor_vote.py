"""``webnn`` and ``deepnn``: the neighbours' majority instead of the network's last layer.

``deepnn`` asks the clean exemplars (the training set), ``webnn`` asks clean and adversarial ones: the two baselines of
the RMC authors, the second in imitation of Dubey et al. (CVPR 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from mithridate.defenses.base import Budget, PhaseClock, Prediction, Resources, describe_neighbors
from mithridate.defenses.none import base_pass
from mithridate.defenses.options import canonical, require
from mithridate.neighbors import Neighbors
from mithridate.types import Images, Logits

_SURROGATE_TEMPERATURE = 0.1
"""Of the mean squared distance to the neighbours: soft enough for a gradient, near enough to the vote."""

_SURROGATE_NEIGHBORS, _SURROGATE_NUMBERS = 2048, 1_000_000
"""How many exemplars the surrogate looks at: wide enough to see other classes, bounded for wide embeddings."""


@dataclass(frozen=True, kw_only=True)
class NeighborVoteConfig:
    """``neighbors``: how many vote."""

    neighbors: int = 64

    def __post_init__(self) -> None:
        require("a neighbour vote", "neighbors", self.neighbors, 1, 65_536)


@dataclass(frozen=True, kw_only=True)
class NeighborVote:
    """Scores are vote shares; of classes with equal votes the one with the lower index wins."""

    resources: Resources
    kind: Literal["webnn", "deepnn"]
    config: NeighborVoteConfig = NeighborVoteConfig()

    @property
    def name(self) -> str:
        return canonical(self.kind, self.config)

    @torch.no_grad()
    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        del generator
        budget.check()
        classifier = self.resources.classifier
        clock = PhaseClock(classifier.device)
        with clock.phase("embed"):
            base = base_pass(classifier, images.to(classifier.device))
        with clock.phase("search"):
            neighbors = self._search(base.embedding, self.config.neighbors)
        with clock.phase("predict"):
            votes = F.one_hot(self._labels(neighbors), base.logits.shape[1]).float().mean(1)
            described = describe_neighbors(neighbors, self.resources.exemplars)
        return Prediction(
            scores=votes,
            base_scores=base.logits.softmax(1).cpu(),
            adaptations=(None,) * len(images),
            neighborhoods=described,
            seconds=clock.seconds,
        )

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        """Each class by its soft nearness, log sum exp(-distance^2 / temperature), differentiable in the query.

        As in the ASK attack (Wang et al. 2021). More exemplars count than have a vote: where all that vote agree there
        would be no gradient, and an attack would stop before it began. Which they are is held constant.
        """
        del generator
        budget.check()
        embedding = self.resources.classifier.embed(images)
        wider = max(self.config.neighbors, min(_SURROGATE_NEIGHBORS, _SURROGATE_NUMBERS // embedding.shape[1]))
        with torch.no_grad():
            neighbors = self._search(embedding, wider)
        points = self.resources.index.embeddings(neighbors.ids).to(embedding.device)  # [B, K, D]
        distances = (points - embedding[:, None]).square().sum(-1)  # [B, K]
        voting = distances.detach()[:, : self.config.neighbors]
        nearness = -distances / (_SURROGATE_TEMPERATURE * voting.mean(1, keepdim=True) + 1e-12)
        classes = self.resources.classifier.spec.num_classes
        members = F.one_hot(self._labels(neighbors), classes).bool().to(embedding.device)  # [B, K, C]
        floor = nearness.detach().min(1).values - 1.0  # a class that is nowhere near still has a finite logit
        inside = nearness[:, :, None].masked_fill(~members, -torch.inf)
        return torch.cat([inside, floor[:, None, None].expand(-1, 1, classes)], 1).logsumexp(1)

    def _search(self, embedding: torch.Tensor, count: int) -> Neighbors:
        clean = self.resources.exemplars.clean_count if self.kind == "deepnn" else None
        return self.resources.index.search(embedding, count, among_first=clean)

    def _labels(self, neighbors: Neighbors) -> torch.Tensor:
        return self.resources.exemplars.labels[neighbors.ids]
