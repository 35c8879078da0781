"""A random defence asked again and again, with seeds that no attack has seen.

One answer of a random defence is one draw. What a client meets on average, what most draws say, and what is left when
the same image is sent m times are three numbers, and an attack that stops at the first misread draw has shown none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mithridate.defenses.base import Budget, Defence
from mithridate.evaluation.findings import Repeated
from mithridate.types import Labels, Pixels, to_images

REPEATS = 20
"""Fresh answers an image (attacks on random defences: Athalye et al. 2018; at least as many as gradients averaged)."""

TRIES = (1, 10, 100)

_CALLS, _IMAGES = 3, 32
"""To see whether a defence is random: so many calls on so many images."""

_SCORING = 0x5C0EED
"""Mixed into the seed: what scores shares no stream with what attacks, though a run has one seed for both."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """``asked`` answers each, ``wrong`` of them for each image. ``right``: whether the first answer was: an unbiased
    draw of what one request meets, where the majority would hide a defence that is wrong in 4 of 10."""

    asked: int
    wrong: tuple[int, ...]
    right: tuple[bool, ...]
    random: bool

    @property
    def repeated(self) -> Repeated:
        """Expected, majority and persistent-attacker accuracy."""
        n, answers = max(len(self.wrong), 1), max(len(self.wrong), 1) * self.asked
        persistent: dict[int, float] = {}
        for tries in TRIES:
            persistent[tries] = min([self.unbroken_after(tries), *persistent.values()])
        return Repeated(
            repeats=self.asked,
            expected=(answers - sum(self.wrong)) / answers,
            majority=sum(2 * wrong < self.asked for wrong in self.wrong) / n,
            persistent=persistent,
        )

    def unbroken_after(self, tries: int) -> float:
        """Mean over images of (1 - p)^tries. A deterministic defence: its accuracy, whatever ``tries``."""
        if not self.random:
            return sum(self.right) / max(len(self.right), 1)
        return sum(all_right(wrong, self.asked, tries) for wrong in self.wrong) / max(len(self.wrong), 1)


def score(
    defence: Defence,
    pixels: Pixels,
    labels: Labels,
    *,
    repeats: int = REPEATS,
    seed: int,
    batch: int = 64,
    random: bool | None = None,
) -> Scored:
    """Asks ``repeats`` times for uint8 ``pixels`` ``[N, C, H, W]`` with true classes ``labels`` ``[N]``.

    ``random``: whether the defence is, as ``is_random`` finds where it is not given; one that is not is asked once. An
    abstention counts as wrong. Raises ValueError for fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"{repeats} repeats; allowed: 1 and more")
    random = is_random(defence, pixels, seed=seed) if random is None else random
    generator = torch.Generator().manual_seed((seed ^ _SCORING) & (2**63 - 1))
    rights = [answered_right(defence, pixels, labels, generator=generator, batch=batch)]
    rights += [
        answered_right(defence, pixels, labels, generator=generator, batch=batch)
        for _ in range(repeats - 1 if random else 0)
    ]
    wrong = (~torch.stack(rights)).sum(0)
    return Scored(asked=len(rights), wrong=tuple(wrong.tolist()), right=tuple(rights[0].tolist()), random=random)


def answered_right(
    defence: Defence, pixels: Pixels, labels: Labels, *, generator: torch.Generator, batch: int = 64
) -> torch.Tensor:
    """Bool ``[N]`` on the CPU: classified rightly, and not turned away. One fresh seed a batch."""
    right = [torch.zeros(0, dtype=torch.bool)]
    for images, true in zip(pixels.split(batch), labels.cpu().split(batch), strict=True):
        answer = defence.predict(to_images(images), generator=generator, budget=Budget())
        kept = torch.ones(len(images), dtype=torch.bool) if answer.abstained is None else ~answer.abstained.cpu()
        right.append((answer.scores.cpu().argmax(1) == true) & kept)
    return torch.cat(right)


def is_random(defence: Defence, pixels: Pixels, *, seed: int, calls: int = _CALLS, images: int = _IMAGES) -> bool:
    """Whether fresh seeds change any score of the first ``images``. Scores, not labels: a defence that hardly ever
    changes an answer changes its scores all the time. Where even they hardly change, this may miss it: say so yourself.
    """
    generator = torch.Generator().manual_seed((seed ^ _SCORING) & (2**63 - 1))
    few = to_images(pixels[:images])
    scores = [defence.predict(few, generator=generator, budget=Budget()).scores for _ in range(calls)]
    return any(not torch.equal(scores[0], others) for others in scores[1:])


def all_right(wrong: int, asked: int, tries: int) -> float:
    """An estimate of (1 - p)^tries, of which ``wrong`` answers among ``asked`` were seen.

    Putting wrong / asked in for p flatters (of 20 right answers it concludes that a hundred would be). For ``tries`` up
    to ``asked``: the share of the ways to choose ``tries`` of the answers that hold no wrong one, which is unbiased.
    Beyond, no unbiased estimate exists; it is the mean under Jeffreys' prior, Beta(1/2, 1/2), which keeps in mind that
    20 right answers do not show p = 0: it leaves 0.41 of them after 100 tries.

    >>> all_right(5, 20, 1), all_right(0, 20, 10), all_right(11, 20, 10)
    (0.75, 1.0, 0.0)
    """
    if tries <= asked:
        return math.comb(asked - wrong, tries) / math.comb(asked, tries)
    a, b = wrong + 0.5, asked - wrong + 0.5
    return math.exp(math.lgamma(b + tries) - math.lgamma(b) + math.lgamma(a + b) - math.lgamma(a + b + tries))


def at_least_one_miss(clean: Scored, tries: Sequence[int]) -> dict[int, float]:
    """Null control: the share of clean images that are misread at least once when they are sent as often as an attack
    asked. What an attack finds while it asks means nothing unless it is more."""
    return {asked: 1 - clean.unbroken_after(asked) for asked in tries}
