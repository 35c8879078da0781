"""RMC on all weights: the published procedure, one image after the other, reset for each.

Wu, Yuan, Wu: Adversarial Robustness via Runtime Masking and Cleansing, ICML 2020. Constants as in the CIFAR-10
re-implementation of Chen et al. (ICLR 2022). Two deliberate differences: every image starts from the base weights and a
fresh optimiser (the published code carries both from one test image to the next and calibrates in between), and the
best weights on the validation part are restored, the unadapted ones included (``restore=last`` leaves that out).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from mithridate.defenses.adapting import Adapted, Query, average_privately, join
from mithridate.defenses.base import Resources
from mithridate.defenses.fine_tuning import FineTuning, Plan, check
from mithridate.defenses.learner import Examples, Learner, Precision, chooses_bfloat16
from mithridate.defenses.private_weights import PrivateWeights
from mithridate.types import to_images


@dataclass(frozen=True, kw_only=True)
class AllConfig:
    """Adam with ``learning_rate`` on mini-batches of ``batch_size``; at most ``epochs``, stopping after ``patience`` of
    them without a better loss on the nearest share of the neighbours, ``held_out`` (0: none), or once the mean loss of
    an epoch is below ``tolerance``. ``anchor`` times the squared distance from the base weights is added to the loss,
    as a proximal step after each of Adam's.

    ``restore``: the weights that suit the held-out neighbours best, the base weights among them, or the last ones, as
    published. ``precision`` of the fine-tuning: ``auto`` is bfloat16 where the device has it in hardware; the answer is
    float32.
    """

    learning_rate: float = 2.5e-5
    epochs: int = 100
    batch_size: int = 128
    patience: int = 5
    held_out: float = 0.2
    restore: Literal["best", "last"] = "best"
    tolerance: float = 0.0
    anchor: float = 0.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class AllAdapter:
    """Adapts all weights. Seconds an image on a CPU: for comparison and for the patient, not for traffic."""

    resources: Resources
    config: AllConfig
    _private: PrivateWeights = field(init=False, repr=False)
    _bfloat16: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        classifier = self.resources.classifier
        random = torch.Generator().manual_seed(0)
        images = torch.rand(2, *classifier.spec.image_shape, generator=random).to(classifier.device)
        example = classifier.normalise(images)
        private = PrivateWeights(classifier.network, example)
        object.__setattr__(self, "_private", private)
        object.__setattr__(self, "_bfloat16", chooses_bfloat16(self.config.precision, private, example))

    @property
    def batches(self) -> bool:
        return False

    @property
    def changes(self) -> Literal["head", "tail", "all"]:
        return "all"

    @property
    def repeatable(self) -> bool:
        return False

    def adapt(self, query: Query) -> Adapted:
        return join([self._adapt(query.rows(row, row + 1)) for row in range(len(query))])

    def _adapt(self, query: Query) -> Adapted:
        classifier, (selection, held) = self.resources.classifier, query.selection.hold_out(self.config.held_out)
        query = replace(query, selection=selection)
        network = self._private.function()
        learner = Learner(
            network=network,
            # Kept as bytes and normalised a mini-batch at a time: a hundredth of a step, and a quarter of the memory.
            prepare=lambda pixels: classifier.normalise(to_images(pixels)),
            bfloat16=self._bfloat16,
        )
        plan = Plan(
            settings=self.config,
            neighbors=selection.ids.shape[1],
            held=held,
            restore_best=self.config.restore == "best",
        )
        with torch.no_grad():
            (tuned,) = FineTuning(
                learner,
                self._private.start,
                plan,
                load=lambda _: self._examples(query),
                budgets=query.budgets,
                seeds=query.seeds,
            ).run()
        if query.average is not None:
            adapted = self._private.parameters(tuned.weights) if tuned.kept else None
            return average_privately(query, classifier, (tuned.adaptation,), [adapted])
        logits = network(tuned.weights, classifier.normalise(query.images)) if tuned.kept else query.base.logits
        return Adapted(logits=logits, adaptations=(tuned.adaptation,))

    def _examples(self, query: Query) -> Examples:
        exemplars, device, ids = self.resources.exemplars, self.resources.classifier.device, query.selection.ids
        return Examples(
            inputs=exemplars.pixels(ids[0])[None].to(device),
            labels=exemplars.gather_labels(ids, device),
            weights=query.selection.weights.detach().to(device),
        )
