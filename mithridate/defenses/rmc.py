"""RMC, runtime masking and cleansing: each image is answered by weights that were fine-tuned on its neighbours.

Wu, Yuan, Wu: Adversarial Robustness via Runtime Masking and Cleansing (ICML 2020). Which weights move is the scope,
each in a file of its own (``rmc_head``, ``rmc_tail``, ``rmc_all``); everything around that is here. Unlike the
published procedure nothing is carried from one image to the next: every image starts from the base weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from mithridate.defenses.adapting import Adapted, Adapter, Query, join
from mithridate.defenses.averaging import Averaging, FirstStage, in_groups
from mithridate.defenses.base import (
    Adaptation,
    Batch,
    Budget,
    Outcome,
    PhaseClock,
    Prediction,
    Request,
    Resources,
    answer_one,
    answer_together,
    describe_neighbors,
    draw_seed,
)
from mithridate.defenses.guard import GuardConfig, guard, guarded_logits, neighbor_votes
from mithridate.defenses.held import Held, SeveralHeads, held_logits, hold, images_logits, networks_of
from mithridate.defenses.networks import Network
from mithridate.defenses.none import BasePass, base_pass
from mithridate.defenses.randomness import row_seeds
from mithridate.defenses.selection import SelectionConfig, Selector
from mithridate.errors import BudgetExceededError
from mithridate.types import Images, Logits


@dataclass(frozen=True, kw_only=True)
class RMC:
    """Serves ``rmc`` in every scope: what ``adapter`` adapts, on what ``selection`` selects, let through by
    ``guarding``. It may be the middle one of three stages: ``first`` transforms the images, and ``average`` takes the
    mean of many passes of the adapted network, and of the base model where that answers.
    """

    name: str
    resources: Resources
    adapter: Adapter
    selection: SelectionConfig
    guarding: GuardConfig
    first: FirstStage | None = None
    average: Averaging | None = None
    _selector: Selector = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_selector", Selector(resources=self.resources, config=self.selection))

    @property
    def batches(self) -> bool:
        """Whether requests gain by being answered together."""
        return self.adapter.batches and self.average is None

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        return answer_one(self.predict_together, images, generator, budget)

    @torch.no_grad()
    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        device = self.resources.classifier.device
        if self.average is None and (self.first is None or len(requests) > 1):
            return answer_together(requests, device, self._answer)
        # Between passes a budget may end, and then only its own request has no answer.
        return [outcome for request in requests for outcome in self._answer_alone(request, device)]

    def _answer_alone(self, request: Request, device: torch.device) -> list[Outcome]:
        try:
            return answer_together([request], device, self._answer)
        except BudgetExceededError as error:
            return [error]

    def _answer(self, batch: Batch) -> Prediction:
        classifier, exemplars = self.resources.classifier, self.resources.exemplars
        clock = PhaseClock(classifier.device)
        with clock.phase("embed"):
            base = base_pass(classifier, batch.images)
            base_scores, images = base.logits.softmax(1).float(), batch.images
            embeddings = base.embedding.float().cpu()
            draws = self._draws(batch.seeds, images)
            if self.first is not None:
                owners = {id(budget) for budget in batch.budgets}
                images = self.first.apply(images, draws, batch.budgets[0] if len(owners) == 1 else None)
                base = base_pass(classifier, images)
        with clock.phase("search"):
            query = self._query(images, base, batch.budgets, batch.seeds, draws)
        with clock.phase("adapt"):
            query, adapted = self._adapt(query)
        with clock.phase("predict"):
            guarded = guard(query, adapted, self._votes(query), self.guarding)
            abstained = None if guarded.abstained is None else guarded.abstained.cpu()
            nearest = query.selection.by_distance()
            described = describe_neighbors(nearest.neighbors, exemplars, nearest.weights > 0)
        return Prediction(
            scores=guarded.scores.float().cpu(),
            base_scores=base_scores.cpu(),
            adaptations=guarded.adaptations,
            neighborhoods=described,
            seconds=clock.seconds,
            abstained=abstained,
            embeddings=embeddings,
        )

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        """Adapts to these very images. Which exemplars are chosen is held constant (BPDA); the adapted weights too, but
        for the closed-form head, through which the gradient goes, and through the soft weights where they are on. A
        transform before it is averaged over: every draw is adapted to."""
        budget.check()
        seed = draw_seed(generator)
        draws = self._draws((seed,) * len(images), images)
        if self.first is not None or self.average is not None:
            budget = Budget(max_steps=budget.max_steps)  # what is run again for the gradient must not end in between

        def attack(seen: Images, draws: Sequence[int]) -> Logits:
            base = base_pass(self.resources.classifier, seen)
            query = self._query(seen, base, (budget,) * len(seen), (seed,) * len(seen), tuple(draws), attacking=True)
            query, adapted = self._adapt(query)
            return guarded_logits(query, adapted, self._votes(query), self.guarding)

        if self.first is not None:
            return self.first.attack(images, draws, attack, repeatable=self.adapter.repeatable)
        if self.average is None:
            return attack(images, draws)
        size = self.average.images_attacked_at_a_time
        return in_groups(
            lambda start, stop: attack(images[start:stop], draws[start:stop]),
            len(images),
            size,
            repeatable=self.adapter.repeatable,
        )

    @property
    def answers_as_base(self) -> bool:
        """Whether the base model may answer: let by a guard, or by the neighbours that are held out."""
        guarding = self.guarding
        return bool(guarding.gate or guarding.mix or self.adapter.config.held_out)

    def hold(self, images: Images, *, generator: torch.Generator) -> Held:
        """The weights that each of ``images`` ``[N, C, H, W]`` is answered by, held: one draw of what is random."""
        seed = draw_seed(generator)
        seeds, device = (seed,) * len(images), self.resources.classifier.device
        with torch.no_grad():
            draws = self._draws(seeds, images)
            seen = images.to(device) if self.first is None else self.first.apply(images.to(device), draws)
            base = base_pass(self.resources.classifier, seen)
            return hold(self.adapter, self._query(seen, base, (Budget(),) * len(images), seeds, draws))

    def held_logits(self, images: Images, held: Sequence[Held], *, generator: torch.Generator) -> Logits:
        """float64 ``[N, 1 + M, C]``: what the base model, and each of ``held`` (``M``, of these ``N`` images each),
        say; differentiable in ``images``. With the other stages of this defence: fresh draws of what is random, a mean
        of as many as an attacker is given.
        """
        draws = self._draws((draw_seed(generator),) * len(images), images)
        if self.first is None:
            return self._held_logits(images, held, draws, 1)
        first, copies, found = self.first, self.first.attack_passes, []
        size = first.images_attacked_at_a_time
        for start in range(0, len(images), size):
            stop = min(start + size, len(images))
            mine = [models.rows(start, stop) for models in held]

            def answer(seen: Images, draws: Sequence[int], mine: Sequence[Held] = mine) -> Logits:
                return self._held_logits(seen, mine, draws, copies)

            found.append(first.attack(images[start:stop], draws[start:stop], answer))
        return torch.cat(found)

    def embed(self, images: Images, *, generator: torch.Generator) -> torch.Tensor:
        """``[N, D]``: what the index is searched with, differentiable; the mean over draws behind a transform."""
        classifier = self.resources.classifier
        if self.first is None:
            return classifier.embed(images)
        draws, size = self._draws((draw_seed(generator),) * len(images), images), self.first.images_attacked_at_a_time
        found = [
            self.first.attacked(images[start : start + size], draws[start : start + size])
            for start in range(0, len(images), size)
        ]
        copies = self.first.attack_passes
        return torch.cat([classifier.embed(seen).unflatten(0, (-1, copies)).mean(1) for seen in found])

    def _held_logits(self, images: Images, held: Sequence[Held], draws: Sequence[int], copies: int) -> Logits:
        classifier, average = self.resources.classifier, self.average
        heads = all(models.heads is not None for models in held)
        if average is None:
            base = base_pass(classifier, images)
            if heads or self.adapter.changes == "tail":
                return held_logits(classifier, base, held, copies)
            return images_logits(classifier, images, base, held, copies)
        if heads:
            rows = len(images) // copies
            return average.attack(images, draws, SeveralHeads(classifier=classifier, images=rows, held=held))
        found = []
        for row in range(len(images) // copies):
            places = slice(row * copies, (row + 1) * copies)
            networks = networks_of(classifier, held, row)
            found.append(torch.stack([average.attack(images[places], draws[places], n) for n in networks], 1))
        return torch.cat(found)

    def _draws(self, seeds: tuple[int, ...], images: Images) -> tuple[int, ...]:
        """What the other stages draw from, a seed an image: of the image as it came."""
        return row_seeds(seeds, images) if self.first is not None or self.average is not None else seeds

    def _query(
        self,
        images: Images,
        base: BasePass,
        budgets: tuple[Budget, ...],
        seeds: tuple[int, ...],
        draws: tuple[int, ...],
        *,
        attacking: bool = False,
    ) -> Query:
        average = self._attacked if attacking else self._averaged
        return Query(
            images=images,
            base=base,
            selection=self._selector.select(base.embedding),
            budgets=budgets,
            seeds=seeds,
            average=None if self.average is None else average,
            draws=draws,
        )

    def _averaged(self, query: Query, network: Network) -> Logits:
        assert self.average is not None
        scores = self.average.scores(query.images, query.draws, query.budgets[0], network)
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()

    def _attacked(self, query: Query, network: Network) -> Logits:
        assert self.average is not None
        return self.average.attack(query.images, query.draws, network)

    def agreement(self, images: Images) -> torch.Tensor:
        """``[N]``: what base, neighbours and answer all grant the answer's class; ``abstain`` is a threshold on
        this.
        """
        with torch.no_grad():
            images, seeds = images.to(self.resources.classifier.device), (0,) * len(images)
            draws = self._draws(seeds, images)
            if self.first is not None:
                images = self.first.apply(images, draws)
            base = base_pass(self.resources.classifier, images)
            query = self._query(images, base, (Budget(),) * len(images), seeds, draws)
            query, adapted = self._adapt(query)
            return guard(query, adapted, self._votes(query), self.guarding).agreement.cpu()

    def _votes(self, query: Query) -> torch.Tensor:
        labels = self.resources.exemplars.gather_labels(query.selection.ids, query.base.logits.device)
        weights = query.selection.weights.detach().to(labels.device)
        return neighbor_votes(labels, weights, query.base.logits.shape[1])

    def _adapt(self, query: Query) -> tuple[Query, Adapted]:
        """Gives the query back with the base model's answer as it now is: averaged, where the adapted one is."""
        adapted = self._adapt_in_parts(query)
        if adapted.base_logits is not None:
            query = replace(query, base=replace(query.base, logits=adapted.base_logits))
        return query, adapted

    def _adapt_in_parts(self, query: Query) -> Adapted:
        """Images that have no neighbour within the radius keep the base weights."""
        alone = query.selection.weights.detach().sum(1) == 0
        if not bool(alone.any()):
            return self._adapt_all(query)
        # A single neighbour of equal weight stands in, so that the arithmetic goes through; its result does not count.
        weights = torch.where(alone[:, None], 1.0 / query.selection.weights.shape[1], query.selection.weights)
        adapted = self._adapt_all(replace(query, selection=replace(query.selection, weights=weights)))
        untouched = Adaptation(steps=0, stop_reason="converged", weights="base")
        fates = tuple(
            untouched if flag else fate for flag, fate in zip(alone.tolist(), adapted.adaptations, strict=True)
        )
        return replace(adapted, adaptations=fates)

    def _adapt_all(self, query: Query) -> Adapted:
        if self.average is None:
            return self.adapter.adapt(query)
        rows = self.average.images_at_a_time
        return join([self.adapter.adapt(query.rows(start, start + rows)) for start in range(0, len(query), rows)])
