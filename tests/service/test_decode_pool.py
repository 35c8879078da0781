"""What bounds the memory of decoding and of bodies, whoever asks for how much."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from service_helpers import check_problem, post, post_json, predictions, save
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from service.body_memory import BodyMemoryMiddleware
from service.decode_pool import THREADS, DecodePool
from service.problems import Problem
from service.reports import report_images
from service.uploads import read_upload


def in_pool(main: Callable[[DecodePool], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        pool = DecodePool(**options)
        try:
            return await main(pool)
        finally:
            pool.shutdown()
            await asyncio.sleep(0)
            assert pool.held == 0

    return asyncio.run(run())


@given(weights=st.lists(st.integers(0, 15), max_size=30), cancelled=st.sets(st.integers(0, 29)))
@settings(max_examples=20, deadline=None)
def test_no_more_pixels_are_in_hand_than_allowed(weights: list[int], cancelled: set[int]) -> None:
    held, most, lock = 0, 0, threading.Lock()

    def work(weight: int) -> int:
        nonlocal held, most
        with lock:
            held += min(weight, 10)
            most = max(most, held)
        with lock:
            held -= min(weight, 10)
        return weight

    async def main(pool: DecodePool) -> None:
        jobs = [asyncio.create_task(pool.run(weight, lambda weight=weight: work(weight))) for weight in weights]
        await asyncio.sleep(0)
        for number in cancelled:
            if number < len(jobs):
                jobs[number].cancel()
        for number, (job, weight) in enumerate(zip(jobs, weights, strict=True)):
            with suppress(asyncio.CancelledError):
                assert await job == weight or number in cancelled

    in_pool(main, max_pixels=10, threads=4)
    assert most <= 10


def test_what_nobody_waits_for_is_counted_until_it_ends() -> None:
    entered, opened = threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        opened.wait(30)

    async def main(pool: DecodePool) -> None:
        first = asyncio.create_task(pool.run(8, slow))
        while not entered.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        second = asyncio.create_task(pool.run(8, lambda: "done"))
        await asyncio.sleep(0.02)
        assert pool.held == 8
        assert not second.done()
        opened.set()
        assert await second == "done"

    in_pool(main, max_pixels=10, threads=2)


def test_what_a_decoder_raises_comes_out_and_frees_its_place() -> None:
    async def main(pool: DecodePool) -> None:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await pool.run(10, lambda: 1 // 0)
        assert await pool.run(1000, lambda: "alone") == "alone"

    in_pool(main, max_pixels=10)


def test_bodies_share_a_bound_and_give_it_back() -> None:
    arrived: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["more_body"]:
            arrived.append(len(message["body"]))

    async def body(chunks: AsyncIterator[bytes]) -> None:
        async def receive() -> Message:
            chunk = await anext(chunks, None)
            return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

        async def send(message: Message) -> None:
            raise AssertionError

        await middleware({"type": "http"}, receive, send)

    async def chunks(*sizes: int, then: asyncio.Event | None = None) -> AsyncIterator[bytes]:
        for size in sizes:
            yield bytes(size)
        if then:
            await then.wait()

    async def main() -> None:
        end = asyncio.Event()
        first = asyncio.create_task(body(chunks(30, 30, then=end)))
        while middleware.held < 60:  # noqa: ASYNC110
            await asyncio.sleep(0)
        with pytest.raises(Problem, match="other requests hold 90 of 100 bytes") as refused:
            await body(chunks(30, 30))
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
        assert refused.value.reason == "memory"
        assert middleware.held == 60
        await body(chunks(40))
        end.set()
        await first
        assert middleware.held == 0
        await body(chunks(100))

    middleware = BodyMemoryMiddleware(app, max_bytes=100)
    asyncio.run(main())


def test_a_request_that_needs_more_than_there_is_for_bodies(serving: Any, clean: list[bytes]) -> None:
    with serving(max_buffered_bytes=1000, max_request_pixels=130) as client:
        response = client.post("/v1/predict", content=bytes(1001), headers={"Content-Type": "image/png"})
        check_problem(response, 429, "of 1000 bytes")
        assert response.headers["retry-after"] == "1"
        assert post_json(client, clean[:2]).status_code == 200
        check_problem(post_json(client, clean[:3]), 413, "the first 3 images have 192 pixels; at most 130")
        large = save(Image.new("L", (4000, 4000)), "PNG", optimize=True)
        assert len(large) > 1000  # refused by its bytes; of another size it is refused by its header alone


@contextmanager
def busy_decoders(client: TestClient) -> Iterator[threading.Event]:
    """Until the event is set, or for ten seconds."""
    app: Any = client.app
    end = threading.Event()
    for _ in range(THREADS):
        app.state.service.decoders._executor.submit(end.wait, 10)
    try:
        yield end
    finally:
        end.set()


def test_the_deadline_counts_while_others_decode(client: TestClient, clean: list[bytes]) -> None:
    with busy_decoders(client):
        started = time.monotonic()
        check_problem(post(client, clean[0], deadline_ms=100), 504, "deadline")
        assert time.monotonic() - started < 8, "it waited for a decoder"
    assert post(client, clean[0]).status_code == 200


def test_a_client_that_leaves_waits_for_no_decoder(client: TestClient, clean: list[bytes]) -> None:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/predict",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"image/png")],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
    }
    coming = [{"type": "http.disconnect"}, {"type": "http.request", "body": clean[0], "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return coming.pop() if len(coming) > 1 else coming[0]

    async def send(message: Any) -> None:
        sent.append(message)

    async def ask() -> None:
        app: Any = client.app
        await app(scope, receive, send)

    assert client.portal is not None
    with busy_decoders(client):
        started = time.monotonic()
        client.portal.call(ask)
        assert time.monotonic() - started < 8, "it waited for a decoder"
    assert sent[0]["status"] == 504
    assert b"the client left" in sent[1]["body"]


def test_a_long_answer_is_written_beside_the_event_loop(
    client: TestClient, clean: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 images and 256 neighbours of each are 16,384 objects: half a second in which nobody else is heard."""
    monkeypatch.setattr("service.app._MANY_ENTRIES", 15)
    loop: list[threading.Thread] = []
    wrote: list[threading.Thread] = []

    async def read(*args: Any) -> Any:
        loop.append(threading.current_thread())
        return await read_upload(*args)

    def write(*args: Any) -> Any:
        wrote.append(threading.current_thread())
        return report_images(*args)

    monkeypatch.setattr("service.app.read_upload", read)
    monkeypatch.setattr("service.app.report_images", write)
    asked: list[tuple[int, dict[str, Any], bool]] = [
        (1, {"top_k": 10}, False),
        (2, {"top_k": 10}, True),
        (1, {"explain": True}, True),
        (9, {}, False),
    ]
    for images, options, beside in asked:
        assert len(predictions(post_json(client, clean[:images], **options))) == images
        assert (wrote[-1] is not loop[-1]) == beside, options
