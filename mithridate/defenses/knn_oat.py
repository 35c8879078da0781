"""``knn-oat``: online adversarial training on the nearest clean exemplars. A negative control: offline only.

Wu, Yuan, Wu (ICML 2020) name it as the obvious extension of adversarial training to a test image without a label, and
as one that does not work: an attacked image has been moved among the clean exemplars of a wrong class, and fine-tuning
on these teaches that class, however hard they are attacked. RMC differs in that the attacked copies are made beforehand
and can be *found*.

The authors give the steps (nearest neighbours in the training set, their adversarial examples added, fine-tuning on
both, answer), but neither the constants nor how the neighbours are attacked. Here untargeted, away from the neighbour's
true label, which is known (a target would need a class to be chosen), and on the network as it is at that very step, as
in adversarial training (Madry et al. 2018): the strongest form of the control, so that it does not fail for want of
trying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from mithridate.attacks import PGD, parse_pgd
from mithridate.defenses.base import (
    Adaptation,
    Batch,
    Budget,
    Outcome,
    PhaseClock,
    Prediction,
    Request,
    Resources,
    StopReason,
    answer_one,
    answer_together,
    describe_neighbors,
    draw_seed,
)
from mithridate.defenses.none import base_pass
from mithridate.defenses.options import canonical, require
from mithridate.errors import BudgetExceededError
from mithridate.models import Classifier
from mithridate.neighbors import NeighborIndex
from mithridate.types import Epsilon, Images, Logits, to_images


@dataclass(frozen=True, kw_only=True)
class KNNOATConfig:
    """``neighbors``: K; ``attack`` (``pgdN`` or ``fgsm``) at ``epsilon`` (as ``k/255``) on each of them.

    Adam with ``learning_rate`` on batches of ``batch_size`` neighbours and as many attacked ones, ``epochs`` times.
    None of these is published: 256 neighbours as for ``rmc``, the rest is our choice.
    """

    neighbors: int = 256
    attack: str = "pgd10"
    epsilon: str = "8/255"
    learning_rate: float = 3e-4
    epochs: int = 1
    batch_size: int = 16

    def __post_init__(self) -> None:
        require("knn-oat", "neighbors", self.neighbors, 1, 65_536)
        require("knn-oat", "learning_rate", self.learning_rate, 1e-9, 100)
        require("knn-oat", "epochs", self.epochs, 1, 1_000)
        require("knn-oat", "batch_size", self.batch_size, 1, 65_536)
        object.__setattr__(self, "epsilon", str(Epsilon.parse(self.epsilon)))
        object.__setattr__(self, "attack", self.pgd.name)

    @property
    def pgd(self) -> PGD:
        """The attack."""
        return parse_pgd(self.attack, epsilon=Epsilon.parse(self.epsilon))


@dataclass(frozen=True, kw_only=True)
class KNNOAT:
    """Serves ``knn-oat``, one image after the other, each from the base weights. Seconds to minutes an image."""

    offline: ClassVar[bool] = True
    """Not to be offered by a service."""

    resources: Resources
    config: KNNOATConfig = KNNOATConfig()
    _index: NeighborIndex = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        exemplars = self.resources.exemplars
        clean = torch.arange(len(exemplars)) < exemplars.clean_count
        object.__setattr__(self, "_index", self.resources.index.only(clean))

    @property
    def name(self) -> str:
        return canonical("knn-oat", self.config, KNNOATConfig())

    @property
    def batches(self) -> bool:
        """Whether requests gain by being answered together."""
        return False

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
        logits, adaptations = [], []
        for row, image in enumerate(batch.images.split(1)):
            with clock.phase("adapt"):
                network, adaptation = self._adapt(neighbors.ids[row], batch.seeds[row], batch.budgets[row])
            with clock.phase("predict"):
                adapted = adaptation.weights == "adapted"
                logits.append(network(classifier.normalise(image)) if adapted else base.logits[row : row + 1])
            adaptations.append(adaptation)
        with clock.phase("predict"):
            scores, base_scores = torch.cat(logits).softmax(1).float().cpu(), base.logits.softmax(1).float().cpu()
            described = describe_neighbors(neighbors, self.resources.exemplars)
        return Prediction(
            scores=scores,
            base_scores=base_scores,
            adaptations=tuple(adaptations),
            neighborhoods=described,
            seconds=clock.seconds,
        )

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        """A network is adapted to each image and then held constant (BPDA); the gradient is that network's."""
        classifier = self.resources.classifier
        with torch.no_grad():
            neighbors = self._index.search(classifier.embed(images), self.config.neighbors)
        seed, logits = draw_seed(generator), []
        for image, ids in zip(images.split(1), neighbors.ids, strict=True):
            network, _ = self._adapt(ids, seed, budget)
            logits.append(network.requires_grad_(False)(classifier.normalise(image)))
        return torch.cat(logits)

    def _adapt(self, ids: torch.Tensor, seed: int, budget: Budget) -> tuple[nn.Module, Adaptation]:
        """A private network trained on the exemplars ``ids`` ``[K]`` and on attacks on them."""
        trainer = _Trainer(self.resources.classifier, self.config, budget, torch.Generator().manual_seed(seed))
        device = self.resources.classifier.device
        labels = self.resources.exemplars.gather_labels(ids, device)
        reason = trainer.run(self.resources.exemplars.pixels(ids).to(device), labels)
        return trainer.network, Adaptation(
            steps=trainer.steps, stop_reason=reason, weights="adapted" if trainer.steps else "base"
        )


class _Trainer:
    """Adversarial training of one private network. It stays in evaluation mode: running statistics are frozen."""

    def __init__(
        self, classifier: Classifier, config: KNNOATConfig, budget: Budget, generator: torch.Generator
    ) -> None:
        self.network = classifier.private_network()
        self.steps = 0
        self._classifier, self._config = classifier, config
        self._budget, self._generator = budget, generator
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate)

    def run(self, pixels: torch.Tensor, labels: torch.Tensor) -> StopReason:
        """Trains on uint8 ``pixels`` ``[K, C, H, W]`` with ``labels`` ``[K]``; says why it ended."""
        try:
            for _ in range(self._config.epochs):
                order = torch.randperm(len(pixels), generator=self._generator).to(pixels.device)
                for rows in order.split(self._config.batch_size):
                    if self._budget.max_steps is not None and self.steps >= self._budget.max_steps:
                        return "max_steps"
                    self._step(pixels[rows], labels[rows])
        except BudgetExceededError as ended:
            return "cancelled" if ended.reason == "cancelled" else "deadline"
        return "max_steps"

    def _step(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        """Attacks a batch on the network as it is now, and fits both; or raises BudgetExceededError, all unchanged."""
        with torch.enable_grad():
            attacked = self._config.pgd.run(self._forward, pixels, labels, generator=self._generator)
            images = to_images(torch.cat([pixels, attacked]))
            loss = F.cross_entropy(self._forward(images), labels.repeat(2))
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self._optimizer.step()
        self.steps += 1

    def _forward(self, images: Images) -> Logits:
        self._budget.check()
        logits: Logits = self.network(self._classifier.normalise(images))
        return logits
