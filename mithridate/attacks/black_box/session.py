"""One run of a black-box attack: who may still ask, what was spent, and the best point of each image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.attacks.judging import BestPoints, margins
from mithridate.attacks.oracle import BlackBoxResult, Oracle, Track, occurrences
from mithridate.errors import OptionError
from mithridate.types import Epsilon, Labels, Pixels, Scores

_MISREAD_FIRST = 1e6
_NOTHING_NEW = 200
_LEAST = 1e-300
_UNKNOWN = (False, 0.0)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What ``R`` queries say: bool ``misread`` ``[R]``, and float64 ``margins`` ``[R]`` of the log scores, below 0
    where misread; None where only labels are seen.
    """

    misread: torch.Tensor
    margins: torch.Tensor | None = None

    def __getitem__(self, places: torch.Tensor | slice) -> Seen:
        return Seen(misread=self.misread[places], margins=None if self.margins is None else self.margins[places])


def join(parts: list[Seen]) -> Seen:
    """Several, one after the other."""
    return Seen(
        misread=torch.cat([part.misread for part in parts]),
        margins=torch.cat([part.margins for part in parts if part.margins is not None])
        if parts[0].margins is not None
        else None,
    )


def score_margins(scores: Scores, labels: Labels) -> torch.Tensor:
    """``[R]``: how far the true class is ahead, in log scores: of a softmax, the margin of the logits.

    >>> score_margins(torch.tensor([[0.1, 0.8, 0.1]]), torch.tensor([1])).exp().round()
    tensor([8.], dtype=torch.float64)
    """
    return margins(scores.double().clamp_min(_LEAST).log(), labels)


