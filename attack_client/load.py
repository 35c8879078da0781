"""Sending images at a given rate, and keeping what came of each.

Open model: request ``i`` is due at ``i / rate``, whether or not the earlier ones are answered, and its latency counts
from when it was due. A slow service therefore looks slow (a closed loop would politely wait, and hide it). At most
``concurrency`` requests are under way; one that is due but has to wait for a place is ageing already.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attack_client.client import AsyncClient, ServiceError
from mithridate.errors import InputError, MithridateError


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

    ``abstained``: the defence does not stand by that class.
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
) -> list[Outcome]:
    """Sends all ``shots`` at ``rate`` a second, in random order so that no kind meets a quieter machine.

    ``bundle``: the digest that answers must be of; one of another bundle is an error.
    """
    order = list(shots)
    random.Random(seed).shuffle(order)  # noqa: S311
    places = asyncio.Semaphore(concurrency)
    start, done = time.perf_counter(), 0

    async def one(number: int, shot: Shot) -> Outcome:
        nonlocal done
        due = start + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        async with places:
            outcome = await _send(client, shot, due, bundle)
        done += 1
        record(outcome)
        progress(done, len(order))
        return outcome

    return list(await asyncio.gather(*(one(number, shot) for number, shot in enumerate(order))))


async def _send(client: AsyncClient, shot: Shot, due: float, bundle: str | None) -> Outcome:
    class_index = label = error = service_ms = None
    abstained = False
    try:
        answer = await client.predict(shot.content, defense=shot.defense)
        if bundle is not None and answer.bundle.get("digest") != bundle:
            raise InputError(f"the service now answers from another bundle, {answer.bundle.get('digest')}")
        first = answer.predictions[0]
        class_index, label, service_ms = first.class_index, first.label, answer.timings_ms.get("total")
        abstained = first.abstained
    except ServiceError as problem:
        error = f"http {problem.status}"
    except MithridateError as problem:
        error = str(problem)
    return Outcome(
        image=shot.image,
        kind=shot.kind,
        defense=shot.defense,
        class_index=class_index,
        label=label,
        error=error,
        latency_ms=1000 * (time.perf_counter() - due),
        service_ms=service_ms,
        abstained=abstained,
    )
