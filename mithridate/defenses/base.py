"""What every defence is given, and what it gives back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch

from mithridate.bundle import Bundle
from mithridate.errors import BudgetExceededError, BundleError
from mithridate.exemplars import ExemplarStore
from mithridate.models import Classifier
from mithridate.neighbors import NeighborIndex, Neighbors
from mithridate.types import Images, Logits, Scores

StopReason = Literal["converged", "patience", "max_steps", "deadline", "cancelled"]
Interruption = Literal["deadline", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a bundle offers to a defence. Shared by all requests, changed by none."""

    classifier: Classifier
    index: NeighborIndex
    exemplars: ExemplarStore

    @classmethod
    def load(cls, bundle: Bundle, *, device: str | torch.device = "cpu", allow_factory: str | None = None) -> Resources:
        """Loads the base model to ``device`` and maps the exemplars. Raises BundleError where they do not fit."""
        classifier = bundle.classifier(allow_factory=allow_factory)
        index, exemplars = bundle.index(), bundle.exemplars()
        with torch.no_grad():
            embedding, head_input = classifier.features(torch.zeros(1, *classifier.spec.image_shape))
        widths = [("embeddings", bundle.embeddings.shape[1], embedding.shape[1])]
        if classifier.has_head:
            widths.append(("features", exemplars.features.shape[1], head_input.shape[1]))
        for what, stored, computed in widths:
            if stored != computed:
                raise BundleError(
                    f"bundle {bundle.path}: its {what} are {stored} numbers wide, the model's are {computed}"
                )
        return cls(classifier=classifier.to(device), index=index, exemplars=exemplars)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much work an answer may cost; looked at between optimiser steps.

    ``deadline`` is a ``time.monotonic()`` instant, ``max_steps`` a ceiling on optimiser steps an image,
    ``cancelled`` says whether the caller has gone.
    """

    deadline: float | None = None
    max_steps: int | None = None
    cancelled: Callable[[], bool] = field(default=lambda: False)

    def interruption(self) -> Interruption | None:
        """``"cancelled"``, ``"deadline"`` or None."""
        if self.cancelled():
            return "cancelled"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "deadline"
        return None

    def check(self) -> None:
        """Raises BudgetExceededError where there is no time left."""
        reason = self.interruption()
        if reason is not None:
            raise BudgetExceededError(reason)

    def steps(self, wanted: int) -> int:
        """``wanted`` steps, or as many as the ceiling allows."""
        return wanted if self.max_steps is None else min(wanted, self.max_steps)


@dataclass(frozen=True, kw_only=True)
class Neighborhood:
    """The exemplars that had a say in one answer, nearest first: ``ids`` ``[K]``, squared ``distances`` ``[K]``."""

    ids: torch.Tensor
    distances: torch.Tensor
    label_counts: dict[int, int]
    adversarial_fraction: float


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What fine-tuning did for one image."""

    steps: int
    stop_reason: StopReason


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for ``N`` images.

    ``scores`` and ``base_scores`` (the undefended model's) are ``[N, C]``; ``adaptations`` and ``neighborhoods`` have
    one entry an image, None where the defence does not adapt or has no neighbours; ``seconds`` by phase.
    """

    scores: Scores
    base_scores: Scores
    adaptations: tuple[Adaptation | None, ...]
    neighborhoods: tuple[Neighborhood | None, ...]
    seconds: dict[str, float]


@runtime_checkable
class Defence(Protocol):
    """A defence: an answer for clients, and the best differentiable path to it for attackers."""

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        ...

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        """Answers for ``images`` ``[N, C, H, W]``. Leaves no trace: the next call starts from the same weights.

        Raises BudgetExceededError where the budget ended before there was any answer.
        """
        ...

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        """Logits ``[N, C]``, differentiable in ``images``: what a white-box attacker ascends.

        What has no gradient (neighbour selection, the optimiser's path) runs forward and is held constant backward
        (BPDA, Athalye et al. 2018).
        """
        ...


class PhaseClock:
    """Seconds by phase.

    >>> clock = PhaseClock()
    >>> with clock.phase("search"): ...
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to ``name``, after the device has finished."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def describe_neighbors(neighbors: Neighbors, exemplars: ExemplarStore) -> tuple[Neighborhood, ...]:
    """One Neighborhood a row."""
    labels = exemplars.labels[neighbors.ids]  # [B, K]
    adversarial = (neighbors.ids >= exemplars.clean_count).double().mean(1)
    described = []
    for ids, distances, row, fraction in zip(neighbors.ids, neighbors.distances, labels, adversarial, strict=True):
        values, counts = row.unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        label_counts = {int(values[i]): int(counts[i]) for i in order}
        described.append(
            Neighborhood(ids=ids, distances=distances, label_counts=label_counts, adversarial_fraction=float(fraction))
        )
    return tuple(described)
