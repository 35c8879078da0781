"""Traffic at a given rate or from a given number of clients, and what came of each request.

Open model: requests fall due by the clock, whether or not earlier ones are answered, and a request's latency counts
from when it was due. A service that stalls therefore looks as slow as its users would find it; a closed loop would
politely wait, and hide it ("coordinated omission", Tene 2015). Closed model: each client asks again once it is
answered; what an attacker can get out of the service, and no statement about its users.
"""

from __future__ import annotations

import asyncio
import gc
import select
import selectors
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attack_client.pool import CONNECTION_ERRORS, Flight, Pool
from attack_client.wire import Target
from mithridate.errors import InputError

_AT_ONCE = 16
"""Requests sent in one turn of the event loop: those that are late must not keep answers from being read."""
_AFTER_ERROR = 0.05
"""Seconds that a client of the closed model waits after an error that cost it none."""


class Payload(NamedTuple):
    """One request: ``kind`` says clean or which attack, ``image`` numbers it within its set."""

    kind: str
    image: int
    content: bytes


class Sample(NamedTuple):
    """What came of one request. Seconds since the warm-up ended, so those of the warm-up are due before 0.

    ``due``: by the schedule; ``taken``: when the generator took it up; ``sent``: when it was written to a connection
    (None: never); ``done``: answered or given up. ``status`` 0 where there was no answer.
    """

    kind: str
    image: int
    due: float
    taken: float
    sent: float | None
    done: float
    status: int
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What to send: a ``share`` in [0, 1] of it from ``adversarial``, the rest from ``clean``, all in random order."""

    clean: tuple[Payload, ...]
    adversarial: tuple[Payload, ...] = ()
    share: float = 0.0

    def stream(self, seed: int) -> Iterator[Payload]:
        """Endlessly. The same seed gives the same order."""
        rng = np.random.default_rng(seed)
        while True:
            for attacked, place in zip(rng.random(1024) < self.share, rng.random(1024), strict=True):
                chosen = self.adversarial if attacked else self.clean
                yield chosen[int(place * len(chosen))]


@dataclass(frozen=True, kw_only=True)
class Connections:
    """How the generator reaches the service."""

    target: Target
    count: int
    timeout_seconds: float


@dataclass(frozen=True, kw_only=True)
class Shooting:
    """All samples of one run, and the share of a core that this process used meanwhile."""

    samples: tuple[Sample, ...]
    cpu_share: float


def arrival_times(rate: float, seconds: float, *, poisson: bool, seed: int | tuple[int, int]) -> NDArray[np.float64]:
    """When requests are due within ``seconds``: evenly spaced, or as a Poisson process, given how many there are.

    Given their number, the arrivals of a Poisson process are independent and uniform (Ross, Introduction to
    Probability Models, 5.3.5). Fixing it holds the set rate exactly, which a free process would miss by chance.
    """
    count = round(rate * seconds)
    if poisson:
        return np.sort(np.random.default_rng(seed).random(count) * seconds)
    return np.arange(count) / rate


def open_loop(
    connections: Connections,
    traffic: Traffic,
    *,
    rate: float,
    seconds: float,
    warmup_seconds: float = 0.0,
    poisson: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Shooting:
    """Sends at ``rate`` a second. Ends when all is answered or given up. Raises InputError where nobody listens."""
    warmup = arrival_times(rate, warmup_seconds, poisson=poisson, seed=(seed, 1))
    measured = warmup_seconds + arrival_times(rate, seconds, poisson=poisson, seed=(seed, 2))
    times: list[float] = [*warmup.tolist(), *measured.tolist()]
    if not times:
        raise ValueError(f"{rate} requests a second for {seconds} s are none")

    async def shoot() -> _Log:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        stream = traffic.stream(seed)
        flights: list[tuple[Payload, Flight]] = []
        missing = len(times)

        def finished(flight: Flight) -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                ended.set()

        pool = _pool(connections, finished)
        await pool.open()
        start = time.perf_counter()

        def tick() -> None:
            for _ in range(_AT_ONCE):
                number, now = len(flights), time.perf_counter()
                if number == len(times):
                    return
                due = start + times[number]
                if due > now:
                    loop.call_later(due - now, tick)
                    return
                payload = next(stream)
                flight = Flight(number, payload.content, due, now)
                flights.append((payload, flight))
                pool.submit(flight)
            loop.call_soon(tick)

        tick()
        await _until(ended, lambda: progress(len(times) - missing, len(times)))
        await pool.close()
        return start, flights

    return _run(shoot, warmup_seconds)


def closed_loop(
    connections: Connections,
    traffic: Traffic,
    *,
    seconds: float,
    warmup_seconds: float = 0.0,
    most: int = 2_000_000,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Shooting:
    """As many clients as ``connections``, each asking again once it is answered. Ends and raises as the open loop; also
    raises InputError after ``most`` requests: memory would not hold many more."""

    async def shoot() -> _Log:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        stream = traffic.stream(seed)
        flights: list[tuple[Payload, Flight]] = []
        left = connections.count

        def ask() -> None:
            nonlocal left
            now = time.perf_counter()
            if now >= end or len(flights) >= most:
                left -= 1
                if not left:
                    ended.set()
                return
            payload = next(stream)
            flight = Flight(len(flights), payload.content, now, now)
            flights.append((payload, flight))
            pool.submit(flight)

        def finished(flight: Flight) -> None:
            if flight.error in CONNECTION_ERRORS:
                loop.call_later(_AFTER_ERROR, ask)
            else:
                ask()

        pool = _pool(connections, finished)
        await pool.open()
        start = time.perf_counter()
        end = start + warmup_seconds + seconds
        for _ in range(connections.count):
            ask()
        whole = warmup_seconds + seconds
        await _until(ended, lambda: progress(round(min(time.perf_counter() - start, whole)), round(whole)))
        took = time.perf_counter() - start
        await pool.close()
        if took < whole:
            raise InputError(f"{most} requests were answered within {took:.0f} s; choose a shorter duration than that")
        return start, flights

    return _run(shoot, warmup_seconds)


def _pool(connections: Connections, finished: Callable[[Flight], None]) -> Pool:
    return Pool(
        connections.target,
        connections=connections.count,
        timeout_seconds=connections.timeout_seconds,
        finished=finished,
    )


async def _until(ended: asyncio.Event, report: Callable[[], None]) -> None:
    while not ended.is_set():
        report()
        try:
            async with asyncio.timeout(0.5):
                await ended.wait()
        except TimeoutError:
            pass
    report()


_Log = tuple[float, list[tuple[Payload, Flight]]]
"""When the clock started, and what was sent since."""


def _run(shoot: Callable[[], Coroutine[None, None, _Log]], warmup_seconds: float) -> Shooting:
    with _undisturbed(), asyncio.Runner(loop_factory=_event_loop) as runner:
        wall, cpu = time.perf_counter(), time.process_time()
        start, flights = runner.run(shoot())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    samples = tuple(_sample(payload, flight, start + warmup_seconds) for payload, flight in flights)
    return Shooting(samples=samples, cpu_share=cpu / wall)


def _sample(payload: Payload, flight: Flight, zero: float) -> Sample:
    assert flight.done is not None
    return Sample(
        kind=payload.kind,
        image=payload.image,
        due=flight.due - zero,
        taken=flight.taken - zero,
        sent=None if flight.sent is None else flight.sent - zero,
        done=flight.done - zero,
        status=flight.status,
        error=flight.error,
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection meanwhile: a pause of ours would be measured as one of the service."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _PreciseSelector(selectors.EpollSelector if sys.platform == "linux" else selectors.DefaultSelector):  # type: ignore[misc]
    """Waits to the microsecond. ``epoll`` counts milliseconds, and requests would leave up to one late."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0 and self.fileno() < 1024:  # as many as select() can name
            select.select((self.fileno(),), (), (), timeout)
            timeout = 0
        found: list[tuple[selectors.SelectorKey, int]] = super().select(timeout)
        return found


def _event_loop() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(_PreciseSelector()) if sys.platform == "linux" else asyncio.new_event_loop()
