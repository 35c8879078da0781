"""The oracle that is a defence in this process."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import torch

from mithridate.attacks.oracle import Answers, Track, answers_from_scores
from mithridate.defenses import Budget, Defence
from mithridate.types import Pixels, to_images


class InProcessOracle:
    """``defence`` behind the least that a client sees of it.

    What is asked together is answered in calls of ``images_a_call``, in order; a service asked that way gives the
    same answers. ``seed`` draws the randomness of the defence: secret, as the service's, unless given.
    """

    def __init__(
        self,
        defence: Defence,
        *,
        classes: int,
        track: Track = "scores",
        images_a_call: int = 64,
        seed: int | None = None,
    ) -> None:
        self._defence = defence
        self._classes = classes
        self._track: Track = track
        self._images_a_call = images_a_call
        self._generator = torch.Generator().manual_seed(secrets.randbits(62) if seed is None else seed)
        self._queries = torch.zeros(0, dtype=torch.int64)

    @property
    def track(self) -> Track:
        return self._track

    @property
    def classes(self) -> int:
        return self._classes

    @property
    def queries(self) -> torch.Tensor:
        """int64 ``[rows]``: how many were answered for each image, up to the last row asked for."""
        return self._queries.clone()

    def ask(self, rows: torch.Tensor, pixels: Pixels) -> Answers:
        """See ``Oracle``."""
        parts = [answers for _, answers in self.ask_in_parts(rows, pixels)]
        if not parts:
            return answers_from_scores(torch.zeros(0, self._classes), self._track)
        return Answers(
            labels=torch.cat([part.labels for part in parts]),
            scores=torch.cat([part.scores for part in parts if part.scores is not None])
            if self._track == "scores"
            else None,
        )

    def ask_in_parts(self, rows: torch.Tensor, pixels: Pixels) -> Iterator[tuple[torch.Tensor, Answers]]:
        """See ``PartwiseOracle``: one part a call, in order."""
        for places in torch.arange(len(rows)).split(self._images_a_call):
            if len(places):
                prediction = self._defence.predict(
                    to_images(pixels[places]), generator=self._generator, budget=Budget()
                )
                self._count(rows[places])
                yield places, answers_from_scores(prediction.scores, self._track)

    def _count(self, rows: torch.Tensor) -> None:
        counted = torch.bincount(rows, minlength=len(self._queries))
        counted[: len(self._queries)] += self._queries
        self._queries = counted
