"""What a black-box attack sees of a defence: scores or labels for 8-bit images, every query counted.

Two oracles answer alike: a defence in this process (``attacks.in_process``) and a service over HTTP
(``attack_client.oracle``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

from mithridate.types import Labels, Pixels, Scores

Track = Literal["scores", "labels"]
"""``scores``: the attacker sees every class's score. ``labels``: only the class that is answered."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """For ``R`` queries: ``labels`` int64 ``[R]``, and ``scores`` float64 ``[R, C]`` on that track, else None."""

    labels: torch.Tensor
    scores: Scores | None = None


def answers_from_scores(scores: Scores, track: Track) -> Answers:
    """What a client knows of ``scores`` ``[R, C]``, the service's confidences in the order of the classes.

    The one rule for every oracle. The service writes each score into its JSON with all digits, so nothing is rounded: a
    client reads back the double that the server's float is. The label is the first of the highest scores.
    """
    seen = scores.detach().to("cpu", torch.float64)
    return Answers(labels=seen.argmax(1), scores=seen if track == "scores" else None)


def occurrences(rows: torch.Tensor) -> torch.Tensor:
    """``[R]``: how many of the same row come before.

    >>> occurrences(torch.tensor([7, 3, 7, 7])).tolist()
    [0, 0, 1, 2]
    """
    order = rows.argsort(stable=True)
    ordered = rows[order]
    before = torch.empty_like(rows)
    before[order] = torch.arange(len(rows)) - torch.searchsorted(ordered, ordered)
    return before


class Oracle(Protocol):
    """Answers queries. Not differentiable, and nothing else about the defence is known."""

    @property
    def track(self) -> Track: ...

    @property
    def classes(self) -> int: ...

    def ask(self, rows: torch.Tensor, pixels: Pixels) -> Answers:
        """One query each for uint8 ``pixels`` ``[R, C, H, W]``; ``rows`` int64 ``[R]`` says which of the attacked
        images each is asked for (an image may occur several times). Each counts once, whatever has to be sent again.

        A random defence draws once a call for each image and from its pixels: copies of one image get independent
        answers in calls of their own only.
        """
        ...


@runtime_checkable
class PartwiseOracle(Oracle, Protocol):
    """An oracle that hands over answers as they come, so that whoever keeps them loses none when it is killed."""

    def ask_in_parts(self, rows: torch.Tensor, pixels: Pixels) -> Iterator[tuple[torch.Tensor, Answers]]:
        """As ``ask``: pairs of places in ``rows``, int64 ``[P]``, and their answers; each place once, in any order."""
        ...


@dataclass(frozen=True, kw_only=True)
class BlackBoxResult:
    """For ``N`` images: what to send, ``pixels`` uint8 ``[N, C, H, W]`` (the most promising point that was asked for
    and lies in the ball; the image itself where there is none), ``queries`` int64 ``[N]`` spent, and ``broken_at``
    int64 ``[N]``: the number of the first query (from 1) in the ball that was misread, 0 where none was.
    """

    pixels: Pixels
    queries: torch.Tensor
    broken_at: torch.Tensor


class BlackBoxAttack(Protocol):
    """Makes images that are misread, from answers alone."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def track(self) -> Track:
        """The least it needs to see."""
        ...

    def run(self, oracle: Oracle, pixels: Pixels, labels: Labels, *, seed: int, budget: int) -> BlackBoxResult:
        """At most ``budget`` queries for each of ``pixels``, uint8 ``[N, C, H, W]``, with true classes ``labels``.

        All images advance in lock step, one ``ask`` for all that are still going on. What is drawn for an image
        depends on ``seed`` and its row alone, so the same answers lead to the same queries.
        """
        ...
