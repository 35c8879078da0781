"""Bodies that are meant to cost: endless, never ending, or written to make the checker itself slow."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from service_helpers import check_problem, post, post_json, post_multipart, predictions
from starlette.testclient import TestClient

from service import uploads
from service.app import create_app
from service.settings import load_settings

_HEADERS = {"Content-Type": "image/png"}


@asynccontextmanager
async def ready_service(bundle: Path, **flags: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a service of its own, within this process and one event loop."""
    app = create_app(load_settings(bundle=bundle, seed=7, **flags))
    transport = httpx2.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        yield client


def send_slowly(bundle: Path, chunks: AsyncIterator[bytes], **flags: Any) -> httpx2.Response:
    """Sends ``chunks`` as they come, with no length announced, to a service of its own."""

    async def main() -> httpx2.Response:
        async with ready_service(bundle, **flags) as client:
            response = await client.post("/v1/predict", content=chunks, headers=_HEADERS)
            assert (await client.get("/metrics")).text.count("mithridate_requests_in_flight 0.0") == 1
            return response

    return asyncio.run(main())


def test_an_endless_body_is_not_read_to_its_end(digits_bundle: Path) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield bytes(10_000)

    response = send_slowly(digits_bundle, endless(), max_body_bytes=65_536)
    check_problem(response, 413, "larger than 65536 bytes")
    assert sent == 70_000


def test_a_body_that_does_not_come_is_not_waited_for(digits_bundle: Path, clean: list[bytes]) -> None:
    async def stalling() -> AsyncIterator[bytes]:
        yield clean[0][:20]
        await asyncio.sleep(60)

    started = time.monotonic()
    check_problem(send_slowly(digits_bundle, stalling(), body_timeout_s=0.3), 408, "within 0.3 s")
    assert time.monotonic() - started < 30


def test_a_body_that_trickles_is_not_waited_for(
    digits_bundle: Path, clean: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.uploads._RATE_GRACE_S", 0.3)

    async def trickling() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 100
            await asyncio.sleep(0.1)

    started = time.monotonic()
    response = send_slowly(digits_bundle, trickling(), min_body_rate=4000)
    check_problem(response, 408, "too slowly", "under 4000 bytes a second")
    assert time.monotonic() - started < 10
    check_problem(send_slowly(digits_bundle, trickling(), min_body_rate=0, body_timeout_s=0.5), 408, "within 0.5 s")


def test_bodies_that_are_still_coming_take_nobodys_place(digits_bundle: Path, clean: list[bytes]) -> None:
    async def main() -> None:
        end = asyncio.Event()

        async def waiting() -> AsyncIterator[bytes]:
            yield clean[0][:20]
            await end.wait()
            yield clean[0][20:]

        async with ready_service(digits_bundle, queue_size=1) as client:
            slow = [
                asyncio.create_task(client.post("/v1/predict", content=waiting(), headers=_HEADERS)) for _ in range(9)
            ]
            await asyncio.sleep(0.05)
            expected = predictions(await client.post("/v1/predict", content=clean[0], headers=_HEADERS))
            end.set()
            answered = [response for response in await asyncio.gather(*slow) if response.status_code == 200]
            assert answered
            assert all(predictions(response) == expected for response in answered)
            assert (await client.get("/metrics")).text.count("mithridate_requests_in_flight 0.0") == 1

    asyncio.run(main())


def test_an_honest_body_without_a_length(digits_bundle: Path, clean: list[bytes], client: TestClient) -> None:
    async def in_pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(clean[0]), 16):
            yield clean[0][start : start + 16]

    response = send_slowly(digits_bundle, in_pieces())
    assert predictions(response) == predictions(post(client, clean[0]))


HOSTILE_JSON = {
    "numbers for images": (b'{"images":[' + b"1," * 2_000_000 + b"1]}", 413),
    "empty images": (b'{"images":[' + b'"",' * 2_000_000 + b'""]}', 413),
    "unknown fields": (b"{" + b",".join(b'"%d":1' % number for number in range(1_000_000)) + b"}", 413),
    "some unknown fields": (b"{" + b",".join(b'"%d":1' % number for number in range(1_000)) + b"}", 422),
    "options of a defence": (b'{"images":["aa"],"defense":"rmc:' + b"a=b," * 2_000_000 + b'"}', 413),
    "a million images": (b'{"images":[' + b'"aa",' * 1_000_000 + b'"aa"]}', 413),
    "deep": (b'{"images":' + b'{"a":' * 1_000_000, 413),
    "deep enough": (b'{"images":' + b'{"a":' * 1_000, 400),
    "empty lists": (b'{"images":[' + b"[]," * 8_000_000 + b"[]]}", 413),
    "one long number": (b'{"images":["aa"],"top_k":' + b"9" * 4_000_000 + b"}", 400),
}


@pytest.mark.parametrize(("content", "status"), HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_a_hostile_json_body_is_refused_at_once(client: TestClient, content: bytes, status: int) -> None:
    """One error for every element took the event loop, and with it /livez, half a minute."""
    started = time.process_time()  # the service is in this process, and the machine may have other work
    check_problem(post(client, content, media_type="application/json"), status)
    assert time.process_time() - started < 3


def test_what_takes_long_to_read_is_read_beside_the_event_loop(client: TestClient, clean: list[bytes]) -> None:
    """Parsing 30 MB takes a tenth of a second and more, in which nobody else would be heard."""
    seen: list[threading.Thread] = []
    loop: list[threading.Thread] = []

    def watch(read: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            seen.append(threading.current_thread())
            return read(*args)

        return watched

    async def read_upload(*args: Any) -> Any:
        loop.append(threading.current_thread())
        return await uploads.read_upload(*args)

    long = clean[0] + bytes(100_000)  # what follows a PNG's end is never looked at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.app.read_upload", read_upload)
        for name in ("_from_json", "_from_multipart"):
            patch.setattr(uploads, name, watch(getattr(uploads, name)))
        for send in (post_json, post_multipart):
            assert send(client, [clean[0]]).status_code == 200
            assert seen.pop() is loop[-1], "a short one does not take the way"
            send(client, [long])
            assert seen.pop() is not loop[-1]
