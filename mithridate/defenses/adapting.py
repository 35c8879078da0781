"""What the scopes of RMC have in common: what an adapter is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mithridate.defenses.base import Adaptation, Budget
from mithridate.defenses.none import BasePass
from mithridate.defenses.selection import Selection
from mithridate.types import Images, Logits


@dataclass(frozen=True, kw_only=True)
class Query:
    """``B`` images ``[B, C, H, W]`` and what the base model made of them; budgets and seeds by row."""

    images: Images
    base: BasePass
    selection: Selection
    budgets: tuple[Budget, ...]
    seeds: tuple[int, ...]

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
        )


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What adapted weights say of ``B`` images.

    ``logits`` ``[B, C]``, differentiable in the query's tensors. Where an adaptation's ``weights`` are ``base``, its
    logits do not count.
    """

    logits: Logits
    adaptations: tuple[Adaptation, ...]


class Adapter(Protocol):
    """Adapts weights to each image's neighbours, every image from the base weights on."""

    @property
    def batches(self) -> bool:
        """Whether several images together cost less than one after the other."""
        ...

    def adapt(self, query: Query) -> Adapted:
        """Looks at each row's budget between steps; a row whose budget ended says so in its adaptation."""
        ...


def join(parts: list[Adapted]) -> Adapted:
    """Several parts of a batch as one."""
    return Adapted(
        logits=torch.cat([part.logits for part in parts]),
        adaptations=tuple(adaptation for part in parts for adaptation in part.adaptations),
    )
