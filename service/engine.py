"""The engine: one thread that owns torch. Whoever hands it work waits, and never computes.

It runs in the service's own process, or (service/engine_process.py) in another that holds nothing else.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.defenses import Budget, Defence, Outcome, Prediction, Request
from mithridate.errors import BudgetExceededError
from mithridate.types import to_images
from service.batching import Answer, BatchSize, EngineStoppedError, Queue, Waiting
from service.device_memory import DeviceMemory, device_memory
from service.loading import Loaded, load
from service.out_of_memory import OutOfMemory, free_memory, is_out_of_memory, join
from service.settings import Settings

logger = logging.getLogger("mithridate.service")


class Engine:
    """Loads a bundle and answers from it, in a thread of its own; requests that wait together are answered together."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._queue = Queue(settings.max_batch_images)
        self._loading: Future[Loaded[Defence]] = Future()
        self._loaded: Loaded[Defence] | None = None
        self._running: Sequence[Waiting] = ()
        # A daemon, closed at exit: a process that is told to end at once must not wait for a queue that never moves.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.on_batch: Callable[[BatchSize], None] = lambda size: None
        """Called in the engine's thread with each batch that it has run."""
        self.on_begin: Callable[[Sequence[Waiting]], None] = lambda batch: None
        """Called in the engine's thread with what it has taken out of the queue."""
        self.on_death: Callable[[BaseException], None] = lambda error: None
        """Called in the engine's thread where that ends without having been told to."""

    @property
    def loaded(self) -> Loaded[Defence] | None:
        """What it answers from; None before it is loaded, and as soon as nobody answers any more."""
        return self._loaded if self._thread.is_alive() else None

    @property
    def waiting(self) -> int:
        """How many requests it has not begun."""
        return len(self._queue)

    @property
    def device_memory(self) -> Sequence[DeviceMemory]:
        """What this process holds of each GPU."""
        return device_memory()

    def start(self) -> Future[Loaded[Defence]]:
        """Verifies and loads the bundle and answers once with every defence; only then is there what it gives."""
        atexit.register(self.close)
        self._thread.start()
        return self._loading

    async def load(self) -> Loaded[Defence]:
        """The same, for an event loop."""
        return await asyncio.wrap_future(self.start())

    def submit(
        self,
        defence: Defence,
        pixels: NDArray[np.uint8],
        *,
        budget: Budget,
        seed: int | None = None,
        number: int = 0,
        submitted: float | None = None,
    ) -> Waiting:
        """Puts uint8 ``pixels`` ``[N, C, H, W]`` into the queue; ``answer`` of what it gives will have the answer.

        ``seed``: what the request's randomness begins with; unless given, that of the settings, or a secret one.
        ``submitted``: the ``time.perf_counter()`` that waiting counts from, where that is not now. Raises
        EngineStoppedError where there will be no answer.
        """
        if seed is None:
            # Secret, so that nobody can rehearse the randomness an answer will have; unless the settings fix it.
            seed = secrets.randbits(62) if self._settings.seed is None else self._settings.seed
        since = time.perf_counter() if submitted is None else submitted
        request = Waiting(defence=defence, pixels=pixels, budget=budget, seed=seed, number=number, submitted=since)
        self._queue.put(request)
        return request

    async def predict(
        self,
        defence: Defence,
        pixels: NDArray[np.uint8],
        *,
        deadline: float,
        cancelled: threading.Event,
        seed: int | None = None,
    ) -> Answer:
        """Answers for ``pixels``; ``deadline`` is a ``time.monotonic()`` instant.

        Raises BudgetExceededError where the deadline passes or ``cancelled`` is set before there is an answer, and
        EngineStoppedError where there will be none.
        """
        budget = Budget(deadline=deadline, cancelled=cancelled.is_set)
        return await asyncio.wrap_future(self.submit(defence, pixels, budget=budget, seed=seed).answer)

    def close(self) -> None:
        """Lets the running batch end and takes no other; what waits gets EngineStoppedError."""
        atexit.unregister(self.close)
        _refuse(self._queue.close())
        if self._thread.ident is not None:
            self._thread.join()

    async def end(self) -> None:
        """The same, for an event loop."""
        await asyncio.to_thread(self.close)

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
            self.on_begin(self._running)
            self._run(self._running)
            self._running = ()  # while it waits for others, it holds on to nobody's images

    def _run(self, batch: Sequence[Waiting]) -> None:
        """Answers all of ``batch``, or, where that fails, each alone: an error is for the request that causes it.

        Raises OutOfMemory where the memory does not do for a part of it either.
        """
        started = time.perf_counter()
        found = _try(batch)
        if isinstance(found, Exception) and len(batch) > 1:
            logger.warning("a batch of %d requests failed (%r): each is run alone", len(batch), found)
            short = is_out_of_memory(found)
            del found  # its frames hold the tensors that there was no room for
            for request in batch:
                self._run_alone(request, short=short)
        elif isinstance(found, Exception):
            self._fail(batch[0], found, started, short=False)
        else:
            self._answer(batch, found, started)

    def _run_alone(self, request: Waiting, *, short: bool) -> None:
        """One of a batch that failed; ``short``: for want of memory, so that this is the smaller try."""
        if short:
            free_memory()
        started = time.perf_counter()
        found = _try([request])
        if isinstance(found, Exception):
            self._fail(request, found, started, short=short)
        else:
            self._answer([request], found, started)

    def _fail(self, request: Waiting, error: Exception, started: float, *, short: bool) -> None:
        """Gives ``request`` its error; want of memory is answered by one smaller try, unless this was it."""
        if not is_out_of_memory(error):
            request.answer.set_exception(error)
            return
        said = _first_line(error)
        if short:
            raise OutOfMemory(said)
        logger.warning("no memory for %d images (%s): tried once more, in halves", len(request.pixels), said)
        free_memory()
        found = _try_halves(request)
        if isinstance(found, Exception):
            if is_out_of_memory(found):
                raise OutOfMemory(_first_line(found))
            request.answer.set_exception(found)
        else:
            self._answer([request], [found], started)

    def _answer(self, batch: Sequence[Waiting], outcomes: Sequence[Outcome], started: float) -> None:
        size = BatchSize(requests=len(batch), images=sum(len(request.pixels) for request in batch))
        self.on_batch(size)
        for request, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, BudgetExceededError):
                request.answer.set_exception(outcome)
            else:
                waited = started - request.submitted
                request.answer.set_result(Answer(prediction=outcome, queue_seconds=waited, batch=size))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _try(batch: Sequence[Waiting]) -> list[Outcome] | Exception:
    """``_predict``, or its error; want of memory without the frames, and so the tensors, that it was raised in."""
    try:
        return _predict(batch)
    except Exception as error:
        if is_out_of_memory(error):
            error.__context__ = None
            return error.with_traceback(None)
        return error


def _try_halves(request: Waiting) -> Outcome | Exception:
    """The answer to a request out of two smaller ones: an image's answer does not depend on those beside it. What has
    nothing to halve, an image alone or what says so (``divides``), is tried again as it is."""
    if not getattr(request.defence, "divides", True):
        found = _try([request])
        return found if isinstance(found, Exception) else found[0]
    middle = len(request.pixels) // 2
    answers: list[Prediction] = []
    for pixels in (request.pixels[:middle], request.pixels[middle:]):
        if len(pixels):
            found = _try([replace(request, pixels=pixels)])
            if isinstance(found, Exception):
                return found
            if isinstance(found[0], BudgetExceededError):
                return found[0]
            answers.append(found[0])
    return answers[0] if len(answers) == 1 else join(*answers)


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
