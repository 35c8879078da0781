"""The client's two faces against the real service."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from client_helpers import FakeService, answer, closed_port, listening
from evaluation_helpers import synthetic

from attack_client import Answer, AsyncClient, Client, RetryPolicy, ServiceError
from attack_client.answers import parse_answer
from mithridate.bundle import Bundle
from mithridate.errors import InputError, MithridateError, OptionError
from mithridate.evaluation.card import make_card, write_card
from service.app import create_app
from service.settings import load_settings


def with_async(url: str, call: Callable[[AsyncClient], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncClient(url, **options) as client:
            return await call(client)

    return asyncio.run(main())


def what_it_says(answer: Answer) -> dict[str, Any]:
    return answer.model_dump(exclude={"id", "timings_ms"})


def test_one_image_and_several(served: str, files: list[bytes]) -> None:
    with Client(served) as client:
        one, several = client.predict(files[0]), client.predict(files)
    assert one.predictions[0].label == several.predictions[0].label == "4"
    assert one.predictions[0].class_index == 4
    assert len(several.predictions) == len(files)
    assert one.defense == "rmc"
    assert one.predictions[0].adaptation is not None
    assert one.predictions[0].answered_from in ("adapted", "base")
    assert one.predictions[0].abstained is False
    assert one.batch is not None
    assert (one.batch.requests, one.batch.images) == (1, 1)
    assert one.timings_ms["total"] > 0
    assert one.id != several.id


def parse(image: dict[str, Any], **more: Any) -> Answer:
    said = answer(**more)
    said["predictions"][0].update(image)
    parsed: Answer = parse_answer(json.dumps(said).encode(), Answer, "http://service")
    return parsed


def test_what_a_service_may_leave_out() -> None:
    parsed = parse({})
    (image,) = parsed.predictions
    assert parsed.batch is image.answered_from is image.held_out_loss is None
    assert image.abstained is False
    (image,) = parse({"adaptation": {"steps": 3}}).predictions
    assert image.answered_from is image.held_out_loss is None


def test_what_it_says_of_adaptation() -> None:
    adaptation = {"answered_from": "base", "held_out_loss": {"before": 0.5, "after": 1}}
    parsed = parse({"abstained": True, "adaptation": adaptation}, batch={"requests": 2, "images": 5})
    (image,) = parsed.predictions
    assert (image.abstained, image.answered_from, image.held_out_loss) == (True, "base", (0.5, 1.0))
    assert parsed.batch is not None
    assert (parsed.batch.requests, parsed.batch.images) == (2, 5)


@pytest.mark.parametrize("several", [False, True])
def test_options_arrive_in_either_form(served: str, files: list[bytes], several: bool) -> None:
    with Client(served) as client:
        image = files[:1] if several else files[0]
        answer = client.predict(image, defense="webnn", top_k=3, explain=True, deadline_ms=20_000)
        assert answer.defense == "webnn"
        assert len(answer.predictions[0].top) == 3
        assert len(answer.predictions[0].neighbors or ()) == 64
        assert client.predict(image, explain=False).predictions[0].neighbors is None


def test_both_clients_hear_the_same(served: str, files: list[bytes]) -> None:
    with Client(served + "/") as client:
        expected = [client.bundle(), client.defenses(), what_it_says(client.predict(files, top_k=10))]

    async def ask(client: AsyncClient) -> list[Any]:
        return [await client.bundle(), await client.defenses(), what_it_says(await client.predict(files, top_k=10))]

    assert with_async(served, ask) == expected


def test_who_is_served(served: str, digits_bundle: Path) -> None:
    with Client(served) as client:
        bundle, defenses = client.bundle(), client.defenses()
    assert bundle.digest == Bundle.open(digits_bundle).digest
    assert bundle.image_shape == (1, 8, 8)
    assert bundle.classes == tuple("0123456789")
    assert defenses.default == "rmc"
    assert defenses.names == ("rmc", "none", "webnn", "deepnn")


def test_what_it_is_worth(served: str, digits_bundle: Path, tmp_path: Path) -> None:
    with Client(served) as client, pytest.raises(ServiceError, match="not evaluated") as raised:
        client.card()
    assert raised.value.status == 404
    bundle = tmp_path / "bundle"
    shutil.copytree(digits_bundle, bundle)
    write_card(bundle, make_card(synthetic(bundle={"digest": Bundle.open(bundle).digest})))
    with listening(create_app(load_settings(bundle=bundle, offer=("none",), defense="none")), lifespan="on") as url:
        with Client(url) as client:
            client.wait_until_ready()
            card = client.card()
        assert with_async(url, AsyncClient.card) == card
    entry = card.defense("rmc:scope=tail")
    assert entry is not None
    assert entry.ruling == "harmful"


@pytest.mark.parametrize(
    ("image", "options", "status", "says"),
    [
        (b"hello", {}, 415, "allowed are JPEG, PNG and WebP"),
        ([], {}, 422, "at least 1 item"),
        (b"hello", {"defense": "rmcc"}, 422, "did you mean"),
        ([b"hello"], {"top_k": 0}, 422, "top_k"),
    ],
)
def test_a_refusal_carries_status_detail_and_request_id(
    served: str, image: Any, options: dict[str, Any], status: int, says: str
) -> None:
    with Client(served) as client, pytest.raises(ServiceError, match=says) as raised:
        client.predict(image, **options)
    error = raised.value
    assert error.status == status
    assert len(error.request_id) == 32
    assert str(error) == f"HTTP {status}: {error.detail} (request {error.request_id})"
    with pytest.raises(ServiceError, match=says) as again:
        with_async(served, lambda client: client.predict(image, **options))
    assert again.value.detail == error.detail
    assert isinstance(error, MithridateError)


def test_what_a_stranger_says_can_be_printed_and_written(files: list[bytes]) -> None:
    """An escape sequence on a terminal, and half a character that no file takes."""
    said = json.dumps({"detail": "\x1b[2J\ud800" + 5000 * "x", "request_id": "\x07"})
    transport = httpx2.MockTransport(lambda request: httpx2.Response(500, content=said))
    with Client("http://service", transport=transport) as client, pytest.raises(ServiceError) as raised:
        client.predict(files[0])
    text = str(raised.value)
    assert text.encode()
    assert not any(ord(character) < 32 for character in text)
    assert len(text) < 1200


def test_a_service_within_this_process(digits_bundle: Path, files: list[bytes]) -> None:
    """Not ready at first: 503 with Retry-After is waited out, and then it answers."""

    async def main() -> Answer:
        app = create_app(load_settings(bundle=digits_bundle, seed=7))
        client = AsyncClient("http://localhost", transport=httpx2.ASGITransport(app))
        async with app.router.lifespan_context(app), client:
            return await client.predict(files[0])

    assert asyncio.run(main()).predictions[0].label == "4"


def test_one_client_in_many_threads(served: str, files: list[bytes]) -> None:
    with Client(served) as client, ThreadPoolExecutor(8) as threads:
        alone = [client.predict(file).predictions[0] for file in files]
        for together, expected in zip(threads.map(client.predict, files * 4), alone * 4, strict=True):
            (image,) = together.predictions
            assert image.label == expected.label
            # Several may be answered in one batch, and another batch size rounds otherwise.
            assert image.confidence == pytest.approx(expected.confidence, abs=1e-4)


def test_nobody_there(files: list[bytes]) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    retry = RetryPolicy(attempts=3, base_seconds=0.01)
    says = f"{url} does not answer .*is the service running"
    with Client(url, retry=retry) as client, pytest.raises(InputError, match=says):
        client.predict(files[0])
    with pytest.raises(InputError, match=says):
        with_async(url, lambda client: client.predict(files[0]), retry=retry)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "", "http://", "http://:80", "http://a:99999"])
def test_not_an_address(url: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(OptionError, match="write it as http://host:port"):
            kind(url)


def test_waiting_for_a_service_that_comes(files: list[bytes]) -> None:
    port, stop = closed_port(), threading.Event()

    def come_late() -> None:
        time.sleep(0.4)
        with socket.create_server(("127.0.0.1", port)) as server:
            connection, _ = server.accept()
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            connection.close()
            connection, _ = server.accept()
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            connection.close()
            stop.set()

    with ThreadPoolExecutor(1) as threads, Client(f"http://127.0.0.1:{port}") as client:
        threads.submit(come_late)
        client.wait_until_ready(20)
        assert stop.wait(5)


def test_waiting_no_longer_than_was_said() -> None:
    with Client(f"http://127.0.0.1:{closed_port()}") as client, pytest.raises(InputError, match=r"within 0\.2 s"):
        client.wait_until_ready(0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes the connection, never says a word
        started = time.monotonic()
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with Client(url) as client, pytest.raises(InputError, match=f"{url} was not ready within 0.5 s"):
            client.wait_until_ready(0.5)
        assert 0.5 <= time.monotonic() - started < 5


def test_a_slow_answer_is_given_up() -> None:
    with listening(FakeService(seconds=0.8)) as url:
        with Client(url, timeout_seconds=0.2) as client, pytest.raises(InputError, match="ReadTimeout"):
            client.predict(b"image")
        with pytest.raises(InputError, match="ReadTimeout"):
            with_async(url, lambda client: client.predict(b"image"), timeout_seconds=0.2)
