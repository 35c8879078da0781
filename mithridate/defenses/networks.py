"""What a random pass runs on: the base model, or one whose weights were adapted to an image."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import nn

from mithridate.defenses.pruned_network import ChangedTrunk
from mithridate.models import Classifier
from mithridate.types import Images, Logits

Module = TypeVar("Module", bound=nn.Module)

Parameters = Mapping[int, nn.Parameter]
"""Adapted parameters, by the ``id`` of the base model's parameter that each stands for."""


class Heads(Protocol):
    """A head of its own for each of ``N`` images."""

    def __call__(self, points: torch.Tensor) -> Logits:
        """For inputs of the last layer ``[N, P, D]``: log scores (or logits) ``[N, P, C]``."""
        ...

    def held(self) -> Heads:
        """The same as constants: no gradient goes into what they were made of."""
        ...

    def rows(self, start: int, stop: int) -> Heads:
        """Those of some of the images."""
        ...


class Network(Protocol):
    """A classifier for ``N`` images, run on copies of them: rows ``[N * copies]``, those of an image side by side.

    Answers are logits ``[rows, C]``, or ``[rows, G, C]`` where one run of the trunk serves ``G`` heads.
    """

    def logits(self, images: Images) -> Logits:
        """For ``[rows, C, H, W]``."""
        ...

    def head(self, points: torch.Tensor) -> Logits:
        """For inputs of the last layer, ``[rows, D]``."""
        ...

    def trunk(self, changed: ChangedTrunk) -> ChangedTrunk:
        """``changed``, made of the base model, with this network's weights."""
        ...


@dataclass(frozen=True, kw_only=True)
class BaseNetwork:
    """The base model."""

    classifier: Classifier

    def logits(self, images: Images) -> Logits:
        logits: Logits = self.classifier(images)
        return logits

    def head(self, points: torch.Tensor) -> Logits:
        logits: Logits = self.classifier.head(points)
        return logits

    def trunk(self, changed: ChangedTrunk) -> ChangedTrunk:
        return changed


@dataclass(frozen=True, kw_only=True)
class HeadsNetwork:
    """The base model's trunk, and for each of ``images`` images a head of its own. Beside it the base head answers:
    ``[rows, 2, C]``.
    """

    classifier: Classifier
    images: int
    answer: Heads

    def logits(self, images: Images) -> Logits:
        return self.head(self.classifier.trace(images).head_input)

    def head(self, points: torch.Tensor) -> Logits:
        adapted = self.answer(points.view(self.images, -1, points.shape[1])).flatten(0, 1)
        base = self.classifier.head(points).to(adapted.dtype)
        return torch.stack([adapted, base], 1)

    def trunk(self, changed: ChangedTrunk) -> ChangedTrunk:
        return changed


@dataclass(frozen=True, kw_only=True)
class PrivateNetwork:
    """One image's: the base model's layers with ``parameters`` in the place of theirs."""

    classifier: Classifier
    parameters: Parameters

    def logits(self, images: Images) -> Logits:
        logits: Logits = self._network(self.classifier.normalise(images))
        return logits

    def head(self, points: torch.Tensor) -> Logits:
        logits: Logits = self._head(points)
        return logits

    def trunk(self, changed: ChangedTrunk) -> ChangedTrunk:
        return changed.with_layers(lambda layers: with_parameters(layers, self.parameters))

    @cached_property
    def _network(self) -> nn.Module:
        return with_parameters(self.classifier.network, self.parameters)

    @cached_property
    def _head(self) -> nn.Module:
        return with_parameters(self.classifier.head, self.parameters)


def with_parameters(module: Module, parameters: Parameters) -> Module:
    """A copy of ``module`` with these parameters; all others, and the buffers, are shared."""
    memo: dict[int, object] = {id(p): parameters.get(id(p), p) for p in module.parameters()}
    memo.update({id(buffer): buffer for buffer in module.buffers()})
    return copy.deepcopy(module, memo)
