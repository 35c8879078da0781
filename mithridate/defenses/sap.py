"""SAP, stochastic activation pruning: the mean of many passes, each through activations of which a part is dropped.

Dhillon et al.: Stochastic Activation Pruning for Robust Adversarial Defense (ICLR 2018), with the erratum (arXiv
2010.00071): behind every non-linearity, as many draws as the layer has activations, and the *softmax* of 100 passes is
averaged. One pass without averaging is what was first declared broken; the gradient of the unpruned network (BPDA) is
what breaks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from mithridate.defenses.base import (
    Batch,
    Budget,
    Outcome,
    PhaseClock,
    Prediction,
    Request,
    Resources,
    answer_one,
    gather,
)
from mithridate.defenses.none import base_pass
from mithridate.defenses.options import canonical, require
from mithridate.defenses.pruned_network import ChangedTrunk
from mithridate.defenses.pruning import Sampling, prune
from mithridate.defenses.randomness import pass_generators
from mithridate.errors import BudgetExceededError
from mithridate.types import Images, Logits

_BYTES_AT_A_TIME = 256 * 2**20
"""What one run of several passes may take, roughly."""

_BYTES_A_NUMBER = 64
"""Of the largest activation: the draws, their sums and counts, mask and result."""


@dataclass(frozen=True, kw_only=True)
class SAPConfig:
    """``passes`` are averaged; in each, behind every activation function (or those in ``layers``, joined by ``+``), as
    many draws as ``fraction`` of its size. ``sampling``: ``multinomial`` as published, or ``binomial``, each activation
    for itself: the same means, several times faster.

    ``backward``, for attackers: through the pruned passes with the pruning of every layer passed straight through
    (``straight-through``, the erratum's BPDA), with mask and scale as constants (``masked``), or through the unpruned
    network alone (``vanilla``). ``attack_passes`` are averaged for it.
    """

    passes: int = 100
    fraction: float = 1.0
    sampling: Sampling = "multinomial"
    layers: str = "all"
    backward: Literal["straight-through", "masked", "vanilla"] = "straight-through"
    attack_passes: int = 10

    def __post_init__(self) -> None:
        require("sap", "passes", self.passes, 1, 100_000)
        require("sap", "fraction", self.fraction, 1e-6, 1e3)
        require("sap", "attack_passes", self.attack_passes, 1, 100_000)


@dataclass(frozen=True, kw_only=True)
class SAP:
    """Serves ``sap``. Raises ModelError for a network that cannot be traced or has no linear layer at its end."""

    resources: Resources
    config: SAPConfig = SAPConfig()
    _trunk: ChangedTrunk = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _ = self.resources.classifier.head
        layers = None if self.config.layers == "all" else self.config.layers.split("+")
        object.__setattr__(self, "_trunk", ChangedTrunk(self.resources.classifier, layers))

    @property
    def name(self) -> str:
        return canonical("sap", self.config, SAPConfig())

    @property
    def batches(self) -> bool:
        """One image's passes fill a batch by themselves."""
        return False

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        return answer_one(self.predict_together, images, generator, budget)

    @torch.no_grad()
    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        """One after the other. Looks at the budget between runs."""
        outcomes: list[Outcome] = []
        for request in requests:
            try:
                request.budget.check()
                outcomes.append(self._answer(gather([request], self.resources.classifier.device)))
            except BudgetExceededError as error:
                outcomes.append(error)
        return outcomes

    def _answer(self, batch: Batch) -> Prediction:
        classifier = self.resources.classifier
        clock = PhaseClock(classifier.device)
        with clock.phase("embed"):
            base = base_pass(classifier, batch.images).logits.softmax(1).float().cpu()
        with clock.phase("average"):
            scores = self.mean_scores(batch.images, batch.seeds, batch.budgets)
        nothing = (None,) * len(batch.images)
        return Prediction(
            scores=scores.float().cpu(),
            base_scores=base,
            adaptations=nothing,
            neighborhoods=nothing,
            seconds=clock.seconds,
        )

    def mean_scores(self, images: Images, seeds: Sequence[int], budgets: Sequence[Budget]) -> torch.Tensor:
        """float64 ``[N, C]``: the mean softmax of all passes. Raises BudgetExceededError where a budget ends."""
        classifier, config = self.resources.classifier, self.config
        parts = []
        for rows in torch.arange(len(images)).split(self._images_at_a_time()):
            some, passes = images[rows[0] : rows[-1] + 1], 0
            begun = self._trunk.begin(some)
            own_seeds = [seeds[row] for row in rows.tolist()]
            total = torch.zeros(len(some), classifier.spec.num_classes, dtype=torch.float64, device=some.device)
            while passes < config.passes:
                for budget in {id(budget): budget for budget in budgets}.values():
                    budget.check()
                copies = min(self._rows_at_a_time() // len(some), config.passes - passes)
                generators = pass_generators(own_seeds, some, range(passes, passes + copies))
                head_inputs = begun.run(lambda h, g=generators: self._pruned(h, g), copies)  # type: ignore[misc]
                scores = classifier.head(head_inputs).double().softmax(1)
                total += scores.view(len(some), copies, -1).sum(1)
                passes += copies
            parts.append(total / config.passes)
        return torch.cat(parts)

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        """log of the mean softmax of ``attack_passes``, with fresh draws at every call; backward as the options say."""
        budget.check()
        classifier, config, passes = self.resources.classifier, self.config, self.config.attack_passes
        seed = int(torch.randint(2**62, (), generator=generator))
        generators = pass_generators([seed] * len(images), images, range(passes))
        straight = config.backward == "straight-through"

        def change(activation: torch.Tensor) -> torch.Tensor:
            pruned = self._pruned(activation, generators)
            return activation + (pruned - activation).detach() if straight else pruned

        with torch.set_grad_enabled(torch.is_grad_enabled() and config.backward != "vanilla"):
            head_inputs = self._trunk.begin(images).run(change, passes)
            each: Logits = classifier.head(head_inputs).double().log_softmax(1).view(len(images), passes, -1)
            mean = each.logsumexp(1)
        if config.backward != "vanilla":
            return mean
        plain: Logits = classifier.head(classifier.trace(images).head_input).double().log_softmax(1)
        return plain + (mean - plain).detach()

    def _pruned(self, activation: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        return prune(activation, fraction=self.config.fraction, sampling=self.config.sampling, generators=generators)

    def _rows_at_a_time(self) -> int:
        """Passes of one image in one run."""
        largest = max(self._trunk.sizes) * max(1.0, self.config.fraction)
        return max(1, int(_BYTES_AT_A_TIME / (_BYTES_A_NUMBER * largest)))

    def _images_at_a_time(self) -> int:
        return max(1, min(64, self._rows_at_a_time()))