class Session:
    """Counts and judges every query of ``pixels`` uint8 ``[N, C, H, W]`` with true classes ``labels`` ``[N]``.

    Against a defence that always answers the same, a point is asked once: it is remembered, and an image is left alone
    as soon as it is misread in the ball. ``random`` defences show one draw an answer, so neither is done; the number of
    the first misread query is then to be read beside the null control.

    Raises OptionError for a budget below 1, or where the attack ``needs`` scores and the oracle has none.
    """

    def __init__(
        self,
        oracle: Oracle,
        pixels: Pixels,
        labels: Labels,
        *,
        epsilon: Epsilon,
        budget: int,
        needs: Track,
        random: bool,
    ) -> None:
        if budget < 1:
            raise OptionError(f"a budget of {budget} queries an image is out of range; allowed: from 1")
        if needs == "scores" and oracle.track == "labels":
            raise OptionError("the attack needs scores and the oracle answers with labels only; choose a label attack")
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or len(pixels) != len(labels):
            seen = f"{pixels.dtype} {list(pixels.shape)} with {len(labels)} labels"
            raise ValueError(f"images are uint8 [N, C, H, W] with a label each; seen: {seen}")
        self.pixels, self.labels, self.budget = pixels.cpu(), labels.cpu(), budget
        self.spent = torch.zeros(len(pixels), dtype=torch.int64)
        self.open = torch.ones(len(pixels), dtype=torch.bool)
        self._levels = epsilon.levels
        self._oracle, self._needs, self._random = oracle, needs, random
        self._best = BestPoints(self.pixels)
        self._broken_at = torch.zeros(len(pixels), dtype=torch.int64)
        self._known: list[dict[bytes, tuple[bool, float]]] = [{} for _ in range(len(pixels))]
        self._stale = [0] * len(pixels)

    @property
    def rows(self) -> torch.Tensor:
        """int64: the images that are still going on."""
        return self.open.nonzero()[:, 0]

    def ball(self) -> tuple[Pixels, Pixels]:
        """The lowest and the highest levels allowed, both uint8 ``[N, C, H, W]``."""
        wide = self.pixels.to(torch.int16)
        low, high = (wide - self._levels).clamp_min(0), (wide + self._levels).clamp_max(255)
        return low.to(torch.uint8), high.to(torch.uint8)

    def start(self) -> Seen:
        """Every image's first query: itself. It says what is misread without an attack."""
        return self.ask(torch.arange(len(self.pixels)), self.pixels)

    def ask(self, rows: torch.Tensor, points: Pixels, *, rank: bool = True) -> Seen:
        """What the oracle says of ``points`` uint8 ``[R, C, H, W]`` for the open images ``rows`` ``[R]``, one at least.

        Points that are known cost nothing. ``rank``: the answer says how promising a point is; else see ``offer``.
        """
        if self._random:
            return self._query(rows, points, rank=rank)
        keys = list(zip(rows.tolist(), map(_digest, points.numpy()), strict=True))
        places = {key: place for place, key in reversed(list(enumerate(keys)))}  # a point may be here twice
        new = sorted(place for key, place in places.items() if key[1] not in self._known[key[0]])
        answers = {key: self._known[key[0]].get(key[1], _UNKNOWN) for key in places}
        if new:
            asked = slice(None) if len(new) == len(keys) else torch.tensor(new)
            seen = self._query(rows[asked], points[asked], rank=rank)
            found = seen.misread.to(torch.float64) if seen.margins is None else seen.margins
            told = zip(seen.misread.tolist(), found.tolist(), strict=True)
            answers.update(zip((keys[place] for place in new), told, strict=True))
        self._remember(answers, {keys[place][0] for place in new})
        said = torch.tensor([answers[key] for key in keys], dtype=torch.float64)  # [R, 2]
        return Seen(misread=said[:, 0] > 0, margins=said[:, 1] if self._needs == "scores" else None)

    def offer(self, rows: torch.Tensor, points: Pixels, cost: torch.Tensor) -> None:
        """Points of the open images ``rows``, each once, that are the better the lower ``cost`` ``[R]``."""
        inside = self._distances(rows, points) <= self._levels
        self._best.offer(rows[inside], points[inside], cost[inside])

    def close(self, row: int) -> None:
        """The attack has nothing more to ask for this image."""
        self.open[row] = False
        self._known[row] = {}

    def result(self) -> BlackBoxResult:
        """What has come of it."""
        return BlackBoxResult(
            pixels=self._best.pixels.clone(), queries=self.spent.clone(), broken_at=self._broken_at.clone()
        )

    def _query(self, rows: torch.Tensor, points: Pixels, *, rank: bool) -> Seen:
        numbers = self.spent[rows] + occurrences(rows) + 1
        if bool((numbers > self.budget).any()):
            raise ValueError(f"more than {self.budget} queries were asked for an image")
        answers = self._oracle.ask(rows, points)
        self.spent = self.spent + torch.bincount(rows, minlength=len(self.spent))
        labels = self.labels[rows]
        misread = answers.labels != labels
        found = None
        if self._needs == "scores":
            assert answers.scores is not None  # looked at in the beginning
            found = score_margins(answers.scores, labels)
        distances = self._distances(rows, points)
        self._note(rows, numbers, misread & (distances <= self._levels))
        if rank:
            cost = torch.where(misread, distances.double(), torch.inf) if found is None else found
            first = _first_of_each(rows, cost - _MISREAD_FIRST * misread)
            self.offer(rows[first], points[first], (cost - _MISREAD_FIRST * misread)[first])
        for row in rows[self.spent[rows] >= self.budget].unique().tolist():
            self.close(row)
        return Seen(misread=misread, margins=found)

    def _note(self, rows: torch.Tensor, numbers: torch.Tensor, broken: torch.Tensor) -> None:
        if not bool(broken.any()):
            return
        for row, number in zip(rows[broken].tolist(), numbers[broken].tolist(), strict=True):
            if self._broken_at[row] == 0:  # in order of asking, so the first is the least
                self._broken_at[row] = number
            if not self._random:
                self.close(row)

    def _distances(self, rows: torch.Tensor, points: Pixels) -> torch.Tensor:
        """Levels of L-infinity, int64 ``[R]``."""
        clean = self.pixels[rows]
        apart = torch.maximum(points, clean) - torch.minimum(points, clean)  # uint8 has no sign
        return apart.flatten(1).amax(1).long()

    def _remember(self, answers: dict[tuple[int, bytes], tuple[bool, float]], told: set[int]) -> None:
        """Keeps ``answers`` of images that go on; ``told`` are the images of which any of them is new."""
        going = self.open.tolist()
        for (row, key), answer in answers.items():
            if going[row]:
                self._known[row][key] = answer
        for row in {row for row, _ in answers}:
            self._stale[row] = 0 if row in told else self._stale[row] + 1
            if self._stale[row] >= _NOTHING_NEW:
                self.close(row)  # it would go round for ever


def _digest(point: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(point).data, digest_size=8).digest()


def _first_of_each(rows: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """The places of the lowest ``cost`` of each row."""
    order = torch.from_numpy(np.lexsort((cost.numpy(), rows.numpy())))
    ordered = rows[order]
    keep = torch.ones(len(rows), dtype=torch.bool)
    keep[1:] = ordered[1:] != ordered[:-1]
    return order[keep]
