"""More work than there is time for: shed, cut off, or dropped, while everything else goes on answering."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from service_helpers import (
    SLOW,
    ServerProcess,
    Serving,
    check_problem,
    in_flight,
    keep_busy,
    post,
    predictions,
    wait_ready,
    wait_until,
)

from mithridate.datasets import LabelledImages
from mithridate.errors import BudgetExceededError
from mithridate.evaluation import percentile
from service.engine import Engine
from service.settings import load_settings


@pytest.fixture(scope="module")
def server(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    server = ServerProcess(log, bundle=digits_bundle, threads=1, queue_seconds=60, offer=["none", "rmc", SLOW])
    try:
        wait_ready(server.client)
        yield server
    finally:
        server.close()


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def test_a_full_queue_sheds_and_recovers(serving: Serving, background: ThreadPoolExecutor, clean: list[bytes]) -> None:
    with serving(queue_size=1, offer=["none", "rmc", SLOW]) as client:
        slow = keep_busy(background, client, clean[0], seconds=1)
        shed = post(client, clean[1])
        check_problem(shed, 429, "1 requests")
        at_the_door = client.post("/v1/predict?no=option", content=b"x", headers={"Content-Type": "text/plain"})
        check_problem(at_the_door, 429, "1 requests")  # nothing of it has been looked at
        assert 'mithridate_shed_total{reason="queue-full"} 2.0' in client.get("/metrics").text
        assert shed.headers["retry-after"].isdecimal()
        assert int(shed.headers["retry-after"]) >= 1
        assert client.get("/livez").status_code == client.get("/readyz").status_code == 200
        check_problem(slow.result(), 504)
        assert predictions(post(client, clean[1]))
        assert in_flight(client) == 0


def test_a_deadline_that_passes_is_504_and_never_a_weaker_answer(serving: Serving, clean: list[bytes]) -> None:
    with serving(offer=["none", "rmc", SLOW], deadline_ms=5_000) as client:
        started = time.monotonic()
        check_problem(post(client, clean[0], defense=SLOW, deadline_ms=300), 504, "deadline")
        assert 0.3 <= time.monotonic() - started < 2
        check_problem(post(client, clean[0], defense="none", deadline_ms=0.001), 504, "deadline")
        assert predictions(post(client, clean[0], defense="none"))


@pytest.mark.parametrize("reason", ["deadline", "cancelled"])
def test_the_engine_gives_no_answer_from_half_an_adaptation(
    digits_bundle: Path, digits_test: LabelledImages, reason: str
) -> None:
    async def main() -> None:
        engine, cancelled = Engine(load_settings(bundle=digits_bundle, offer=[SLOW])), threading.Event()
        loaded = await engine.load()
        deadline = time.monotonic() + (0.3 if reason == "deadline" else 60)
        asyncio.get_running_loop().call_later(0.3 if reason == "cancelled" else 60, cancelled.set)
        with pytest.raises(BudgetExceededError, match=reason):
            await engine.predict(loaded.defence(SLOW), digits_test.images[:1], deadline=deadline, cancelled=cancelled)
        engine.close()

    asyncio.run(main())


def test_a_request_cannot_ask_for_more_than_the_services_deadline(serving: Serving, clean: list[bytes]) -> None:
    with serving(offer=["none", SLOW], deadline_ms=300) as client:
        started = time.monotonic()
        check_problem(post(client, clean[0], defense=SLOW, deadline_ms=60_000), 504, "deadline")
        assert time.monotonic() - started < 3


def test_the_deadline_counts_while_others_have_the_engine(
    server: ServerProcess, background: ThreadPoolExecutor, clean: list[bytes]
) -> None:
    slow = keep_busy(background, server.client, clean[0], seconds=2)
    started = time.monotonic()
    check_problem(post(server.client, clean[0], defense="none", deadline_ms=200), 504, "deadline")
    assert 0.2 <= time.monotonic() - started < 1.5
    assert not slow.done()
    check_problem(slow.result(), 504)


def test_health_answers_while_the_engine_is_busy(
    server: ServerProcess, background: ThreadPoolExecutor, clean: list[bytes]
) -> None:
    jobs = [keep_busy(background, server.client, file, seconds=3) for file in clean[:3]]
    latencies = []
    with httpx2.Client(base_url=server.url) as client:
        while not all(job.done() for job in jobs):
            started = time.perf_counter()
            assert client.get("/livez").status_code == 200
            latencies.append(time.perf_counter() - started)
            time.sleep(0.01)
    assert len(latencies) >= 50
    assert percentile(latencies, 0.99) < 0.2
    assert {job.result().status_code for job in jobs} == {504}


def test_a_client_that_leaves_takes_its_work_along(server: ServerProcess, clean: list[bytes]) -> None:
    with httpx2.Client(base_url=server.url, timeout=0.5) as impatient, pytest.raises(httpx2.ReadTimeout):
        post(impatient, clean[0], defense=SLOW)
    started = time.monotonic()
    assert predictions(post(server.client, clean[0], defense="none"))
    assert time.monotonic() - started < 2, "the engine went on for a client that had gone"
    while in_flight(server.client):
        assert time.monotonic() - started < 5
    assert "Traceback" not in server.log


def test_a_client_that_leaves_gives_up_its_place_at_once(
    server: ServerProcess, background: ThreadPoolExecutor, clean: list[bytes]
) -> None:
    """The queue is for those who still wait, also while one request keeps the engine busy."""
    slow = keep_busy(background, server.client, clean[0], seconds=4)
    with httpx2.Client(base_url=server.url, timeout=0.5) as impatient, pytest.raises(httpx2.ReadTimeout):
        post(impatient, clean[1], defense="none")
    wait_until(lambda: in_flight(server.client) == 1, seconds=2)
    assert not slow.done()
    check_problem(slow.result(), 504)
