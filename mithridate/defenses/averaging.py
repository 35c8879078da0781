"""The first and the last stage of a defence: a random transform of the image, and the mean of many random passes.

What a pass is belongs to each defence; that every pass draws for itself, that memory is bounded, and that a budget is
looked at between runs, is written here once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from mithridate.defenses.base import Batch, Budget, Resources, draw_seed
from mithridate.defenses.networks import Network
from mithridate.defenses.randomness import pass_generators
from mithridate.types import Images, Logits, Scores

_BYTES_AT_A_TIME = 256 * 2**20
"""What one run of several passes may take, roughly."""

_IMAGES_AT_A_TIME = 64

_COPIES = 40
"""Of an image: what a network holds of it at a time, roughly."""

_FIRST_STAGE = 2**40
"""The number of the pass that a transform before other stages draws as: theirs count from 0."""

Generators = Sequence[torch.Generator]

Run = Callable[[Generators, int], Logits]
"""``run(generators, copies) -> logits [N * copies, ...]``, the copies of an image side by side; row i draws from
``generators[i]`` alone.
"""


class Sampler(Protocol):
    """One way to make a pass random."""

    @property
    def bytes_a_row(self) -> int:
        """What one pass of one image takes, roughly."""
        ...

    def begin(self, images: Images, network: Network) -> Run:
        """For ``[N, C, H, W]``; what all passes share is done once."""
        ...

    def begin_attack(self, images: Images, network: Network) -> Run:
        """The same values, differentiable in ``images`` along the path that suits an attacker best."""
        ...


class Transform(Protocol):
    """A random change of images, ``[R, C, H, W]`` to ``[R, C, H', W']``; row i draws from ``generators[i]`` alone."""

    def apply(self, images: Images, generators: Generators) -> Images: ...

    def apply_attack(self, images: Images, generators: Generators, copies: int) -> Images:
        """For attackers: differentiable along the path that suits them best; ``copies`` rows in turn are of one
        image."""
        ...


@dataclass(frozen=True, kw_only=True)
class Transformed:
    """A sampler whose passes see the image transformed."""

    transform: Transform
    bytes_a_row: int

    def begin(self, images: Images, network: Network) -> Run:
        return lambda generators, copies: network.logits(
            self.transform.apply(images.repeat_interleave(copies, 0), generators)
        )

    def begin_attack(self, images: Images, network: Network) -> Run:
        return lambda generators, copies: network.logits(
            self.transform.apply_attack(images.repeat_interleave(copies, 0), generators, copies)
        )


def bytes_of_a_pass(resources: Resources) -> int:
    """What the whole network takes for one image, roughly."""
    return _COPIES * 4 * int(torch.Size(resources.classifier.spec.image_shape).numel())


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """The mean of ``passes`` (softmax, or one vote each); attackers are given ``attack_passes`` of them."""

    sampler: Sampler
    passes: int
    attack_passes: int
    reduce: Literal["softmax", "vote"] = "softmax"

    @property
    def images_at_a_time(self) -> int:
        """So many that one pass of all of them fits."""
        return min(_IMAGES_AT_A_TIME, self._rows_at_a_time)

    @property
    def _rows_at_a_time(self) -> int:
        return max(1, _BYTES_AT_A_TIME // self.sampler.bytes_a_row)

    def scores(self, images: Images, seeds: Sequence[int], budget: Budget, network: Network) -> Scores:
        """float64 ``[N, ...]``. Raises BudgetExceededError where the budget ends."""
        run, done, total = self.sampler.begin(images, network), 0, torch.zeros(())
        while done < self.passes:
            budget.check()
            copies = min(max(1, self._rows_at_a_time // len(images)), self.passes - done)
            opinions = self._opinions(run(pass_generators(seeds, images, range(done, done + copies)), copies))
            total = total.to(opinions.device) + opinions.unflatten(0, (len(images), copies)).sum(1)
            done += copies
        return total / self.passes

    def attack(self, images: Images, seeds: Sequence[int], network: Network) -> Logits:
        """log of the mean softmax of ``attack_passes``, differentiable: a vote has no slope, and the mean leads where
        it will go."""
        generators = pass_generators(seeds, images, range(self.attack_passes))
        logits = self.sampler.begin_attack(images, network)(generators, self.attack_passes)
        return log_mean(logits, self.attack_passes)

    def _opinions(self, logits: Logits) -> Scores:
        if self.reduce == "softmax":
            return logits.double().softmax(-1)
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()


def log_mean(logits: Logits, copies: int) -> Logits:
    """float64 ``[N * copies, ...]`` to ``[N, ...]``: the log of the copies' mean softmax."""
    each = logits.double().log_softmax(-1).unflatten(0, (-1, copies))
    mean: Logits = each.logsumexp(1) - math.log(copies)
    return mean


@dataclass(frozen=True, kw_only=True)
class FirstStage:
    """A transform before other stages: one draw an image; an attacker takes the mean of ``attack_passes``."""

    transform: Transform
    attack_passes: int

    def apply(self, batch: Batch) -> Images:
        """The images as the next stages see them."""
        return self.transform.apply(batch.images, pass_generators(batch.seeds, batch.images, [_FIRST_STAGE]))

    def attack(
        self, images: Images, generator: torch.Generator, answer: Callable[[Images, torch.Generator], Logits]
    ) -> Logits:
        """The log of the mean score of ``answer`` over draws (expectation over transformation)."""
        copies, seed = self.attack_passes, draw_seed(generator)
        numbers = range(_FIRST_STAGE, _FIRST_STAGE + copies)
        generators = pass_generators([seed] * len(images), images, numbers)
        moved = self.transform.apply_attack(images.repeat_interleave(copies, 0), generators, copies)
        return log_mean(answer(moved, generator), copies)
