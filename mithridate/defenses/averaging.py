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
from torch.utils.checkpoint import checkpoint

from mithridate.defenses.base import Budget, Resources
from mithridate.defenses.networks import Network
from mithridate.defenses.randomness import pass_generators, pass_seeds
from mithridate.models.classifier import missing_rows
from mithridate.types import Images, Logits, Scores

_BYTES_AT_A_TIME = 256 * 2**20
"""What one run of several passes may take, roughly."""

_BYTES_ATTACKED_AT_A_TIME = 2**30
"""The same for what is kept for a gradient."""

_KEPT = 4
"""So many times as much is kept of a pass for its gradient."""

_IMAGES_AT_A_TIME = 64

_COPIES = 40
"""Of an image: what a network holds of it at a time, roughly."""

_FIRST_STAGE = 2**40
"""The number of the pass that a transform before other stages draws as: theirs count from 0."""

Generators = Sequence[torch.Generator]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Which ``passes`` are run of ``N`` images, and the images' seeds, ``rows``. A pass draws the same whichever others
    are run with it."""

    rows: Sequence[int]
    passes: range

    @property
    def copies(self) -> int:
        """Passes of an image."""
        return len(self.passes)

    @property
    def generators(self) -> list[torch.Generator]:
        """One a row, ``[N * copies]``, those of an image side by side."""
        return pass_generators(self.rows, self.passes)

    @property
    def turns(self) -> torch.Tensor:
        """int64 ``[N * copies]``: goes up by one from pass to pass, and begins anywhere."""
        return torch.tensor([row % 2**32 + number for row in self.rows for number in self.passes])


Run = Callable[[Draws], Logits]
"""``run(draws) -> logits [N * copies, ...]``, the copies of an image side by side."""


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

    @property
    def bytes_a_row(self) -> int:
        """What changing one image and running the network on it takes, roughly."""
        ...

    @property
    def attack_is_fixed(self) -> bool:
        """Whether all draws that an attacker is given are the same one."""
        ...

    def apply(self, images: Images, generators: Generators) -> Images: ...

    def apply_attack(self, images: Images, draws: Draws) -> Images:
        """For attackers: differentiable along the path that suits them best."""
        ...


@dataclass(frozen=True, kw_only=True)
class Transformed:
    """A sampler whose passes see the image transformed."""

    transform: Transform

    @property
    def bytes_a_row(self) -> int:
        return self.transform.bytes_a_row

    def begin(self, images: Images, network: Network) -> Run:
        return lambda draws: network.logits(
            self.transform.apply(images.repeat_interleave(draws.copies, 0), draws.generators)
        )

    def begin_attack(self, images: Images, network: Network) -> Run:
        return lambda draws: network.logits(
            self.transform.apply_attack(images.repeat_interleave(draws.copies, 0), draws)
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
    def images_attacked_at_a_time(self) -> int:
        """The same with what is kept for a gradient."""
        return rows_attacked_at_a_time(self.sampler.bytes_a_row)

    @property
    def _rows_at_a_time(self) -> int:
        return max(1, _BYTES_AT_A_TIME // self.sampler.bytes_a_row)

    def scores(self, images: Images, rows: Sequence[int], budget: Budget, network: Network) -> Scores:
        """float64 ``[N, ...]``; ``rows`` are the images' seeds. Raises BudgetExceededError where the budget ends."""
        run, done, total = self.sampler.begin(images, network), 0, torch.zeros(())
        while done < self.passes:
            budget.check()
            copies = min(max(1, self._rows_at_a_time // len(images)), self.passes - done)
            # Passes beyond the last, thrown away, where rows are so few that they would be rounded in another way: what
            # a pass drops depends on the last bit.
            extra = -(-missing_rows(len(images) * copies, images.device) // max(1, len(images)))
            numbers = range(done, done + copies + extra)
            opinions = self._opinions(run(Draws(rows=rows, passes=numbers)))
            opinions = opinions.unflatten(0, (len(images), len(numbers)))[:, :copies]
            total = total.to(opinions.device) + opinions.sum(1)
            done += copies
        return total / self.passes

    def attack(self, images: Images, rows: Sequence[int], network: Network) -> Logits:
        """log of the mean softmax of ``attack_passes``, differentiable: a vote has no slope, and the mean leads where
        it will go."""
        run = self.sampler.begin_attack(images, network)

        def some(start: int, stop: int) -> Logits:
            logits = run(Draws(rows=rows, passes=range(start, stop)))
            by_pass: Logits = logits.unflatten(0, (len(images), -1)).transpose(0, 1)  # [passes, N, ...]
            return by_pass

        at_a_time = max(1, self.images_attacked_at_a_time // max(1, len(images)))
        logits = in_groups(some, self.attack_passes, at_a_time)
        return log_mean(logits.transpose(0, 1).flatten(0, 1), self.attack_passes)

    def _opinions(self, logits: Logits) -> Scores:
        if self.reduce == "softmax":
            return logits.double().softmax(-1)
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()


def rows_attacked_at_a_time(bytes_a_row: int) -> int:
    """How many rows' graphs may be kept at once."""
    return max(1, _BYTES_ATTACKED_AT_A_TIME // (_KEPT * bytes_a_row))


def in_groups(answer: Callable[[int, int], Logits], count: int, size: int, *, repeatable: bool = True) -> Logits:
    """``answer(start, stop)`` of up to ``size`` rows at a time, ``[count, ...]``. Where that makes several groups, none
    is kept for the gradient: each is run again when it is needed, so ``answer`` must give the same twice, and take no
    gradients of its own. What is not ``repeatable`` is kept.
    """
    if count <= size:
        return answer(0, count)
    groups = [(start, min(start + size, count)) for start in range(0, count, size)]
    if not repeatable:
        return torch.cat([answer(*group) for group in groups])
    return torch.cat([checkpoint(answer, *group, use_reentrant=False, preserve_rng_state=False) for group in groups])


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

    @property
    def images_attacked_at_a_time(self) -> int:
        """So many that what is kept for a gradient fits."""
        return max(1, rows_attacked_at_a_time(self.transform.bytes_a_row) // self.attack_passes)

    def apply(self, images: Images, rows: Sequence[int], budget: Budget | None = None) -> Images:
        """The images as the next stages see them; ``rows`` are their seeds. Raises BudgetExceededError where a
        ``budget`` ends."""
        size, found = max(1, _BYTES_AT_A_TIME // self.transform.bytes_a_row), []
        for start in range(0, len(images), size):
            if budget is not None:
                budget.check()
            generators = pass_generators(rows[start : start + size], [_FIRST_STAGE])
            found.append(self.transform.apply(images[start : start + size], generators))
        return torch.cat(found)

    def attack(
        self,
        images: Images,
        rows: Sequence[int],
        answer: Callable[[Images, Sequence[int]], Logits],
        *,
        repeatable: bool = True,
    ) -> Logits:
        """The log of the mean score of ``answer(images, rows)`` over draws (expectation over transformation).
        ``repeatable`` as in ``in_groups``.
        """
        copies, numbers = self.attack_passes, self._attack_numbers

        def some(start: int, stop: int) -> Logits:
            moved = self.attacked(images[start:stop], rows[start:stop])
            return log_mean(answer(moved, pass_seeds(rows[start:stop], numbers)), copies)

        return in_groups(some, len(images), self.images_attacked_at_a_time, repeatable=repeatable)

    def attacked(self, images: Images, rows: Sequence[int]) -> Images:
        """``[N * attack_passes, C, H, W]``: the draws that an attacker is given, those of an image side by side."""
        draws = Draws(rows=rows, passes=self._attack_numbers)
        return self.transform.apply_attack(images.repeat_interleave(self.attack_passes, 0), draws)

    @property
    def _attack_numbers(self) -> range:
        return range(_FIRST_STAGE, _FIRST_STAGE + self.attack_passes)
