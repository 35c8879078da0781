"""RMC on all weights: the published procedure, one image after the other, reset for each.

Wu, Yuan, Wu: Adversarial Robustness via Runtime Masking and Cleansing, ICML 2020. Constants as in the CIFAR-10
re-implementation of Chen et al. (ICLR 2022). Two deliberate differences: every image starts from the base weights and a
fresh optimiser (the published code carries both from one test image to the next and calibrates in between), and the
best weights on the validation part are restored, the unadapted ones included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
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
from mithridate.types import Images, Logits, to_images

VALIDATION_SHARE = 0.2
"""The nearest fifth of the neighbours is held out."""


@dataclass(frozen=True, kw_only=True)
class RMCAllConfig:
    """``neighbors`` K; Adam with ``learning_rate`` and ``batch_size``; at most ``epochs``, stopping after ``patience``
    epochs without a better loss on the held-out nearest fifth of the neighbours."""

    neighbors: int = 1024
    learning_rate: float = 2.5e-5
    epochs: int = 100
    batch_size: int = 128
    patience: int = 5

    def __post_init__(self) -> None:
        require("rmc", "neighbors", self.neighbors, 2, 65_536)
        require("rmc", "learning_rate", self.learning_rate, 1e-9, 100)
        require("rmc", "epochs", self.epochs, 1, 1_000)
        require("rmc", "batch_size", self.batch_size, 1, 65_536)
        require("rmc", "patience", self.patience, 1, 1_000)


@dataclass(frozen=True, kw_only=True)
class RMCAll:
    """Serves ``rmc:scope=all``. Seconds to minutes an image: for comparison, not for traffic."""

    resources: Resources
    config: RMCAllConfig = RMCAllConfig()

    @property
    def name(self) -> str:
        return canonical("rmc", self.config, prefix={"scope": "all"})

    @torch.no_grad()
    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        budget.check()
        classifier = self.resources.classifier
        clock = PhaseClock(classifier.device)
        images = images.to(classifier.device)
        with clock.phase("embed"):
            base = base_pass(classifier, images)
        with clock.phase("search"):
            neighbors = self.resources.index.search(base.embedding, self.config.neighbors)
        seed = _draw_seed(generator)
        logits, adaptations = [], []
        for number, (image, ids) in enumerate(zip(images.split(1), neighbors.ids, strict=True)):
            if number:
                budget.check()  # an image that is not begun has no answer to break off
            with clock.phase("adapt"):
                network, adaptation = self._adapt(ids, seed, budget)
            with clock.phase("predict"):
                logits.append(network(classifier.normalise(image)))
            adaptations.append(adaptation)
        return Prediction(
            scores=torch.cat(logits).softmax(1).cpu(),
            base_scores=base.logits.softmax(1).cpu(),
            adaptations=tuple(adaptations),
            neighborhoods=describe_neighbors(neighbors, self.resources.exemplars),
            seconds=clock.seconds,
        )

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        """A network is adapted to each image and then held constant; the gradient is that network's."""
        classifier = self.resources.classifier
        with torch.no_grad():
            neighbors = self.resources.index.search(classifier.embed(images), self.config.neighbors)
        seed = _draw_seed(generator)
        logits = []
        for image, ids in zip(images.split(1), neighbors.ids, strict=True):
            network, _ = self._adapt(ids, seed, budget)
            logits.append(network.requires_grad_(False)(classifier.normalise(image)))
        return torch.cat(logits)

    def _adapt(self, ids: torch.Tensor, seed: int, budget: Budget) -> tuple[nn.Module, Adaptation]:
        """A private network fine-tuned on the exemplars ``ids`` ``[K]``, nearest first."""
        classifier, exemplars = self.resources.classifier, self.resources.exemplars
        held_out = max(1, int(VALIDATION_SHARE * len(ids)))
        pixels = to_images(exemplars.pixels(ids)).to(classifier.device)
        inputs, labels = classifier.normalise(pixels), exemplars.labels[ids].to(classifier.device)
        network = classifier.private_network()
        tuner = FineTuner(network, self.config, budget, torch.Generator().manual_seed(seed))
        adaptation = tuner.run((inputs[held_out:], labels[held_out:]), (inputs[:held_out], labels[:held_out]))
        return network, adaptation


Part = tuple[torch.Tensor, torch.Tensor]
"""Normalised images ``[M, C, H, W]`` and labels ``[M]``."""


class FineTuner:
    """Adam on all weights of one private network, with early stopping and the best weights restored."""

    def __init__(self, network: nn.Module, config: RMCAllConfig, budget: Budget, generator: torch.Generator) -> None:
        self._network = network
        self._config = config
        self._budget = budget
        self._generator = generator
        self._optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
        self._steps = 0

    def run(self, train: Part, validation: Part) -> Adaptation:
        """Fine-tunes the network in place; afterwards it holds the weights with the lowest validation loss."""
        best_loss, best_state = self._loss(validation), self._state()
        stale = 0
        reason: StopReason = "max_steps"
        for _ in range(self._config.epochs):
            ended = self._epoch(train)
            loss = self._loss(validation) if ended in (None, "max_steps") else float("inf")
            stale = stale + 1 if loss >= best_loss else 0
            if loss < best_loss:
                best_loss, best_state = loss, self._state()
            if ended or stale >= self._config.patience:
                reason = ended or "patience"
                break
        self._network.load_state_dict(best_state)
        return Adaptation(steps=self._steps, stop_reason=reason)

    def _epoch(self, train: Part) -> StopReason | None:
        """One pass in random order. Says why it broke off, if it did."""
        inputs, labels = train
        order = torch.randperm(len(inputs), generator=self._generator).to(inputs.device)
        for batch in order.split(self._config.batch_size):
            interruption = self._budget.interruption()
            if interruption:
                return interruption
            if self._budget.max_steps is not None and self._steps >= self._budget.max_steps:
                return "max_steps"
            with torch.enable_grad():
                loss = F.cross_entropy(self._network(inputs[batch]), labels[batch])
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
            self._optimizer.step()
            self._steps += 1
        return None

    @torch.no_grad()
    def _loss(self, part: Part) -> float:
        inputs, labels = part
        chunks = zip(inputs.split(256), labels.split(256), strict=True)
        return sum(F.cross_entropy(self._network(x), y, reduction="sum").item() for x, y in chunks) / len(inputs)

    def _state(self) -> dict[str, torch.Tensor]:
        return {key: value.detach().clone() for key, value in self._network.state_dict().items()}


def _draw_seed(generator: torch.Generator) -> int:
    """One seed a call, the same for each of its images: an answer does not depend on the place in the batch."""
    return int(torch.randint(2**62, (), generator=generator))
