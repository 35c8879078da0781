"""The engine by itself: when it starts, what it lets go of, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import statistics
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from service_helpers import Gate, Serving, Wrapped, check_problem, crowd, install, post, wait_until

from mithridate.datasets import LabelledImages
from mithridate.defenses import Defence, Outcome, Request
from mithridate.errors import BudgetExceededError
from service.batching import Answer, EngineStoppedError
from service.engine import Engine
from service.settings import load_settings


@contextlib.asynccontextmanager
async def loaded_engine(bundle: Path, **flags: Any) -> AsyncIterator[tuple[Engine, Defence]]:
    """An engine and its undefended base model."""
    engine = Engine(load_settings(**{"bundle": bundle, "defense": "none", "offer": [], "seed": 7, **flags}))
    loaded = await engine.load()
    try:
        yield engine, loaded.defences["none"]
    finally:
        await asyncio.to_thread(engine.close)


def ask(
    engine: Engine, defence: Defence, pixels: Any, cancelled: threading.Event | None = None
) -> asyncio.Task[Answer]:
    deadline = time.monotonic() + 60
    return asyncio.create_task(
        engine.predict(defence, pixels, deadline=deadline, cancelled=cancelled or threading.Event())
    )


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition)


def test_an_idle_engine_starts_at_once(digits_bundle: Path, digits_test: LabelledImages) -> None:
    """A request that is alone waits less for the engine than a forward pass of this small network takes."""

    async def main() -> list[Answer]:
        async with loaded_engine(digits_bundle) as (engine, none):
            return [await ask(engine, none, digits_test.images[:32]) for _ in range(60)]

    answers = asyncio.run(main())
    waited = statistics.median(answer.queue_seconds for answer in answers)
    worked = statistics.median(answer.prediction.seconds["predict"] for answer in answers)
    assert waited < worked
    assert {(answer.batch.requests, answer.batch.images) for answer in answers} == {(1, 32)}


def test_a_client_that_leaves_is_let_go_without_the_engine(digits_bundle: Path, digits_test: LabelledImages) -> None:
    async def main() -> None:
        async with loaded_engine(digits_bundle) as (engine, none):
            gate, left = Gate(none), threading.Event()
            first = ask(engine, gate, digits_test.images[:1])
            await until(gate.entered.is_set)
            leaving = ask(engine, none, digits_test.images[:1], left)
            staying = ask(engine, none, digits_test.images[:1])
            await until(lambda: engine.waiting == 2)
            left.set()
            engine.forget_ended()
            with pytest.raises(BudgetExceededError, match="cancelled"):
                await asyncio.wait_for(leaving, 5)
            assert engine.waiting == 1
            assert not first.done()
            gate.opened.set()
            assert (await staying).batch.requests == 1

    asyncio.run(main())


def test_a_client_that_leaves_a_running_batch_leaves_alone(digits_bundle: Path, digits_test: LabelledImages) -> None:
    class Long(Wrapped):
        """Goes on until somebody has left, and is then done with the others."""

        def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
            wait_until(lambda: any(request.budget.interruption() for request in requests))
            return super().predict_together(requests)

    async def main() -> None:
        async with loaded_engine(digits_bundle) as (engine, none):
            gate, long, left = Gate(none), Long(none), threading.Event()
            first = ask(engine, gate, digits_test.images[:1])
            await until(gate.entered.is_set)
            leaving = ask(engine, long, digits_test.images[:1], left)
            staying = [ask(engine, long, digits_test.images[n : n + 2]) for n in (1, 3)]
            await until(lambda: engine.waiting == 3)
            gate.opened.set()
            await first
            await until(lambda: engine.waiting == 0)
            left.set()
            with pytest.raises(BudgetExceededError, match="cancelled"):
                await leaving
            for answer in [await one for one in staying]:
                assert (answer.batch.requests, answer.batch.images) == (3, 5)
                assert len(answer.prediction.scores) == 2

    asyncio.run(main())


def test_nobodys_images_are_kept(digits_bundle: Path, digits_test: LabelledImages) -> None:
    async def main() -> None:
        async with loaded_engine(digits_bundle) as (engine, none):
            gate = Gate(none)
            answered, abandoned = np.array(digits_test.images[:2]), np.array(digits_test.images[2:4])
            seen = [weakref.ref(answered), weakref.ref(abandoned)]
            await ask(engine, none, answered)
            del answered
            await until(lambda: gc.collect() >= 0 and seen[0]() is None)  # while the engine is idle
            first = ask(engine, gate, digits_test.images[:1])
            await until(gate.entered.is_set)
            gone = ask(engine, none, abandoned)
            await until(lambda: engine.waiting == 1)
            gone.cancel()
            await asyncio.wait([gone])  # not awaited itself: its error would hold on to what it was called with
            assert engine.waiting == 0
            del abandoned, gone
            gc.collect()
            assert seen[1]() is None
            assert not first.done(), "and the engine has had no time for that"
            gate.opened.set()
            await first

    asyncio.run(main())


def test_closing_ends_the_running_batch_and_says_so_to_the_others(
    digits_bundle: Path, digits_test: LabelledImages
) -> None:
    async def main() -> None:
        async with loaded_engine(digits_bundle) as (engine, none):
            gate = Gate(none)
            running = ask(engine, gate, digits_test.images[:1])
            await until(gate.entered.is_set)
            others = [ask(engine, none, digits_test.images[:1]) for _ in range(3)]
            await until(lambda: engine.waiting == 3)
            closing = asyncio.create_task(asyncio.to_thread(engine.close))
            for other in others:
                with pytest.raises(EngineStoppedError, match="stopped"):
                    await asyncio.wait_for(other, 5)
            assert not running.done()
            assert not closing.done(), "it waits for the running batch"
            gate.opened.set()
            assert len((await running).prediction.scores) == 1
            await closing
            assert engine.loaded is None
            with pytest.raises(EngineStoppedError):
                await ask(engine, none, digits_test.images[:1])

    asyncio.run(main())


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_a_dead_engine_does_not_look_healthy(serving: Serving, clean: list[bytes], error: BaseException) -> None:
    class Deadly(Wrapped):
        def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
            raise error

    with serving(offer=["none"]) as client:
        app: Any = client.app
        stopped = threading.Event()
        app.state.service.on_failure = stopped.set
        install(client, Deadly(app.state.service.engine.loaded.defences["none"], "deadly"))
        with crowd(client, clean[0]) as waiting:
            fatal = [waiting.ask(clean[0], defense="deadly") for _ in range(2)]
            innocent = waiting.ask(clean[0], defense="none")
            waiting.open()
            assert waiting.first.result().status_code == 200
            for sent in (*fatal, innocent):
                check_problem(sent.result(10), 503, "stopped")
        assert stopped.is_set(), "whoever runs the server hears of it"
        assert type(error).__name__ in app.state.service.failure
        check_problem(client.get("/readyz"), 503)
        check_problem(post(client, clean[0]), 503)
        assert client.get("/livez").status_code == 200
        metrics = client.get("/metrics").text
        assert "mithridate_ready 0.0" in metrics
        assert "mithridate_requests_in_flight 0.0" in metrics
        assert 'mithridate_shed_total{reason="engine-stopped"} 4.0' in metrics
        assert 'mithridate_shed_total{reason="draining"} 0.0' in metrics
