"""Sending images at a given rate, and keeping what came of each.

Open model: request ``i`` is due at ``i / rate``, whether or not the earlier ones are answered, and its latency counts
from when it was due. A slow service therefore looks slow (a closed loop would politely wait, and hide it). At most
``concurrency`` requests are under way; one that is due but has to wait for a place is ageing already.

A refusal (429) says nothing of the defence: that image is sent again, all of them later and slower (``pace``), and due
anew. What a service does under more than it takes is the question of a load test, which has a generator of its own.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attack_client.answers import Answer
from attack_client.client import AsyncClient, ServiceError
from attack_client.pace import Pace
from attack_client.retry import REFUSED
from mithridate.errors import MithridateError

CLEAN = "clean"
"""The kind of image that nobody attacked; every other kind is named after its attack."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One image to send: ``image`` numbers it within its data set, ``kind`` says clean or which attack."""

    image: int
    kind: str
    defense: str
    content: bytes


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a shot: the class it was given, or the error; ``latency_ms`` from when it was due.

    ``abstained``: the defence does not stand by that class. ``refused``: how often it had been turned away before.
    """

    image: int
    kind: str
    defense: str
    class_index: int | None
    label: str | None
    error: str | None
    latency_ms: float
    service_ms: float | None
    abstained: bool = False
    refused: int = 0


async def fire(
    client: AsyncClient,
    shots: Sequence[Shot],
    *,
    rate: float,
    seed: int,
    concurrency: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
    record: Callable[[Outcome], None] = lambda outcome: None,
    bundle: str | None = None,
    pace: Pace | None = None,
) -> list[Outcome]:
    """Sends all ``shots`` at ``rate`` a second, in random order so that no kind meets a quieter machine.

    ``bundle``: the digest that answers must be of; one of another bundle is an error. ``pace``: in place of ``rate``.
    """
    order = list(shots)
    random.Random(seed).shuffle(order)  # noqa: S311
    places = asyncio.Semaphore(concurrency)
    turns, done = pace or Pace(rate), 0

    async def one(shot: Shot) -> Outcome:
        nonlocal done
        outcome = await _send(client, shot, turns, places, bundle)
        done += 1
        record(outcome)
        progress(done, len(order))
        return outcome

    return list(await asyncio.gather(*map(one, order)))


async def _send(client: AsyncClient, shot: Shot, pace: Pace, places: asyncio.Semaphore, bundle: str | None) -> Outcome:
    refused = 0
    while True:
        turn = await pace.turn()
        async with places:
            if pace.given_up:
                return _outcome(shot, turn.due, f"http {REFUSED}", refused)
            if not pace.holds(turn):  # another was refused while this one waited for a place
                continue
            try:
                answer = await client.predict(shot.content, defense=shot.defense)
            except ServiceError as problem:
                if problem.status == REFUSED:
                    pace.refused(turn, problem.retry_after)
                    refused += 1
                    continue
                return _outcome(shot, turn.due, f"http {problem.status}", refused)
            except MithridateError as problem:
                return _outcome(shot, turn.due, str(problem), refused)
        pace.answered()
        given = answer.bundle.get("digest")
        if bundle is not None and given != bundle:
            return _outcome(shot, turn.due, f"the service now answers from another bundle, {given}", refused)
        return _outcome(shot, turn.due, answer, refused)


def _outcome(shot: Shot, due: float, came: Answer | str, refused: int) -> Outcome:
    """``came``: the answer, or the error."""
    first = None if isinstance(came, str) else came.predictions[0]
    return Outcome(
        image=shot.image,
        kind=shot.kind,
        defense=shot.defense,
        class_index=None if first is None else first.class_index,
        label=None if first is None else first.label,
        error=came if isinstance(came, str) else None,
        latency_ms=1000 * max(0.0, time.perf_counter() - due),
        service_ms=None if isinstance(came, str) else came.timings_ms.get("total"),
        abstained=first is not None and first.abstained,
        refused=refused,
    )
