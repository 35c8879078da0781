"""What came of one black-box attack on one defence behind a service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attack_client.oracle import Traffic
from mithridate.attacks.oracle import Track
from mithridate.evaluation import Interval, percentile, wilson_interval

LADDER = (100, 1000, 5000)
"""Budgets that are reported, as far as the attack's own reaches."""


@dataclass(frozen=True, kw_only=True)
class AttackedImage:
    """One image and what the attack made of it.

    ``queries`` that were answered, ``retried`` of them sent more than once, ``abstentions`` among them; ``broken_at``
    the number of the first query in the ball that was misread, 0 where none was; ``linf`` in levels, ``l2`` in [0, 1]
    units; ``seconds`` its share of the waiting. ``answers`` and ``abstained``: what the final example is called, each
    time that it was sent.
    """

    image: int
    truth: int
    queries: int
    broken_at: int
    linf: int
    l2: float
    seconds: float
    retried: int
    abstentions: int
    answers: tuple[int, ...]
    abstained: tuple[bool, ...]

    @property
    def right(self) -> float:
        """The share of the answers to the final example that are right and stood by."""
        pairs = zip(self.answers, self.abstained, strict=True)
        return sum(answer == self.truth and not abstained for answer, abstained in pairs) / len(self.answers)

    @property
    def held_back(self) -> float:
        """The share of the answers that the defence abstained from."""
        return sum(self.abstained) / len(self.answers)

    @property
    def stands(self) -> bool:
        """Right in more than half of the answers."""
        return self.right > 0.5

    @property
    def success(self) -> bool:
        """For the attacker: a wrong answer that the defence stands by, in at least half of the answers."""
        return 1 - self.right - self.held_back >= 0.5


@dataclass(frozen=True, kw_only=True)
class NullControl:
    """Clean images sent as often as the attack asked: the first wrong answer to each, 0 where there was none."""

    broken_at: tuple[int, ...]
    queries: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attack on one defence. ``sent``: queries that were sent now, without those known from before. ``error``: why
    there are no images."""

    defense: str
    attack: str
    config: str = ""
    track: Track = "scores"
    random: bool = False
    images: tuple[AttackedImage, ...] = ()
    pixels: NDArray[np.uint8] | None = None
    traffic: Traffic = field(default_factory=Traffic)
    sent: int = 0
    null: NullControl | None = None
    error: str | None = None

    @property
    def right(self) -> int:
        """Images that stand."""
        return sum(image.stands for image in self.images)

    @property
    def abstained(self) -> int:
        """Images that are mostly abstained from, and not mostly wrong."""
        return sum(not image.stands and not image.success for image in self.images)

    @property
    def accuracy(self) -> float:
        """The share of images that stand."""
        return self.right / len(self.images)

    @property
    def interval(self) -> Interval:
        """Of the accuracy."""
        return wilson_interval(self.right, len(self.images))

    def standing(self, queries: int, clean: Sequence[bool]) -> float:
        """The share of images that were read right as they were and in all of the first ``queries`` answers."""
        return _standing([image.broken_at for image in self.images], queries, clean)

    def standing_by_luck(self, queries: int, clean: Sequence[bool]) -> float | None:
        """The same share where the clean images were sent instead."""
        return None if self.null is None else _standing(self.null.broken_at, queries, clean)

    def to_json(self, clean: Sequence[bool], budget: int) -> dict[str, Any]:
        """As the summary has it. ``clean``: which images were read right as they were."""
        head = {"defense": self.defense, "attack": self.attack, "config": self.config, "track": self.track}
        if self.error is not None:
            return {**head, "error": self.error}
        seconds = [1000 * value for value in self.traffic.seconds]
        return {
            **head,
            "error": None,
            "random": self.random,
            "images": len(self.images),
            "right": self.right,
            "abstained": self.abstained,
            "wrong": len(self.images) - self.right - self.abstained,
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "expected_accuracy": sum(image.right for image in self.images) / len(self.images),
            "scorings": len(self.images[0].answers),
            "queries_median": percentile([float(image.queries) for image in self.images], 0.5),
            "queries_total": sum(image.queries for image in self.images),
            "queries_retried": sum(image.retried for image in self.images),
            "abstentions": sum(image.abstentions for image in self.images),
            "accuracy_at": {str(rung): self.standing(rung, clean) for rung in rungs(budget)},
            "null_control": None
            if self.null is None
            else {
                "queries": self.null.queries,
                "accuracy_at": {str(rung): self.standing_by_luck(rung, clean) for rung in rungs(budget)},
            },
            "requests": self.traffic.requests,
            "requests_recalled": self.traffic.recalled,
            "requests_merged": self.traffic.merged,
            "p50_ms": percentile(seconds, 0.5),
            "p95_ms": percentile(seconds, 0.95),
            "p99_ms": percentile(seconds, 0.99),
            "linf_max": max(image.linf for image in self.images),
        }


def rungs(budget: int) -> tuple[int, ...]:
    """The budgets to report.

    >>> rungs(2000)
    (100, 1000, 2000)
    """
    return (*(rung for rung in LADDER if rung < budget), budget)


def _standing(broken_at: Sequence[int], queries: int, clean: Sequence[bool]) -> float:
    pairs = zip(broken_at, clean, strict=True)
    return sum(right and not 0 < first <= queries for first, right in pairs) / len(broken_at)
