"""How long a request is worked for: until its deadline, and while its client is there."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

from starlette.requests import Request

from service.problems import Problem


@dataclass(kw_only=True, eq=False)
class Wanted:
    """One request that is worked for; ``deadline`` is a ``time.monotonic()`` instant, ``cancelled`` is set as soon as
    nobody waits for it any more."""

    deadline: float
    limit: asyncio.Timeout
    cancelled: threading.Event = field(default_factory=threading.Event)
    left: bool = False
    _at_once: bool = False

    @contextmanager
    def stopped_at_once(self) -> Iterator[None]:
        """Around what does not look at ``cancelled``: a client that leaves ends it as a deadline does."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def leave(self) -> None:
        """The client has gone."""
        self.left = True
        self.cancelled.set()
        if self._at_once and not self.limit.expired():
            self.limit.reschedule(asyncio.get_running_loop().time())


def late() -> Problem:
    """The deadline has passed."""
    return Problem(504, "the deadline passed before there was an answer", reason="deadline")


def left() -> Problem:
    """Nobody will read it; it is for the metrics."""
    return Problem(504, "the client left before there was an answer")


@asynccontextmanager
async def while_wanted(request: Request, *, deadline: float, on_leaving: Callable[[], None]) -> AsyncIterator[Wanted]:
    """Around the work for a request whose body has been read; ``on_leaving`` is called once its client has gone.

    Raises Problem 504 when the ``deadline`` passes, a ``time.monotonic()`` instant.
    """
    limit = asyncio.timeout(max(0.0, deadline - time.monotonic()))
    wanted = Wanted(deadline=deadline, limit=limit)
    watch = asyncio.create_task(_watch(request, wanted, on_leaving))
    try:
        async with limit:
            yield wanted
    except TimeoutError as error:
        raise (left if wanted.left else late)() from error
    finally:
        wanted.cancelled.set()
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


async def _watch(request: Request, wanted: Wanted, on_leaving: Callable[[], None]) -> None:
    """The body has been read, so nothing else can arrive."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    wanted.leave()
    on_leaving()
