"""The engine: one thread that owns torch. The event loop hands it work and waits; it never computes."""

from __future__ import annotations

import asyncio
import atexit
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.defenses import Budget, Defence, Outcome, Prediction, Request
from mithridate.errors import BudgetExceededError
from mithridate.types import to_images
from service.batching import Answer, BatchSize, EngineStoppedError, Queue, Waiting
from service.loading import Loaded, load
from service.settings import Settings

logger = logging.getLogger("mithridate.service")


class Engine:
    """Loads a bundle and answers from it, in a thread of its own; requests that wait together are answered together."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._queue = Queue(settings.max_batch_images)
        self._loading: Future[Loaded] = Future()
        self._loaded: Loaded | None = None
        self._running: Sequence[Waiting] = ()
        # A daemon, closed at exit: a process that is told to end at once must not wait for a queue that never moves.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.service_seconds = 0.05
        """Moving average of the engine's time that a request takes up; what Retry-After is computed from."""
        self.on_batch: Callable[[BatchSize], None] = lambda size: None
        """Called in the engine's thread with each batch that it has run."""
        self.on_death: Callable[[BaseException], None] = lambda error: None
        """Called in the engine's thread where that ends without having been told to."""

    @property
    def loaded(self) -> Loaded | None:
        """What it answers from; None before it is loaded, and as soon as nobody answers any more."""
        return self._loaded if self._thread.is_alive() else None

    @property
    def waiting(self) -> int:
        """How many requests it has not begun."""
        return len(self._queue)

    async def load(self) -> Loaded:
        """Verifies and loads the bundle and answers once with every defence; only then is the service ready."""
        atexit.register(self.close)
        self._thread.start()
        return await asyncio.wrap_future(self._loading)

    async def predict(
        self, defence: Defence, pixels: NDArray[np.uint8], *, deadline: float, cancelled: threading.Event
    ) -> Answer:
        """Answers for uint8 ``pixels`` ``[N, C, H, W]``; ``deadline`` is a ``time.monotonic()`` instant.

        Raises BudgetExceededError where the deadline passes or ``cancelled`` is set before there is an answer, and
        EngineStoppedError where there will be none.
        """
        request = Waiting(
            defence=defence,
            pixels=pixels,
            budget=Budget(deadline=deadline, cancelled=cancelled.is_set),
            # Secret, so that nobody can rehearse the randomness an answer will have; unless the settings fix it.
            seed=secrets.randbits(62) if self._settings.seed is None else self._settings.seed,
        )
        self._queue.put(request)
        return await asyncio.wrap_future(request.answer)

    def close(self) -> None:
        """Lets the running batch end and takes no other; what waits gets EngineStoppedError."""
        atexit.unregister(self.close)
        _refuse(self._queue.close())
        if self._thread.ident is not None:
            self._thread.join()

    def forget_ended(self) -> None:
        """Answers those in the queue whose client has left with their error, without waiting for the engine."""
        self._queue.sweep()

    def _work(self) -> None:
        """The thread. Whatever ends it: nobody is left waiting, and nothing claims to be ready."""
        try:
            if self._load():
                self._serve()
        except BaseException as error:
            logger.critical("the engine's thread ends", exc_info=error)
            self._loaded = None  # before anybody hears of it
            self.on_death(error)
        finally:
            self._loaded = None
            _refuse((*self._running, *self._queue.close()))
            if self._loading.running():
                self._loading.set_exception(EngineStoppedError())

    def _load(self) -> bool:
        if not self._loading.set_running_or_notify_cancel():
            return False
        try:
            self._loaded = load(self._settings)
        except Exception as error:
            self._loading.set_exception(error)  # whoever waits for it reports it
            return False
        self._loading.set_result(self._loaded)
        return True

    def _serve(self) -> None:
        while True:
            self._running = self._queue.take()
            if not self._running:
                return
            self._run(self._running)
            self._running = ()  # while it waits for others, it holds on to nobody's images

    def _run(self, batch: Sequence[Waiting]) -> None:
        """Answers all of ``batch``, or, where that fails, each alone: an error is for the request that causes it."""
        started = time.perf_counter()
        try:
            outcomes = _predict(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            logger.warning("a batch of %d requests failed (%r): each is run alone", len(batch), error)
            for request in batch:
                self._run([request])
            return
        size = BatchSize(requests=len(batch), images=sum(len(request.pixels) for request in batch))
        share = (time.perf_counter() - started) / size.requests
        self.service_seconds += (1 - 0.9**size.requests) * (share - self.service_seconds)
        self.on_batch(size)
        for request, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, BudgetExceededError):
                request.answer.set_exception(outcome)
            else:
                waited = started - request.submitted
                request.answer.set_result(Answer(prediction=outcome, queue_seconds=waited, batch=size))


def _predict(batch: Sequence[Waiting]) -> list[Outcome]:
    """One run of the defence that all of ``batch`` wants. Raises whatever that raises."""
    defence = batch[0].defence
    requests = [
        Request(
            images=to_images(torch.from_numpy(waiting.pixels)),
            generator=torch.Generator().manual_seed(waiting.seed),
            budget=waiting.budget,
        )
        for waiting in batch
    ]
    outcomes = [_judge(outcome) for outcome in defence.predict_together(requests)]
    given = [len(outcome.scores) if isinstance(outcome, Prediction) else None for outcome in outcomes]
    asked = [len(waiting.pixels) for waiting in batch]
    if len(given) != len(asked) or any(g not in (None, a) for g, a in zip(given, asked, strict=True)):
        # Else one client would be told what another one's image is.
        raise RuntimeError(f"{defence.name} gave answers for {given} images, asked for {asked}")
    return outcomes


def _judge(outcome: Outcome) -> Outcome:
    """Adaptation that was cut short is a weaker defence, and a client could ask for it: it counts as no answer."""
    if isinstance(outcome, BudgetExceededError):
        return outcome
    reasons = {a.stop_reason for a in outcome.adaptations if a is not None} & {"deadline", "cancelled"}
    return BudgetExceededError(min(reasons)) if reasons else outcome


def _refuse(requests: Sequence[Waiting]) -> None:
    for request in requests:
        if request.answer.done():
            continue
        if request.answer.running() or request.answer.set_running_or_notify_cancel():
            request.answer.set_exception(EngineStoppedError())
