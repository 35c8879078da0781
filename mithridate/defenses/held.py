"""Weights that were adapted to images, held constant: what an attacker simulates, collects, and moves images against.

FPA and GMSA (Chen et al., ICLR 2022) and every attack that adapts again only now and then ascend such models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.func import functional_call

from mithridate.defenses.adapting import Adapter, Query
from mithridate.defenses.networks import (
    BaseNetwork,
    Heads,
    HeadsNetwork,
    Network,
    Parameters,
    PrivateNetwork,
)
from mithridate.defenses.none import BasePass
from mithridate.defenses.pruned_network import ChangedTrunk
from mithridate.models import Classifier
from mithridate.types import Images, Logits


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one adaptation made of ``N`` images' weights. ``heads``: a head of its own for each, where the head is what
    adapts; else ``parameters``, one a row, None where an image kept the base weights. ``adapted`` bool ``[N]`` says
    which did not.
    """

    heads: Heads | None
    parameters: tuple[Parameters | None, ...]
    adapted: torch.Tensor

    def rows(self, start: int, stop: int) -> Held:
        """Those of some of the images."""
        return Held(
            heads=None if self.heads is None else self.heads.rows(start, stop),
            parameters=self.parameters[start:stop],
            adapted=self.adapted[start:stop],
        )


@dataclass(frozen=True, kw_only=True)
class JoinedHeads:
    """The heads of several parts of a batch: so many images each."""

    parts: tuple[tuple[int, Heads], ...]

    def __call__(self, points: torch.Tensor) -> Logits:
        pieces = points.split([count for count, _ in self.parts])
        return torch.cat([heads(piece) for (_, heads), piece in zip(self.parts, pieces, strict=True)])

    def held(self) -> JoinedHeads:
        return self

    def rows(self, start: int, stop: int) -> JoinedHeads:
        found, first = [], 0
        for count, heads in self.parts:
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                found.append((high - low, heads.rows(low, high)))
            first += count
        return JoinedHeads(parts=tuple(found))


@torch.no_grad()
def hold(adapter: Adapter, query: Query) -> Held:
    """The weights that ``adapter`` gives each image of ``query``."""
    captured: list[tuple[int, Heads]] = []
    parameters: dict[int, Parameters] = {}
    alone = query.selection.weights.sum(1) == 0  # no neighbour within the radius: the base weights stay
    weights = torch.where(alone[:, None], 1.0 / query.selection.weights.shape[1], query.selection.weights)

    def capture(asked: Query, network: Network) -> Logits:
        classes = asked.base.logits.shape[1]
        if isinstance(network, HeadsNetwork):
            captured.append((len(asked), network.answer.held()))
            return asked.base.logits.new_zeros(len(asked), 2, classes)
        if isinstance(network, PrivateNetwork):
            parameters[asked.draws[0]] = network.parameters
        return asked.base.logits.new_zeros(len(asked), classes)

    asked = replace(
        query,
        average=capture,
        draws=tuple(range(len(query))),
        selection=replace(query.selection, weights=weights),
    )
    fates = adapter.adapt(asked).adaptations
    kept = torch.tensor([fate.weights == "base" for fate in fates], device=alone.device) | alone
    return Held(
        heads=JoinedHeads(parts=tuple(captured)) if captured else None,
        parameters=tuple(parameters.get(row) for row in range(len(query))),
        adapted=~kept,
    )


def held_logits(classifier: Classifier, base: BasePass, held: Sequence[Held], copies: int) -> Logits:
    """``[R, 1 + M, C]``: what the base model, and each of ``held`` (``M`` of ``N`` images each), say of ``R = N *
    copies`` rows, those of an image side by side, from one run of the base model up to where it changes.

    Differentiable in ``base``. Where the whole network changes, ``base`` says nothing and ``images_logits`` does.
    """
    answers = [base.logits.double()]
    for models in held:
        if models.heads is not None:
            points = base.head_input.unflatten(0, (-1, copies))  # [N, copies, D]
            mine = models.heads(points).flatten(0, 1).double()
        else:
            assert base.activation is not None
            mine = _privately(classifier.tail, base.activation, base.logits, models.parameters, copies)
        adapted = models.adapted.repeat_interleave(copies)[:, None].to(mine.device)
        answers.append(torch.where(adapted, mine, answers[0]))
    return torch.stack(answers, 1)


def images_logits(classifier: Classifier, images: Images, base: BasePass, held: Sequence[Held], copies: int) -> Logits:
    """The same where all weights change, for ``images`` ``[R, C, H, W]``."""
    pixels = classifier.normalise(images)
    answers = [base.logits.double()]
    answers += [_privately(classifier.network, pixels, base.logits, models.parameters, copies) for models in held]
    return torch.stack(answers, 1)


def _privately(
    module: torch.nn.Module,
    inputs: torch.Tensor,
    base: Logits,
    parameters: Sequence[Parameters | None],
    copies: int,
) -> Logits:
    """Each image's copies through ``module`` with its own weights."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = []
    for row, mine in enumerate(parameters):
        places = slice(row * copies, (row + 1) * copies)
        if mine is None:
            found.append(base[places])
            continue
        weights: dict[str, torch.Tensor] = {
            names[identity]: weight for identity, weight in mine.items() if identity in names
        }
        found.append(functional_call(module, weights, (inputs[places],)))
    return torch.cat(found).double()


@dataclass(frozen=True, kw_only=True)
class SeveralHeads:
    """The base model's trunk with several heads for each of ``images`` images: ``[rows, 1 + M, C]``, the base head
    first."""

    classifier: Classifier
    images: int
    held: Sequence[Held]

    def logits(self, images: Images) -> Logits:
        return self.head(self.classifier.trace(images).head_input)

    def head(self, points: torch.Tensor) -> Logits:
        base = self.classifier.head(points)
        pass_ = BasePass(logits=base, embedding=points, head_input=points)
        return held_logits(self.classifier, pass_, self.held, len(points) // self.images)

    def trunk(self, changed: ChangedTrunk) -> ChangedTrunk:
        return changed


def networks_of(classifier: Classifier, held: Sequence[Held], row: int) -> list[Network]:
    """One image's networks, the base model first, where its parameters are its own."""
    mine = [models.parameters[row] for models in held]
    base = BaseNetwork(classifier=classifier)
    return [base, *(base if own is None else PrivateNetwork(classifier=classifier, parameters=own) for own in mine)]
