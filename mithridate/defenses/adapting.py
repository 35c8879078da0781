"""What the scopes of RMC have in common: what an adapter is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from mithridate.defenses.base import Adaptation, Budget
from mithridate.defenses.networks import BaseNetwork, Heads, HeadsNetwork, Network, Parameters, PrivateNetwork
from mithridate.defenses.none import BasePass
from mithridate.defenses.selection import Selection
from mithridate.models import Classifier
from mithridate.types import Images, Logits

Average = Callable[["Query", Network], Logits]
"""Log scores ``[B, ...]`` of a network for a query's images, averaged over many random passes."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """``B`` images ``[B, C, H, W]`` and what the base model made of them; budgets and seeds by row.

    ``average``: how the adapted network is to be asked, where that is not once and plainly; it draws from ``draws``,
    a seed an image.
    """

    images: Images
    base: BasePass
    selection: Selection
    budgets: tuple[Budget, ...]
    seeds: tuple[int, ...]
    average: Average | None = None
    draws: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, start: int, stop: int) -> Query:
        """The same for some of the images."""
        return Query(
            images=self.images[start:stop],
            base=self.base.rows(start, stop),
            selection=self.selection.rows(start, stop),
            budgets=self.budgets[start:stop],
            seeds=self.seeds[start:stop],
            average=self.average,
            draws=self.draws[start:stop],
        )


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What adapted weights say of ``B`` images.

    ``logits`` ``[B, C]``, differentiable in the query's tensors. Where an adaptation's ``weights`` are ``base``, its
    logits do not count. ``base_logits`` ``[B, C]``: the base model's where they are an average too.
    """

    logits: Logits
    adaptations: tuple[Adaptation, ...]
    base_logits: Logits | None = None


class Adapter(Protocol):
    """Adapts weights to each image's neighbours, every image from the base weights on."""

    @property
    def config(self) -> Any:
        """Its options; ``held_out`` among them."""
        ...

    @property
    def batches(self) -> bool:
        """Whether several images together cost less than one after the other."""
        ...

    @property
    def repeatable(self) -> bool:
        """Whether running it twice is cheap, and it takes no gradient steps by autograd."""
        ...

    @property
    def changes(self) -> Literal["head", "tail", "all"]:
        """Which layers' weights are each image's own."""
        ...

    def adapt(self, query: Query) -> Adapted:
        """Looks at each row's budget between steps; a row whose budget ended says so in its adaptation."""
        ...


def join(parts: list[Adapted]) -> Adapted:
    """Several parts of a batch as one."""
    base = [part.base_logits for part in parts if part.base_logits is not None]
    assert len(base) in (0, len(parts)), "some parts were averaged, some were not"
    return Adapted(
        logits=torch.cat([part.logits for part in parts]),
        adaptations=tuple(adaptation for part in parts for adaptation in part.adaptations),
        base_logits=torch.cat(base) if base else None,
    )


def average_privately(
    query: Query, classifier: Classifier, adaptations: tuple[Adaptation, ...], parameters: list[Parameters | None]
) -> Adapted:
    """The query's average of networks whose layers have each image's ``parameters``, None where they are the base
    model's."""
    assert query.average is not None
    base = query.average(query, BaseNetwork(classifier=classifier))
    logits = [
        base[row : row + 1]
        if mine is None
        else query.average(query.rows(row, row + 1), PrivateNetwork(classifier=classifier, parameters=mine))
        for row, mine in enumerate(parameters)
    ]
    return Adapted(logits=torch.cat(logits), adaptations=adaptations, base_logits=base)


def average_heads(query: Query, classifier: Classifier, adaptations: tuple[Adaptation, ...], answer: Heads) -> Adapted:
    """The query's average of heads of each image's own."""
    assert query.average is not None
    both = query.average(query, HeadsNetwork(classifier=classifier, images=len(query), answer=answer))  # [B, 2, C]
    return Adapted(logits=both[:, 0], adaptations=adaptations, base_logits=both[:, 1])
