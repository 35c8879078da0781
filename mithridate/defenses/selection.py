"""Which exemplars an answer is adapted to, and how much each of them counts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mithridate.defenses.base import Resources
from mithridate.defenses.options import require
from mithridate.errors import OptionError
from mithridate.neighbors import NeighborIndex, Neighbors
from mithridate.types import Embeddings


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """``neighbors``: K, in all.

    ``balanced``: as many from each class, the nearest of each; a part that is held out then has all classes too.
    ``adversarial``: this share of the K from the attacked copies and the rest from the clean images, instead of
    whatever is nearest. ``radius``: exemplars farther than this (in the index's metric as ``explain`` prints it; 0: no
    limit) count for nothing; not with ``ip``, which is no distance. ``temperature``: 0 lets all count alike; above,
    exemplar i counts in proportion to exp(-d_i / (temperature * mean d)), d squared for l2, so that the last neighbours
    fade out instead of being cut off and the selection has a gradient.
    """

    neighbors: int = 256
    balanced: bool = False
    adversarial: float | None = None
    radius: float = 0.0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        require("rmc", "neighbors", self.neighbors, 2, 65_536)
        require("rmc", "radius", self.radius, 0, 1e9)
        require("rmc", "temperature", self.temperature, 0, 1e6)
        if self.adversarial is not None:
            require("rmc", "adversarial", self.adversarial, 0, 1)
        if self.balanced and self.adversarial is not None:
            raise OptionError("rmc: balanced and adversarial both say where the neighbours come from; give one of them")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The chosen exemplars of ``B`` images: nearest first, or by turns the nearest of each class (``balanced``).

    ``ids`` int64 ``[B, K]``, ``distances`` float64 ``[B, K]``, ``weights`` float64 ``[B, K]``, each row summing to 1,
    or to 0 where no exemplar is near enough. Weights are differentiable in the query where they are soft.
    """

    ids: torch.Tensor
    distances: torch.Tensor
    weights: torch.Tensor

    def rows(self, start: int, stop: int) -> Selection:
        """The same for some of the images."""
        return Selection(
            ids=self.ids[start:stop], distances=self.distances[start:stop], weights=self.weights[start:stop]
        )

    @property
    def neighbors(self) -> Neighbors:
        """Without the weights."""
        return Neighbors(ids=self.ids, distances=self.distances)

    def by_distance(self) -> Selection:
        """The same, nearest first."""
        distances, order = self.distances.sort(dim=1, stable=True)
        return Selection(ids=self.ids.gather(1, order), distances=distances, weights=self.weights.gather(1, order))

    def hold_out(self, share: float) -> tuple[Selection, int]:
        """The same with that share of each row's exemplars in front, to validate on, and how many places those take.

        The first of those that count for anything: at least one, so nothing remains to learn from where only one does.
        Places that a row has no use for are filled with exemplars of weight 0.
        """
        if not share:
            return self, 0
        count = self.ids.shape[1]
        held = max(1, int(share * count))
        matters = self.weights.detach() > 0  # [B, K]
        if bool(matters.all()):
            return self, held
        wanted = (share * matters.sum(1, keepdim=True)).long().clamp_min(1)
        before = matters.long().cumsum(1) - matters.long()  # how many that matter stand in front
        kept = matters & (before < wanted)
        fillers = ~matters & (~matters).long().cumsum(1).le(held - kept.sum(1, keepdim=True))
        order = torch.where(kept, 0, torch.where(fillers, 1, 2)).argsort(dim=1, stable=True)
        ids, distances, weights = (part.gather(1, order) for part in (self.ids, self.distances, self.weights))
        return Selection(ids=ids, distances=distances, weights=weights), held


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Selects as ``config`` says. Makes its restricted views of the index once."""

    resources: Resources
    config: SelectionConfig
    _parts: tuple[tuple[NeighborIndex, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.config.radius and self.resources.index.metric == "ip":
            raise OptionError("rmc: radius needs a metric that is a distance; the bundle's is ip, allowed: l2, cosine")
        classes = self.resources.classifier.spec.num_classes
        if self.config.balanced and self.config.neighbors < classes:
            raise OptionError(
                f"rmc: neighbors={self.config.neighbors} are too few to be balanced over {classes} classes; allowed: "
                f"{classes} and more"
            )
        object.__setattr__(self, "_parts", self._split())

    def select(self, embedding: Embeddings) -> Selection:
        """For queries ``[B, D]``; differentiable in them where the weights are soft and gradients are enabled."""
        with torch.no_grad():
            found = [part.search(embedding, count) for part, count in self._parts]
            if len(found) == 1:
                ids, distances = found[0].ids, found[0].distances
            else:
                ids, distances = torch.cat([f.ids for f in found], 1), torch.cat([f.distances for f in found], 1)
                rank = distances  # adversarial: nearest first, wherever from
                if self.config.balanced:  # the nearest of each class, then the second of each
                    rank = torch.cat([torch.arange(f.ids.shape[1], device=ids.device) for f in found]).expand_as(ids)
                by_distance = distances.argsort(dim=1, stable=True)
                order = by_distance.gather(1, rank.gather(1, by_distance).argsort(dim=1, stable=True))
                ids, distances = ids.gather(1, order), distances.gather(1, order)
        return Selection(ids=ids, distances=distances, weights=self._weigh(embedding, ids, distances))

    def _split(self) -> tuple[tuple[NeighborIndex, int], ...]:
        index, exemplars, config = self.resources.index, self.resources.exemplars, self.config
        if config.balanced:
            classes = self.resources.classifier.spec.num_classes
            sizes = [config.neighbors // classes + (c < config.neighbors % classes) for c in range(classes)]
            masks = [exemplars.labels.cpu() == c for c in range(classes)]
            return tuple((index.only(m), n) for m, n in zip(masks, sizes, strict=True) if n and bool(m.any()))
        if config.adversarial is not None:
            clean = torch.arange(len(exemplars)) < exemplars.clean_count
            attacked = round(config.adversarial * config.neighbors)
            parts = ((clean, config.neighbors - attacked), (~clean, attacked))
            if attacked and not bool((~clean).any()):
                raise OptionError(f"rmc: adversarial={config.adversarial:g}, but the bundle holds no attacked copies")
            return tuple((index.only(mask), count) for mask, count in parts if count)
        return ((index, config.neighbors),)

    def _weigh(self, embedding: Embeddings, ids: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        config = self.config
        if config.temperature:
            if torch.is_grad_enabled() and embedding.requires_grad:
                distances = self.resources.index.distances(embedding, ids)
            nearest = distances.amin(1, keepdim=True)  # keeps exp() in range, and cancels
            # l2, cosine: the mean; ip, where 0 means nothing: the mean beyond the nearest.
            scale = (distances - nearest).mean(1, keepdim=True) + nearest.clamp_min(0) + 1e-12
            weights = (-(distances - nearest) / (config.temperature * scale)).exp()
        else:
            weights = torch.ones_like(distances)
        if config.radius:
            weights = weights * (self._printed(distances.detach()) <= config.radius)
        return weights / weights.sum(1, keepdim=True).clamp_min(1e-300)

    def _printed(self, distances: torch.Tensor) -> torch.Tensor:
        return distances.sqrt() if self.resources.index.metric == "l2" else distances
