"""RMC on the last blocks: the published fine-tuning, on stored activations, for all images of a batch at once.

The trunk is frozen, so what it makes of an exemplar is stored in the bundle, and only the layers behind the cut run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from mithridate.defenses.adapting import Adapted, Query, average_privately, join
from mithridate.defenses.base import Budget, Resources
from mithridate.defenses.fine_tuning import FineTuning, Plan, Tuned, check
from mithridate.defenses.learner import Examples, Learner, Precision, chooses_bfloat16, runs_together
from mithridate.defenses.private_weights import PrivateWeights
from mithridate.errors import ModelError

_BYTES_AT_A_TIME = 512 * 2**20
"""Activations and weights of one chunk of images. An image that needs more has a chunk of its own."""

_COPIES = 6
"""Of an image's weights: themselves, two moments, the gradient, the best ones, and what a step works with."""


@dataclass(frozen=True, kw_only=True)
class TailConfig:
    """Adam with ``learning_rate`` on mini-batches of ``batch_size``; at most ``epochs``, stopping after ``patience`` of
    them without a better loss on the nearest share of the neighbours, ``held_out`` (0: none), or once the mean loss of
    an epoch is below ``tolerance``. ``anchor`` times the squared distance from the base weights is added to the loss,
    as a proximal step after each of Adam's.
    The weights that suit the held-out neighbours best stay, the base weights among them.

    ``refit``: then as many epochs again from the base weights on, now on all neighbours. Off unless asked for: at
    learning rates that repair attacks nothing is left to say when it is too much, and it was measured to harm.
    ``precision`` of the fine-tuning: ``auto`` is bfloat16 on a CPU that has it in hardware; the answer is float32.
    """

    learning_rate: float = 1e-2
    epochs: int = 10
    batch_size: int = 16
    patience: int = 5
    held_out: float = 0.2
    refit: bool = False
    tolerance: float = 0.0
    anchor: float = 0.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TailAdapter:
    """Adapts what lies behind the cut. Raises ModelError where the bundle has no activations for that."""

    resources: Resources
    config: TailConfig
    _private: PrivateWeights = field(init=False, repr=False)
    _bfloat16: bool = field(init=False, repr=False)
    _together: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        classifier, activations = self.resources.classifier, self.resources.exemplars.activations
        if activations is None or not classifier.has_tail:
            raise ModelError("the bundle stores no activations for a tail; build it with --tail-layer auto")
        example = activations[:2].to(classifier.device, classifier.mean.dtype)
        # A GPU is kept busy only by many images in one run. A CPU is, by one: there grouped convolutions cost more.
        together = classifier.device.type != "cpu"
        private = PrivateWeights(classifier.tail, example, channels_last=not together)
        together = together and runs_together(private, example)
        # In one run, bfloat16 rounds differently with every number of images: an answer would depend on its company.
        precision = "float32" if together and self.config.precision == "auto" else self.config.precision
        object.__setattr__(self, "_private", private)
        object.__setattr__(self, "_together", together)
        object.__setattr__(self, "_bfloat16", chooses_bfloat16(precision, private, example))

    @property
    def batches(self) -> bool:
        return True

    @property
    def changes(self) -> Literal["head", "tail", "all"]:
        return "tail"

    @property
    def repeatable(self) -> bool:
        return False

    def adapt(self, query: Query) -> Adapted:
        """As many images at a time as memory allows."""
        activations, start = self.resources.exemplars.activations, self._private.start
        assert activations is not None
        bytes_of_neighbors = query.selection.ids.shape[1] * activations[0].numel() * activations.element_size()
        bytes_of_weights = _COPIES * start.numel() * start.element_size()
        rows = max(1, _BYTES_AT_A_TIME // (bytes_of_neighbors + bytes_of_weights))
        return join([self._adapt(query.rows(first, first + rows)) for first in range(0, len(query), rows)])

    def _adapt(self, query: Query) -> Adapted:
        network, dtype, activation = self._private.function(), self._private.start.dtype, query.base.activation
        assert activation is not None
        learner = Learner(
            network=network,
            prepare=lambda stored: stored.to(dtype),
            together=self._together,
            bfloat16=self._bfloat16,
        )
        with torch.no_grad():
            tuned = self._tune(learner, query)
        adaptations = tuple(fate.adaptation for fate in tuned)
        if query.average is not None:
            adapted = [self._private.parameters(fate.weights) if fate.kept else None for fate in tuned]
            return average_privately(query, self.resources.classifier, adaptations, list(adapted))
        logits = [
            network(fate.weights, activation[row : row + 1]) if fate.kept else query.base.logits[row : row + 1]
            for row, fate in enumerate(tuned)
        ]
        return Adapted(logits=torch.cat(logits), adaptations=adaptations)

    def _tune(self, learner: Learner, query: Query) -> list[Tuned]:
        selection, held = query.selection.hold_out(self.config.held_out)
        query = replace(query, selection=selection)
        plan = Plan(settings=self.config, neighbors=selection.ids.shape[1], held=held, restore_best=True)
        first = self._run(learner, query, plan)
        if not (held and self.config.refit):
            return first
        again = replace(plan, settings=replace(self.config, tolerance=0.0), held=0)
        limits = [_steps_again(fate, budget, plan, again) for fate, budget in zip(first, query.budgets, strict=True)]
        if not any(limits):
            return first
        last = self._run(learner, query, again, limits)
        return [_joined(*fates) for fates in zip(first, last, strict=True)]

    def _run(self, learner: Learner, query: Query, plan: Plan, limits: list[int] | None = None) -> list[Tuned]:
        exemplars, device = self.resources.exemplars, self._private.start.device

        def load(rows: list[int]) -> Examples:
            ids = query.selection.ids[rows]
            return Examples(
                inputs=exemplars.gather_activations(ids, device),
                labels=exemplars.gather_labels(ids, device),
                weights=query.selection.weights[rows].detach().to(device),
            )

        return FineTuning(
            learner,
            self._private.start,
            plan,
            load=load,
            budgets=query.budgets,
            seeds=query.seeds,
            limits=limits,
        ).run()


def _steps_again(first: Tuned, budget: Budget, plan: Plan, again: Plan) -> int:
    """As many epochs on all neighbours as were kept; none where the budget has no room for them."""
    if first.reason in ("deadline", "cancelled"):
        return 0
    steps = first.kept // plan.batches * again.batches
    return steps if budget.max_steps is None or first.steps + steps <= budget.max_steps else 0


def _joined(first: Tuned, last: Tuned) -> Tuned:
    """``first`` decided how long it takes, ``last`` gave the weights; where that was broken off, ``first`` did."""
    steps = first.steps + last.steps
    if last.reason in ("deadline", "cancelled"):
        return replace(first, steps=steps, reason=last.reason)
    return replace(first, steps=steps, weights=last.weights) if last.kept else first
