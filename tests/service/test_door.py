"""Turned away at the connection: only what cannot be read in two ways, and with the answer of the usual way."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from service_helpers import SLOW, ServerProcess, answer, check_problem, keep_busy, wait_ready

from service.app import Service
from service.door import Door
from service.settings import load_settings

FILE = b"not looked at"
HEAD = b"Host: x\r\nContent-Length: 13\r\n"


def plain(head: bytes = HEAD, body: bytes = FILE, line: bytes = b"POST /v1/predict HTTP/1.1") -> bytes:
    return line + b"\r\n" + head + b"\r\n" + body


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, digits_bundle: Path) -> Service:
    """Ready, and nobody is in it."""
    monkeypatch.setattr(Service, "answering", property(lambda self: True))
    return Service(load_settings(bundle=digits_bundle, queue_size=2))


@pytest.fixture
def full(service: Service) -> Service:
    return filled(service)


def filled(service: Service) -> Service:
    for _ in range(2):
        service.admission.enter(SimpleNamespace(key=None))  # type: ignore[arg-type]
    return service


def fields(said: bytes | None) -> tuple[str, dict[str, str], dict[str, Any]]:
    """Status line, headers and document; the length is right."""
    assert said is not None
    head, _, body = said.partition(b"\r\n\r\n")
    line, *lines = head.decode("ascii").split("\r\n")
    headers = {name.lower(): value for name, value in (one.split(": ", 1) for one in lines)}
    assert len(headers) == len(lines)
    assert int(headers.pop("content-length")) == len(body)
    return line, headers, json.loads(body)


def test_it_is_the_answer_of_a_problem(full: Service) -> None:
    line, headers, document = fields(Door(full).turn_away(plain(), None))
    assert line == "HTTP/1.1 429 Too Many Requests"
    assert re.fullmatch(r"[0-9a-f]{32}", document["request_id"])
    assert document == {
        "type": "about:blank",
        "title": "Too Many Requests",
        "status": 429,
        "detail": "2 requests are waiting already",
        "instance": "/v1/predict",
        "request_id": headers["x-request-id"],
    }
    assert headers["content-type"] == "application/problem+json"
    assert headers["x-content-type-options"] == "nosniff"
    assert int(headers["retry-after"]) >= 1
    assert headers["date"].endswith(" GMT")


def test_every_request_has_an_id_of_its_own_or_the_one_it_came_with(full: Service) -> None:
    door = Door(full)
    ids = {fields(door.turn_away(plain(), None))[1]["x-request-id"] for _ in range(20)}
    assert len(ids) == 20
    for offered, taken in (
        (b"mine-1.2_3", True),
        (b"m" * 128, True),
        (b"m" * 129, False),
        (b"a b", False),
        (b"", False),
    ):
        _, headers, document = fields(door.turn_away(plain(HEAD + b"X-Request-ID: " + offered + b"\r\n"), None))
        assert (headers["x-request-id"] == offered.decode()) is taken
        assert document["request_id"] == headers["x-request-id"]


@pytest.mark.parametrize(
    "data",
    [
        plain(line=b"POST /v1/predict?defense=rmc&explain=true HTTP/1.1"),
        plain(b"host:x\r\ncontent-length:\t13 \r\nCookie: a=b; c=d\r\n"),
        plain(b"Host: x\r\nContent-Length: 0\r\n", b""),
        plain(HEAD + b"Connection: Keep-Alive\r\n"),
    ],
)
def test_whatever_is_plain_is_turned_away(full: Service, data: bytes) -> None:
    assert Door(full).turn_away(data, None) is not None


@pytest.mark.parametrize(
    "data",
    [
        plain()[:-1],
        plain() + b"P",  # another one behind it
        plain()[:40],
        b"P",
        plain(line=b"POST /v1/predict HTTP/1.0"),
        plain(line=b"GET /v1/predict HTTP/1.1"),
        plain(line=b"POST /v1/predicts HTTP/1.1"),
        plain(line=b"POST /v1/predict/ HTTP/1.1"),
        plain(line=b"POST http://x/v1/predict HTTP/1.1"),
        plain(line=b"POST /v1/predict  HTTP/1.1"),
        plain(b"Content-Length: 13\r\n"),
        plain(b"Host: x\r\n"),
        plain(HEAD + b"Host: y\r\n"),
        plain(HEAD + b"Content-Length: 13\r\n"),
        plain(HEAD + b"content-LENGTH: 12\r\n"),
        plain(HEAD + b"Content-Length : 12\r\n"),
        plain(b"Host: x\r\nContent-Length: +13\r\n"),
        plain(b"Host: x\r\nContent-Length: 13, 13\r\n"),
        plain(b"Host: x\r\nContent-Length: \xb2\r\n"),
        plain(b"Host: x\r\nContent-Length: 0000000000000013\r\n"),
        plain(HEAD + b"Transfer-Encoding: chunked\r\n"),
        plain(HEAD + b"Expect: 100-continue\r\n"),
        plain(HEAD + b"Connection: close\r\n"),
        plain(HEAD + b"Upgrade: h2c\r\n"),
        plain(HEAD + b"X: \x00\r\n"),
        plain(HEAD + b"X: \xff\r\n"),
        plain(HEAD + b"X: y\r\n folded: z\r\n"),
        plain(HEAD + b"X: y\nContent-Length: 12\r\n"),
        plain(HEAD + b"X: y\rContent-Length: 12\r\n"),
        plain(HEAD + b"no colon\r\n"),
        plain(HEAD).replace(b"\r\n", b"\n"),
        plain(HEAD + 101 * b"X: y\r\n"),
        plain(HEAD + b"X: " + 70_000 * b"y" + b"\r\n"),
    ],
    ids=lambda data: repr(data[:70]),
)
def test_whatever_is_not_plain_goes_the_usual_way(full: Service, data: bytes) -> None:
    assert Door(full).turn_away(data, None) is None
    assert full.metrics.shed.labels("queue-full")._value.get() == 0


def test_an_answer_that_is_the_last_on_its_connection_says_so(full: Service) -> None:
    door = Door(full)
    said = [fields(door.turn_away(plain(), None, last))[1].get("connection") for last in (False, True, False)]
    assert said == [None, "close", None]


def test_while_the_service_drains_it_still_has_no_room(full: Service) -> None:
    full.drain()
    assert not full.ready
    assert Door(full).turn_away(plain(), None, True) is not None


def test_where_there_is_room_nobody_is_turned_away(service: Service) -> None:
    async def turn() -> list[bool]:
        door = Door(service)
        first = [door.turn_away(plain(), None) is None for _ in range(4)]
        await asyncio.sleep(0)
        return [*first, door.turn_away(plain(), None) is None]

    # Two places: who comes in the same turn of the event loop counts before they have entered, and not after.
    assert asyncio.run(turn()) == [True, True, False, False, True]


def test_what_is_not_ready_says_so_itself(full: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def turn() -> bytes | None:
        return Door(full).turn_away(plain(), None)

    monkeypatch.setattr(Service, "answering", property(lambda self: False))
    assert asyncio.run(turn()) is None


def test_where_requests_are_traced_the_usual_way_makes_the_span(full: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full.watching.tracing, "on", True)
    assert Door(full).turn_away(plain(), None) is None


@pytest.mark.usefixtures("service")
def test_it_is_counted_and_logged_as_any_other(digits_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = filled(Service(load_settings(bundle=digits_bundle, queue_size=2, log_client_address=True)))
    with caplog.at_level("INFO", "mithridate.access"):
        said = Door(full).turn_away(plain(), ("192.0.2.1", 5))
    identity = fields(said)[1]["x-request-id"]
    (line,) = caplog.messages
    assert re.fullmatch(rf"POST /v1/predict 429 \d+\.\d+ms id={identity} outcome=queue-full client=192\.0\.2\.1", line)
    rendered = full.metrics.render().decode()
    assert 'mithridate_shed_total{reason="queue-full"} 1.0' in rendered
    assert re.search(r'mithridate_requests_total\{defense="[^"]*",outcome="429"\} 1\.0', rendered)


# Over real sockets


def test_both_doors_say_the_same_and_the_connection_goes_on(
    digits_bundle: Path, tmp_path: Path, clean: list[bytes]
) -> None:
    server = ServerProcess(tmp_path / "log", bundle=digits_bundle, threads=1, queue_size=1, offer=["none", "rmc", SLOW])
    address = ("127.0.0.1", httpx2.URL(server.url).port)
    with closing(server), ThreadPoolExecutor(1) as background:
        wait_ready(server.client)
        with closing(socket.create_connection(address, timeout=10)) as connection:
            slow = keep_busy(background, server.client, clean[0], seconds=2)
            answers, raw = [], []
            for more in (b"", b"Upgrade: x\r\n", b""):  # the second takes the usual way
                connection.sendall(
                    plain(HEAD.replace(b"Host: x", b"Host: 127.0.0.1") + b"X-Request-ID: same\r\n" + more)
                )
                raw.append(answer(connection))
                line, headers, document = fields(raw[-1])
                del headers["date"], headers["retry-after"]
                answers.append((line, headers, document))
            assert answers[0] == answers[1] == answers[2]
            assert answers[0][0] == "HTTP/1.1 429 Too Many Requests"
            # The same, and not by the same hand: the framework writes its headers in another order.
            orders = [[line.split(b":")[0].lower() for line in one.split(b"\r\n")] for one in raw]
            assert orders[0] == orders[2] != orders[1]
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert fields(answer(connection))[0] == "HTTP/1.1 200 OK"
            check_problem(slow.result(), 504)
            connection.sendall(plain(HEAD.replace(b"Host: x", b"Host: 127.0.0.1")))
            assert fields(answer(connection))[0] == "HTTP/1.1 415 Unsupported Media Type"  # there is room again
        assert 'mithridate_shed_total{reason="queue-full"} 3.0' in server.client.get("/metrics").text
