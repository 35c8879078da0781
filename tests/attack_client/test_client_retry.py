"""When the client tries again, how long it waits, and what it makes of services that are none."""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from client_helpers import answer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attack_client import Answer, AsyncClient, Client, RetryPolicy, ServiceError
from attack_client.pace import Pace
from mithridate.errors import InputError, OptionError

Respond = Callable[[httpx2.Request], httpx2.Response]
PROBLEM = {"detail": "64 requests are waiting already", "request_id": "abc", "status": 429}
FACES = ("sync", "async")


class Server:
    """Gives one response after the other, the last one for ever; remembers what came when."""

    def __init__(self, *responses: httpx2.Response | Exception | Callable[[], httpx2.Response]) -> None:
        self._responses = list(responses)
        self.bodies: list[bytes] = []
        self.times: list[float] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.bodies.append(request.content)
        self.times.append(time.monotonic())
        response = self._responses.pop(0) if len(self._responses) > 1 else self._responses[0]
        if isinstance(response, Exception):
            raise response
        return response if isinstance(response, httpx2.Response) else response()

    @property
    def waited(self) -> float:
        return self.times[1] - self.times[0]


def ok() -> httpx2.Response:
    return httpx2.Response(200, json=answer())


def busy(status: int = 429, after: str | None = None) -> httpx2.Response:
    return httpx2.Response(status, json=PROBLEM, headers={"Retry-After": after} if after is not None else {})


def ask(face: str, server: Respond, **policy: Any) -> Answer:
    """One prediction from ``server`` by the client with this face."""
    retry = RetryPolicy(**{"base_seconds": 0.01, **policy})
    transport = httpx2.MockTransport(server)
    if face == "sync":
        with Client("http://service", retry=retry, transport=transport) as client:
            return client.predict(b"image")

    async def main() -> Answer:
        async with AsyncClient("http://service", retry=retry, transport=transport) as client:
            return await client.predict(b"image")

    return asyncio.run(main())


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("status", [429, 503])
def test_what_passes_is_waited_out(face: str, status: int) -> None:
    server = Server(busy(status), busy(status), ok())
    assert ask(face, server).predictions[0].label == "0"
    assert server.bodies == [b"image"] * 3


@pytest.mark.parametrize("face", FACES)
def test_seconds_are_honoured(face: str) -> None:
    server = Server(busy(after="1"), ok())
    ask(face, server)
    assert 1 <= server.waited < 5


@pytest.mark.parametrize("face", FACES)
def test_a_date_is_honoured(face: str) -> None:
    def later() -> httpx2.Response:
        return busy(503, email.utils.formatdate(math.ceil(time.time()) + 1, usegmt=True))

    server = Server(later, ok())
    ask(face, server)
    assert 0.95 <= server.waited < 5


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("as_a_date", [False, True])
def test_a_day_is_not(face: str, as_a_date: bool) -> None:
    after = email.utils.formatdate(time.time() + 86_400, usegmt=True) if as_a_date else "86400"
    server = Server(busy(after=after), ok())
    ask(face, server, cap_seconds=0.3)
    assert 0.3 <= server.waited < 5


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("after", ["0", "Thu, 01 Jan 1970 00:00:00 GMT", "soon", "-5", ""])
def test_past_or_unreadable_is_no_wait_to_speak_of(face: str, after: str) -> None:
    server = Server(busy(after=after), ok())
    ask(face, server)
    assert server.waited < 1


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("attempts", [1, 3])
def test_at_last_it_gives_up(face: str, attempts: int) -> None:
    server = Server(busy(after="0"))
    with pytest.raises(ServiceError) as raised:
        ask(face, server, attempts=attempts)
    assert len(server.bodies) == attempts
    assert (raised.value.status, raised.value.detail, raised.value.request_id) == (429, PROBLEM["detail"], "abc")


@pytest.mark.parametrize("face", FACES)
def test_patience_waits_for_a_turn_however_often_it_is_refused(face: str) -> None:
    server = Server(*[busy(after="0")] * 8, ok())
    assert ask(face, server, attempts=2, patience_seconds=30).predictions
    assert len(server.bodies) == 9
    assert server.waited >= 0.01, "not in a circle, even where the service asks for no wait"


@pytest.mark.parametrize("face", FACES)
def test_patience_ends_and_is_only_for_refusals(face: str) -> None:
    server = Server(busy(after="0"))
    with pytest.raises(ServiceError) as raised:
        ask(face, server, attempts=2, base_seconds=0.05, patience_seconds=0.3)
    assert 3 <= len(server.bodies) <= 7
    assert (raised.value.status, raised.value.retry_after) == (429, 0)
    dead = Server(busy(503, after="0"))
    with pytest.raises(ServiceError, match="HTTP 503"):
        ask(face, dead, attempts=2, patience_seconds=30)
    assert len(dead.bodies) == 2


def test_a_refusal_puts_off_and_slows_down_what_is_still_to_be_sent() -> None:
    async def main() -> None:
        pace = Pace(1000)
        first, under_way = await pace.turn(), await pace.turn()
        assert under_way.due - first.due == pytest.approx(0.001)
        refused = time.perf_counter()
        pace.refused(first, 0.2)
        pace.refused(under_way, 0.1)
        assert not pace.holds(under_way), "what is about to go out has to wait as well"
        turns = [await pace.turn() for _ in range(3)]
        assert turns[0].due >= refused + 0.2
        assert turns[1].due - turns[0].due == pytest.approx(1 / 500), "once for all that were under way"
        for _ in range(20):
            pace.refused(await pace.turn(), 0.01)
        slow = [await pace.turn() for _ in range(2)]
        assert slow[1].due - slow[0].due == pytest.approx(0.01), "not slower than the service asks for"
        for _ in range(2000):
            pace.answered()
        quick = [await pace.turn() for _ in range(2)]
        assert quick[1].due - quick[0].due == pytest.approx(0.001)
        assert not pace.given_up

    asyncio.run(main())


