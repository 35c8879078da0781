"""What every defence is given, and what it gives back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch

from mithridate.bundle import Bundle
from mithridate.errors import BudgetExceededError, BundleError
from mithridate.exemplars import ExemplarStore
from mithridate.models import PRM, Classifier
from mithridate.neighbors import NeighborIndex, Neighbors
from mithridate.tuning import read_tuning
from mithridate.types import Embeddings, Images, Logits, Pixels, Scores

StopReason = Literal["converged", "patience", "max_steps", "deadline", "cancelled"]
Interruption = Literal["deadline", "cancelled"]


class Tuned(Protocol):
    """What the canonical name of a defence depends on beside its text."""

    @property
    def tuning(self) -> str | None:
        """The defence that the bundle was tuned to, where it was."""
        ...


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a bundle offers to a defence. Shared by all requests, changed by none.

    ``tuning`` is the defence that the bundle was tuned to, as text, where it was. ``prms``: pixel robustness
    manipulators, where the bundle has any.
    """

    classifier: Classifier
    index: NeighborIndex
    exemplars: ExemplarStore
    tuning: str | None = None
    prms: tuple[PRM, ...] = ()

    @classmethod
    def load(cls, bundle: Bundle, *, device: str | torch.device = "cpu", allow_factory: str | None = None) -> Resources:
        """Loads the base model to ``device`` and maps the exemplars. Raises BundleError where they do not fit."""
        classifier = bundle.classifier(allow_factory=allow_factory)
        index, exemplars = bundle.index(), bundle.exemplars()
        with torch.no_grad():
            trace = classifier.trace(torch.zeros(1, *classifier.spec.image_shape))
        shapes = [("embeddings", bundle.embeddings.shape[1:], trace.embedding.shape[1:])]
        if classifier.has_head:
            shapes.append(("features", exemplars.features.shape[1:], trace.head_input.shape[1:]))
        if trace.activation is not None and exemplars.activations is not None:
            shapes.append(("activations", exemplars.activations.shape[1:], trace.activation.shape[1:]))
        for what, stored, computed in shapes:
            if tuple(stored) != tuple(computed):
                stated, seen = ("x".join(map(str, shape)) for shape in (stored, computed))
                raise BundleError(f"bundle {bundle.path}: its {what} are {stated} numbers, the model's are {seen}")
        tuning = read_tuning(bundle.path, bundle.digest)
        return cls(
            classifier=classifier.to(device),
            index=index.to(device),
            exemplars=exemplars.to(device),
            tuning=None if tuning is None else tuning.defense,
            prms=tuple(prm.to(device) for prm in bundle.prms()),
        )


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
    """What fine-tuning did for one image.

    ``weights`` says which ones gave the answer: ``base`` where adaptation made its own held-out neighbours worse, or
    a guard did not let it through. ``held_out_loss`` is theirs before and after, None where none were held out.
    """

    steps: int
    stop_reason: StopReason
    weights: Literal["adapted", "base"] = "adapted"
    held_out_loss: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for ``N`` images.

    ``scores`` and ``base_scores`` (the undefended model's) are ``[N, C]``; ``adaptations`` and ``neighborhoods`` have
    one entry an image, None where the defence does not adapt or has no neighbours; ``seconds`` by phase.
    ``abstained`` bool ``[N]``: the scores are there, but the defence does not stand by them; None where it never does.
    ``embeddings`` float32 ``[N, D]`` on the CPU: the base model's, of the images as they came; None where the defence
    would have to compute them for nothing else.
    ``pixels`` uint8 ``[N, C, H, W]``: the images that were answered, where those are others than were sent.
    """

    scores: Scores
    base_scores: Scores
    adaptations: tuple[Adaptation | None, ...]
    neighborhoods: tuple[Neighborhood | None, ...]
    seconds: dict[str, float]
    abstained: torch.Tensor | None = None
    embeddings: Embeddings | None = None
    pixels: Pixels | None = None

    def rows(self, start: int, stop: int) -> Prediction:
        """The answer for the images ``start`` to ``stop``; the seconds stay those of the whole."""
        return Prediction(
            scores=self.scores[start:stop],
            base_scores=self.base_scores[start:stop],
            adaptations=self.adaptations[start:stop],
            neighborhoods=self.neighborhoods[start:stop],
            seconds=dict(self.seconds),
            abstained=None if self.abstained is None else self.abstained[start:stop],
            embeddings=None if self.embeddings is None else self.embeddings[start:stop],
            pixels=None if self.pixels is None else self.pixels[start:stop],
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one caller asks: images ``[N, C, H, W]``, randomness and budget of its own."""

    images: Images
    generator: torch.Generator
    budget: Budget = Budget()


Outcome = Prediction | BudgetExceededError
"""One request's answer, or why there is none."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The images of several requests, answered together; every row knows whose it is.

    ``images`` ``[N, C, H, W]`` on the device; ``budgets`` and ``seeds`` have one entry a row. All rows of a request
    have the same seed: an answer does not depend on the place in the batch.
    """

    images: Images
    budgets: tuple[Budget, ...]
    seeds: tuple[int, ...]


def answer_together(
    requests: Sequence[Request], device: torch.device, answer: Callable[[Batch], Prediction]
) -> list[Outcome]:
    """Runs ``answer`` once on the images of all ``requests`` and gives each its part.

    A request whose budget has ended before the start is left out and gets its error.
    """
    refused: dict[int, BudgetExceededError] = {}
    for number, request in enumerate(requests):
        reason = request.budget.interruption()
        if reason is not None:
            refused[number] = BudgetExceededError(reason)
    admitted = [request for number, request in enumerate(requests) if number not in refused]
    parts: list[Prediction] = []
    if admitted:
        whole = answer(gather(admitted, device))
        start = 0
        for request in admitted:
            parts.append(whole.rows(start, start + len(request.images)))
            start += len(request.images)
    rest = iter(parts)
    return [refused[number] if number in refused else next(rest) for number in range(len(requests))]


def gather(requests: Sequence[Request], device: torch.device) -> Batch:
    """One Batch out of several requests. Draws each request's seed."""
    counts = [len(request.images) for request in requests]
    seeds = [draw_seed(request.generator) for request in requests]
    images = requests[0].images if len(requests) == 1 else torch.cat([request.images for request in requests])
    return Batch(
        images=images.to(device, non_blocking=True),
        budgets=tuple(r.budget for r, count in zip(requests, counts, strict=True) for _ in range(count)),
        seeds=tuple(seed for seed, count in zip(seeds, counts, strict=True) for _ in range(count)),
    )


def answer_one(
    predict_together: Callable[[Sequence[Request]], list[Outcome]],
    images: Images,
    generator: torch.Generator,
    budget: Budget,
) -> Prediction:
    """A single request's answer. Raises BudgetExceededError where there is none."""
    (outcome,) = predict_together([Request(images=images, generator=generator, budget=budget)])
    if isinstance(outcome, BudgetExceededError):
        raise outcome
    return outcome


def draw_seed(generator: torch.Generator) -> int:
    """One seed a call."""
    return int(torch.randint(2**62, (), generator=generator))


def interruptions(budgets: Sequence[Budget]) -> list[Interruption | None]:
    """Why each row must stop, or None; a budget that several rows share is looked at once."""
    seen: dict[int, Interruption | None] = {}
    for budget in budgets:
        if id(budget) not in seen:
            seen[id(budget)] = budget.interruption()
    return [seen[id(budget)] for budget in budgets]


@runtime_checkable
class Defence(Protocol):
    """A defence: an answer for clients, and the best differentiable path to it for attackers."""

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        ...

    @property
    def resources(self) -> Resources:
        """What it is made of."""
        ...

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        """Answers for ``images`` ``[N, C, H, W]``. Leaves no trace: the next call starts from the same weights.

        Raises BudgetExceededError where the budget ended before there was any answer.
        """
        ...

    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        """The same for several callers at once: each gets the answer it would get alone, to 1e-4, and in its place
        the error where its budget ended before there was any."""
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


def describe_neighbors(
    neighbors: Neighbors, exemplars: ExemplarStore, counted: torch.Tensor | None = None
) -> tuple[Neighborhood, ...]:
    """One Neighborhood a row. ``counted`` bool ``[B, K]``: those that had a say; all unless given."""
    everything, distances = neighbors.ids.cpu(), neighbors.distances.cpu()
    labels = exemplars.gather_labels(everything, torch.device("cpu"))  # [B, K]
    said = torch.ones_like(everything, dtype=torch.bool) if counted is None else counted.cpu()
    attacked = (everything >= exemplars.clean_count) & said
    fractions = (attacked.sum(1) / said.sum(1).clamp_min(1)).tolist()
    everyone = bool(said.all())
    described = []
    for row, ids in enumerate(everything):
        chosen = slice(None) if everyone else said[row]
        counts = np.bincount(labels[row][chosen].numpy())
        ranked = sorted(np.flatnonzero(counts).tolist(), key=lambda label: -counts[label])  # stable: ties by label
        described.append(
            Neighborhood(
                ids=ids[chosen],
                distances=distances[row][chosen],
                label_counts={label: int(counts[label]) for label in ranked},
                adversarial_fraction=fractions[row],
            )
        )
    return tuple(described)
