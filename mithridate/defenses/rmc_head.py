"""RMC on the last linear layer only: all images of a request at once, on stored features.

Runtime masking and cleansing (Wu, Yuan, Wu; ICML 2020) fine-tunes the network for each image on its nearest exemplars,
clean and adversarial. Here only the head moves, so it is fine-tuned on stored feature vectors, the problem is convex,
and a whole request is one batched optimisation. Every image starts from the base weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mithridate.defenses.base import (
    Adaptation,
    Budget,
    PhaseClock,
    Prediction,
    Resources,
    StopReason,
    describe_neighbors,
)
from mithridate.defenses.none import base_pass
from mithridate.defenses.options import canonical, require
from mithridate.types import Images, Logits

_BETA1, _BETA2, _TINY = 0.9, 0.999, 1e-8  # Adam's published constants (Kingma and Ba 2015)


_NUMBERS_AT_A_TIME = 4_000_000
"""float64 weights and features of one chunk: 32 MB, in about ten copies while it is fitted."""


@dataclass(frozen=True, kw_only=True)
class RMCHeadConfig:
    """``neighbors`` K; Adam's ``learning_rate``; at most ``steps`` full-batch steps; an image is done (``converged``)
    once the mean cross-entropy of its neighbours is below ``tolerance``."""

    neighbors: int = 256
    learning_rate: float = 0.1
    steps: int = 50
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        require("rmc", "neighbors", self.neighbors, 1, 65_536)
        require("rmc", "learning_rate", self.learning_rate, 1e-9, 100)
        require("rmc", "steps", self.steps, 1, 10_000)
        require("rmc", "tolerance", self.tolerance, 0, 100)


@dataclass(frozen=True, kw_only=True)
class HeadFit:
    """Fitted heads: float64 ``weight`` ``[B, C, D + 1]`` (the bias is the last column), and how each fit ended."""

    weight: torch.Tensor
    adaptations: tuple[Adaptation, ...]

    def logits(self, head_input: torch.Tensor) -> Logits:
        """``[B, D]``, one row a head, to logits ``[B, C]``; differentiable in ``head_input``."""
        return torch.einsum("bcd,bd->bc", self.weight, F.pad(head_input.double(), (0, 1), value=1.0))


@dataclass(frozen=True, kw_only=True)
class RMCHead:
    """Serves ``rmc`` (``rmc:scope=head``)."""

    resources: Resources
    config: RMCHeadConfig = RMCHeadConfig()

    def __post_init__(self) -> None:
        _ = self.resources.classifier.head  # says now, not at the first request, where there is none

    @property
    def name(self) -> str:
        return canonical("rmc", self.config)

    @torch.no_grad()
    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        del generator  # nothing here is random
        budget.check()
        classifier, exemplars = self.resources.classifier, self.resources.exemplars
        clock = PhaseClock(classifier.device)
        with clock.phase("embed"):
            base = base_pass(classifier, images.to(classifier.device))
        with clock.phase("search"):
            neighbors = self.resources.index.search(base.embedding, self.config.neighbors)
        with clock.phase("adapt"):
            logits, adaptations = self._adapt(base.head_input, neighbors.ids, budget)
        with clock.phase("predict"):
            scores = logits.softmax(1).float().cpu()
            described = describe_neighbors(neighbors, exemplars)
        return Prediction(
            scores=scores,
            base_scores=base.logits.softmax(1).cpu(),
            adaptations=adaptations,
            neighborhoods=described,
            seconds=clock.seconds,
        )

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        """The adapted heads are found for these very images and then held constant; the gradient is the trunk's."""
        del generator
        base = base_pass(self.resources.classifier, images)
        with torch.no_grad():
            neighbors = self.resources.index.search(base.embedding, self.config.neighbors)
        return self._adapt(base.head_input, neighbors.ids, budget)[0]

    def _adapt(
        self, head_input: torch.Tensor, ids: torch.Tensor, budget: Budget
    ) -> tuple[Logits, tuple[Adaptation, ...]]:
        """Logits ``[B, C]`` of heads fitted to the exemplars ``ids`` ``[B, K]``; differentiable in ``head_input``.

        As many images at a time as memory allows: a thousand classes and 2,048 features make 16 MB an image and copy.
        """
        classifier, exemplars = self.resources.classifier, self.resources.exemplars
        classes, width = classifier.head.weight.shape
        rows = max(1, _NUMBERS_AT_A_TIME // (width * (classes + ids.shape[1])))
        logits: list[torch.Tensor] = []
        adaptations: list[Adaptation] = []
        for inputs, chosen in zip(head_input.split(rows), ids.split(rows), strict=True):
            with torch.no_grad():
                features = exemplars.features[chosen].to(classifier.device)  # [rows, K, D]
                labels = exemplars.labels[chosen].to(classifier.device)  # [rows, K]
                fit = fit_heads(features, labels, classifier.head, self.config, budget)
            logits.append(fit.logits(inputs))
            adaptations.extend(fit.adaptations)
        return torch.cat(logits), tuple(adaptations)


def fit_heads(
    features: torch.Tensor, labels: torch.Tensor, head: torch.nn.Linear, config: RMCHeadConfig, budget: Budget
) -> HeadFit:
    """Minimises the mean cross-entropy of each row's neighbours over a head of its own, starting from ``head``.

    ``features`` ``[B, K, D]``, ``labels`` int64 ``[B, K]``. The arithmetic is float64: what another batch size changes
    in the rounding then stays far below any score a client sees.
    """
    bias = head.weight.new_zeros(head.out_features) if head.bias is None else head.bias
    one = 0.0 if head.bias is None else 1.0  # the bias is one more weight; with an input of 0 it stays where it is
    inputs = F.pad(features.double(), (0, 1), value=one)  # [B, K, D + 1]
    targets = F.one_hot(labels, head.out_features).double()  # [B, K, C]
    start = torch.cat([head.weight, bias[:, None]], 1).double()
    weight = start.expand(len(features), -1, -1).clone()  # [B, C, D + 1]
    rows = torch.arange(len(features), device=features.device)  # which image each remaining row belongs to
    result, steps, reasons = weight.clone(), [0] * len(rows), _unfinished(len(rows))
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)  # Adam's moments
    limit = budget.steps(config.steps)
    for step in range(1, limit + 2):
        log_probabilities = (inputs @ weight.mT).log_softmax(-1)  # [rows, K, C]
        done = -(log_probabilities * targets).sum((1, 2)) / inputs.shape[1] < config.tolerance
        interruption = budget.interruption()
        if step > limit or interruption or bool(done.any()):
            leaving = done if step <= limit and not interruption else torch.ones_like(done)
            for row, converged in zip(rows[leaving].tolist(), done[leaving].tolist(), strict=True):
                steps[row] = step - 1
                reasons[row] = "converged" if converged else interruption or "max_steps"
            result[rows[leaving]] = weight[leaving]
            keep = ~leaving
            rows, inputs, targets = rows[keep], inputs[keep], targets[keep]
            weight, first, second, log_probabilities = (
                weight[keep],
                first[keep],
                second[keep],
                log_probabilities[keep],
            )
        if not len(rows):
            break
        gradient = (log_probabilities.exp() - targets).mT @ inputs / inputs.shape[1]
        first = _BETA1 * first + (1 - _BETA1) * gradient
        second = _BETA2 * second + (1 - _BETA2) * gradient.square()
        scale = (second / (1 - _BETA2**step)).sqrt_().add_(_TINY)
        weight = weight - config.learning_rate * (first / (1 - _BETA1**step)) / scale
    fates = tuple(Adaptation(steps=n, stop_reason=why) for n, why in zip(steps, reasons, strict=True))
    return HeadFit(weight=result, adaptations=fates)


def _unfinished(count: int) -> list[StopReason]:
    return ["max_steps"] * count
