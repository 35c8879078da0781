"""When the images of an attack are due: by the clock, until the service refuses some; then as late as it asks."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

from attack_client.retry import LONGEST_WAIT_SECONDS, PATIENCE_SECONDS

_RECOVERY = 1.005
"""Of the rate, with every answer: about 140 of them make up for one refusal."""

_NOT_SAID = 1.0
"""Seconds to wait where a refusal does not say."""


class Turn(NamedTuple):
    """Leave to send one request, and when it was due; ``epoch`` counts the refusals until then."""

    due: float
    epoch: int


class Pace:
    """Turns at ``rate`` a second, whether or not earlier ones are answered, as long as none is refused.

    A refusal lets nothing be due before the service wants to be asked again, and halves the rate, once for all requests
    that were under way, to no less than one in the time it asks for. Answers bring the rate back. ``given_up``: for
    ``patience_seconds`` there were refusals and nothing else.
    """

    def __init__(
        self,
        rate: float,
        *,
        longest_wait_seconds: float = LONGEST_WAIT_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._set = self._rate = rate
        self._longest, self._patience = longest_wait_seconds, patience_seconds
        self._queue = asyncio.Lock()
        self._next = time.perf_counter()
        self._epoch = 0
        self._refused_since: float | None = None
        self.given_up = False

    async def turn(self) -> Turn:
        """Waits for the next one, in the order of the calls."""
        async with self._queue:
            while not self.given_up and (early := self._next - time.perf_counter()) > 0:  # noqa: ASYNC110
                await asyncio.sleep(early)  # a refusal may have put it off meanwhile
            due = self._next
            self._next += 1 / self._rate
            return Turn(due, self._epoch)

    def holds(self, turn: Turn) -> bool:
        """Whether nothing was refused since."""
        return turn.epoch == self._epoch

    def answered(self) -> None:
        """To be told of every answer."""
        self._refused_since = None
        self._rate = min(self._set, self._rate * _RECOVERY)

    def refused(self, turn: Turn, retry_after: float | None) -> None:
        """To be told of every refusal, with the seconds that the service asks for."""
        now, wait = time.perf_counter(), min(_NOT_SAID if retry_after is None else retry_after, self._longest)
        self._refused_since = now if self._refused_since is None else self._refused_since
        self.given_up = self.given_up or now + wait - self._refused_since > self._patience
        self._next = max(self._next, now + wait)
        if self.holds(turn):
            self._epoch += 1
            self._rate = min(self._rate, max(self._rate / 2, 1 / max(wait, 1e-3)))
