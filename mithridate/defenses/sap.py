"""SAP, stochastic activation pruning: the mean of many passes, each through activations of which a part is dropped.

Dhillon et al.: Stochastic Activation Pruning for Robust Adversarial Defense (ICLR 2018), with the erratum (arXiv
2010.00071): behind every non-linearity, as many draws as the layer has activations, and the *softmax* of 100 passes is
averaged. One pass without averaging is what was first declared broken; the gradient of the unpruned network (BPDA) is
what breaks it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from mithridate.defenses.averaging import Draws, Run
from mithridate.defenses.base import Resources
from mithridate.defenses.networks import Network
from mithridate.defenses.options import require
from mithridate.defenses.pruned_network import ChangedTrunk
from mithridate.defenses.pruning import Sampling, prune
from mithridate.types import Images, Logits

_BYTES_A_NUMBER = 64
"""Of the largest activation: the draws, their sums and counts, mask and result."""


@dataclass(frozen=True, kw_only=True)
class SAPConfig:
    """``passes`` are averaged; in each, behind every activation function (or those in ``layers``, joined by ``/``), as
    many draws as ``fraction`` of its size. ``sampling``: ``multinomial`` as published, or ``binomial``, each activation
    for itself: the same means, several times faster.

    ``backward``, for attackers: through the pruned passes with the pruning of every layer passed straight through
    (``straight-through``, BPDA layer by layer), with mask and scale as constants (``masked``), or through the unpruned
    network alone (``vanilla``, as the erratum reads). ``attack_passes`` are averaged for it.
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
class Pruner:
    """A pass drops a part of every activation.

    Raises ModelError for a network that cannot be traced or has no linear layer at its end.
    """

    resources: Resources
    config: SAPConfig
    trunk: ChangedTrunk = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _ = self.resources.classifier.head
        layers = None if self.config.layers == "all" else self.config.layers.split("/")
        object.__setattr__(self, "trunk", ChangedTrunk(self.resources.classifier, layers))

    @property
    def bytes_a_row(self) -> int:
        return int(_BYTES_A_NUMBER * max(self.trunk.sizes) * max(1.0, self.config.fraction))

    def begin(self, images: Images, network: Network) -> Run:
        return self._run(images, network, straight=False)

    def begin_attack(self, images: Images, network: Network) -> Run:
        if self.config.backward != "vanilla":
            return self._run(images, network, straight=self.config.backward == "straight-through")
        with torch.no_grad():
            pruned = self._run(images, network, straight=False)
        plain = network.logits(images)

        def run(draws: Draws) -> Logits:
            with torch.no_grad():
                answered = pruned(draws)
            usual = plain.repeat_interleave(draws.copies, 0)
            return usual + (answered - usual).detach()

        return run

    def _run(self, images: Images, network: Network, *, straight: bool) -> Run:
        begun, config = network.trunk(self.trunk).begin(images), self.config

        def run(draws: Draws) -> Logits:
            generators = draws.generators  # one for all layers: each goes on where the one before it ended

            def change(activation: torch.Tensor) -> torch.Tensor:
                pruned = prune(activation, fraction=config.fraction, sampling=config.sampling, generators=generators)
                return activation + (pruned - activation).detach() if straight else pruned

            return network.head(begun.run(change, draws.copies))

        return run
