"""The queue before the engine: who waits, and who is answered together.

There is no timer: whoever comes while the engine is idle is answered at once and alone. What waits while it works is
taken together when it becomes free, the oldest request first; so batches grow with the load, and only with it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mithridate.defenses import Budget, Defence, Prediction
from mithridate.errors import BudgetExceededError, MithridateError


class EngineStoppedError(MithridateError):
    """The engine takes no more requests: the service stops, or the thread that answers has ended."""

    def __init__(self) -> None:
        super().__init__("the engine has stopped")


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """How many ``requests``, and ``images`` of theirs, were answered in one run of a defence."""

    requests: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prediction, how long it waited for the engine, and in what company it was made."""

    prediction: Prediction
    queue_seconds: float
    batch: BatchSize


@dataclass(frozen=True, kw_only=True, eq=False)
class Waiting:
    """One request in the queue: uint8 ``pixels`` ``[N, C, H, W]``, and the ``answer`` it will get.

    ``seed`` and not a generator: an answer that has to be computed twice begins with the same randomness.
    """

    defence: Defence
    pixels: NDArray[np.uint8]
    budget: Budget
    seed: int
    submitted: float = field(default_factory=time.perf_counter)
    answer: Future[Answer] = field(default_factory=Future)

    def ended(self) -> bool:
        """Whether nobody waits for it any more. Where its budget has ended, this is where it gets its error."""
        if self.answer.cancelled():
            return True
        reason = self.budget.interruption()
        if reason is not None and self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(BudgetExceededError(reason))
        return reason is not None

    def begin(self) -> bool:
        """Whether it is to be answered; if so, it can no longer be cancelled."""
        return not self.ended() and self.answer.set_running_or_notify_cancel()


class Queue:
    """Requests in the order they came, for one thread to take in batches."""

    def __init__(self, max_batch_images: int) -> None:
        self._max_images = max_batch_images
        self._line: deque[Waiting] = deque()
        self._open = True
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._line)

    def put(self, request: Waiting) -> None:
        """Adds a request; cancelling its answer takes it out again. Raises EngineStoppedError after ``close``."""
        with self._changed:
            if not self._open:
                raise EngineStoppedError
            self._line.append(request)
            self._changed.notify()
        request.answer.add_done_callback(lambda answer: self.sweep() if answer.cancelled() else None)

    def sweep(self) -> None:
        """Lets go of those nobody waits for: they need not keep their place and memory until the engine is free."""
        with self._changed:
            self._line = deque(request for request in self._line if not request.ended())

    def take(self) -> list[Waiting]:
        """The oldest request and those it can be answered with, in order. Waits for one; empty after ``close``."""
        with self._changed:
            while self._open:
                batch = self._pick()
                if batch:
                    return batch
                self._changed.wait()
        return []

    def close(self) -> list[Waiting]:
        """Takes and gives no more. Returns what still waited."""
        with self._changed:
            self._open = False
            left = list(self._line)
            self._line.clear()
            self._changed.notify_all()
        return left

    def _pick(self) -> list[Waiting]:
        while self._line:
            oldest = self._line.popleft()
            if oldest.begin():
                return [oldest, *self._companions(oldest)]
        return []

    def _companions(self, oldest: Waiting) -> Sequence[Waiting]:
        """Those behind it that want the same defence, up to the ceiling; none overtakes another of the same defence."""
        if not getattr(oldest.defence, "batches", True):
            return ()
        joined: list[Waiting] = []
        images, full = len(oldest.pixels), False
        others: deque[Waiting] = deque()
        for request in self._line:
            if full or request.defence is not oldest.defence:
                others.append(request)
            elif images + len(request.pixels) > self._max_images:
                full = True
                others.append(request)
            elif request.begin():
                joined.append(request)
                images += len(request.pixels)
        self._line = others
        return joined
