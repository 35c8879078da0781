"""What the tests of the scopes share: queries, budgets, and the published fine-tuning as one would write it by hand."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from mithridate.defenses import Budget, Resources
from mithridate.defenses.adapting import Adapter, Query
from mithridate.defenses.base import StopReason
from mithridate.defenses.none import base_pass
from mithridate.defenses.selection import SelectionConfig, Selector


def ask(resources: Resources, images: torch.Tensor, neighbors: int = 40, *, seed: int = 3) -> Query:
    """What RMC would ask an adapter."""
    with torch.no_grad():
        base = base_pass(resources.classifier, images)
        selection = Selector(resources=resources, config=SelectionConfig(neighbors=neighbors)).select(base.embedding)
    budgets, seeds = tuple(Budget() for _ in images), tuple(seed + 7 * row for row in range(len(images)))
    return Query(images=images, base=base, selection=selection, budgets=budgets, seeds=seeds)


def pick(query: Query, order: list[int]) -> Query:
    """Some of the rows, in any order, more than once if asked."""
    base, selection = query.base, query.selection
    return Query(
        images=query.images[order],
        base=replace(
            base,
            logits=base.logits[order],
            embedding=base.embedding[order],
            head_input=base.head_input[order],
            activation=None if base.activation is None else base.activation[order],
        ),
        selection=replace(
            selection,
            ids=selection.ids[order],
            distances=selection.distances[order],
            weights=selection.weights[order],
        ),
        budgets=tuple(query.budgets[row] for row in order),
        seeds=tuple(query.seeds[row] for row in order),
    )


def within(query: Query, *budgets: Budget) -> Query:
    """The same with these budgets; a single one is everybody's."""
    return replace(query, budgets=budgets if len(budgets) > 1 else budgets * len(query))


def allow(looks: int) -> Callable[[], bool]:
    """A caller who is gone after so many looks at the budget."""
    left = iter([False] * looks)
    return lambda: next(left, True)


def scores(adapter: Adapter, query: Query) -> torch.Tensor:
    """What would be answered, without guards: ``[N, C]``."""
    with torch.no_grad():
        return adapter.adapt(query).logits.softmax(1)


def check_rows_do_not_mix(adapter: Adapter, query: Query, classifier: nn.Module) -> None:
    """Other rows, their order, their number and what was asked before change no answer, and nobody changes the base."""
    before = deepcopy(classifier.state_dict())
    answers, shuffle = scores(adapter, query), random.Random(0)
    for _ in range(6):
        order = [shuffle.randrange(len(query)) for _ in range(shuffle.randint(1, 2 * len(query)))]
        torch.testing.assert_close(scores(adapter, pick(query, order)), answers[order], rtol=0, atol=1e-4)
    torch.testing.assert_close(scores(adapter, query), answers, rtol=0, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def check_leaves_nothing(call: Callable[[], object], calls: int = 20) -> None:
    """Calls leave no tensor and no other object behind."""

    def alive() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return sum(issubclass(type(thing), torch.Tensor) for thing in objects), len(objects)

    for _ in range(3):
        call()
    tensors, objects = alive()
    for _ in range(calls):
        call()
    tensors_then, objects_then = alive()
    assert tensors_then == tensors
    assert objects_then - objects < calls


@dataclass(frozen=True, kw_only=True)
class ByHand:
    """The fine-tuning of one image: torch's own Adam on a network that is really changed."""

    rate: float
    epochs: int
    batch_size: int
    patience: int
    tolerance: float = 0.0
    anchor: float = 0.0

    def tune(
        self,
        network: nn.Module,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        held: int,
        seed: int,
    ) -> tuple[int, int, StopReason]:
        """Leaves the best weights in ``network``; the epochs these took, the steps taken in all, and why it ended."""
        base = [parameter.detach().clone() for parameter in network.parameters()]
        optimizer = torch.optim.Adam(network.parameters(), lr=self.rate)
        generator = torch.Generator().manual_seed(seed)
        best, kept, state, waited, steps = self.held_out(network, inputs, labels, weights, held), 0, None, 0, 0
        state = deepcopy(network.state_dict())
        scaled = weights[held:] / weights[held:].mean()
        reason: StopReason = "max_steps"
        for epoch in range(1, self.epochs + 1):
            total = 0.0
            for batch in torch.randperm(len(inputs) - held, generator=generator).split(self.batch_size):
                each = F.cross_entropy(network(inputs[held:][batch]), labels[held:][batch], reduction="none")
                loss = (each * scaled[batch]).mean()
                total += loss.item() * len(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for parameter, home in zip(network.parameters(), base, strict=True):
                        parameter.copy_(home + (parameter - home) / (1 + 2 * self.rate * self.anchor))
                steps += 1
            now = self.held_out(network, inputs, labels, weights, held)
            waited = 0 if now < best or not held else waited + 1
            if now < best or not held:
                best, kept, state = now, epoch, deepcopy(network.state_dict())
            if total / (len(inputs) - held) < self.tolerance:
                reason = "converged"
                break
            if waited >= self.patience:
                reason = "patience"
                break
        network.load_state_dict(state)
        return kept, steps, reason

    @staticmethod
    def held_out(
        network: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, held: int
    ) -> float:
        if not held:
            return 0.0
        with torch.no_grad():
            each = F.cross_entropy(network(inputs[:held]), labels[:held], reduction="none")
            return float((each * weights[:held]).sum() / weights[:held].sum())