def test_a_service_that_refuses_for_too_long_is_given_up() -> None:
    async def main() -> None:
        pace = Pace(1000, longest_wait_seconds=0.1, patience_seconds=0.15)
        pace.refused(await pace.turn(), 86_400)
        assert not pace.given_up, "a day is too long, but not for the first time"
        pace.refused(await pace.turn(), 86_400)
        assert pace.given_up
        started = time.perf_counter()
        for _ in range(100):
            await pace.turn()
        assert time.perf_counter() - started < 0.1, "nothing is waited for any more"

    asyncio.run(main())


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("status", [400, 404, 413, 415, 422, 500, 502, 504])
def test_what_stays_wrong_is_not_tried_again(face: str, status: int) -> None:
    server = Server(busy(status, after="1"))
    with pytest.raises(ServiceError, match=f"HTTP {status}: 64 requests"):
        ask(face, server)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("face", FACES)
def test_no_connection_is_tried_again_but_a_lost_answer_is_not(face: str) -> None:
    server = Server(httpx2.ConnectError("refused"), httpx2.ConnectTimeout("nobody"), ok())
    assert ask(face, server).predictions
    assert len(server.bodies) == 3
    server = Server(httpx2.ReadTimeout("lost"), ok())
    with pytest.raises(InputError, match=r"does not answer \(ReadTimeout: lost\)"):
        ask(face, server)
    assert len(server.bodies) == 1, "the service may have done the work already"


@pytest.mark.parametrize("face", FACES)
def test_no_attempts_at_all(face: str) -> None:
    with pytest.raises(OptionError, match="attempts=0"):
        ask(face, Server(ok()), attempts=0)


OTHERS = {
    "a page": lambda: httpx2.Response(200, text="<html>\nWelcome to nginx"),
    "other json": lambda: httpx2.Response(200, json={"predictions": "none"}),
    "a list": lambda: httpx2.Response(200, json=[]),
    "nothing": lambda: httpx2.Response(204),
    "elsewhere": lambda: httpx2.Response(302, headers={"Location": "http://elsewhere/"}),
    "no predictions": lambda: httpx2.Response(200, json=answer(predictions=[])),
    "broken compression": lambda: httpx2.Response(
        200, headers={"Content-Encoding": "gzip"}, stream=httpx2.ByteStream(b"not gzip")
    ),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("response", OTHERS.values(), ids=OTHERS)
def test_not_a_mithridate_service(face: str, response: Any) -> None:
    with pytest.raises(InputError, match="http://service does not answer"):
        ask(face, Server(response))


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("content", [b"<h1>Bad Gateway</h1>" * 99, b'"a"', b"[1]", b"{}", b'{"detail": {}}', b"\xff"])
def test_an_error_that_is_no_problem_document(face: str, content: bytes) -> None:
    with pytest.raises(ServiceError) as raised:
        ask(face, Server(httpx2.Response(502, content=content)))
    assert raised.value.status == 502
    assert raised.value.request_id == ""
    assert len(str(raised.value)) < 300


def test_what_a_newer_service_adds_is_ignored() -> None:
    newer = answer(colour="blue")
    newer["predictions"][0]["mood"] = newer["predictions"][0]["top"][0]["mood"] = "good"
    assert ask("sync", Server(httpx2.Response(200, json=newer))).predictions[0].label == "0"


def test_what_goes_over_the_wire() -> None:
    seen: list[httpx2.Request] = []

    def remember(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return ok()

    with Client("http://service/", transport=httpx2.MockTransport(remember)) as client:
        client.predict(b"image", explain=True, top_k=2)
        client.predict([b"image"], explain=True, defense="none")
        client.predict(b"image")
    raw, listed, plain = seen
    assert str(raw.url) == "http://service/v1/predict?top_k=2&explain=true"
    assert raw.content == b"image"
    assert str(listed.url) == str(plain.url) == "http://service/v1/predict"
    assert json.loads(listed.content) == {"images": ["aW1hZ2U="], "explain": True, "defense": "none"}


@given(attempt=st.integers(2, 60), after=st.none() | st.text() | st.from_regex(r"[0-9]{1,400}", fullmatch=True))
@example(attempt=2, after="\xb2")
@example(attempt=2, after="Mon, 01 Jan 0001 00:00:00 -0000")
@example(attempt=2, after="Fri, 31 Dec 9999 23:59:59 GMT")
@settings(derandomize=True, deadline=None)
def test_no_header_makes_it_wait_for_ever_or_fail(attempt: int, after: str | None) -> None:
    assert 0 <= RetryPolicy(cap_seconds=3).wait(attempt, after) <= 3


def test_waits_grow_and_differ() -> None:
    policy = RetryPolicy(base_seconds=0.1, cap_seconds=10)
    longest = [max(policy.wait(attempt, None) for _ in range(200)) for attempt in (2, 4, 6, 20)]
    assert longest == sorted(longest)
    assert longest[0] <= 0.2 < 0.4 < longest[1] <= 0.8
    assert longest[-1] <= 10
    assert len({policy.wait(3, None) for _ in range(20)}) == 20, "clients that were refused together must not return so"
