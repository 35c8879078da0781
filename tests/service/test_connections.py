"""Clients that cost without asking, over real sockets: each is ended in time, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
from service_helpers import answer, wait_until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from service.connections import ConnectionLimits, Guard, TurnAway, guarded, read_all

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
SHORT = 0.3
LIMITS = ConnectionLimits(
    max_connections=20, header_timeout_s=SHORT, max_headers=30, max_header_bytes=4096, write_timeout_s=SHORT
)


async def _count(request: Request) -> Response:
    if "x-echo" in request.headers:
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return PlainTextResponse(f"{request.headers['host']} {target}")
    return PlainTextResponse(str(len(await request.body())))


async def _refuse(request: Request) -> Response:
    return PlainTextResponse("no", status_code=413)


async def _slow(request: Request) -> Response:
    await asyncio.sleep(3 * SHORT)
    return PlainTextResponse("done")


async def _large(request: Request) -> Response:
    return PlainTextResponse("x" * 50_000_000)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server of this process, and sockets to it."""

    port: int
    guard: Guard
    server: uvicorn.Server

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        if sent:
            connection.sendall(sent)
        return connection

    def ask(self, sent: bytes = GET) -> bytes:
        """What the server says until it closes, or a whole short answer."""
        with closing(self.connect(sent)) as connection:
            return answer(connection)

    def open(self) -> int:
        return len(self.server.server_state.connections)


def send(connection: socket.socket, data: bytes) -> bool:
    """Whether the connection still takes it."""
    try:
        connection.sendall(data)
    except ConnectionError:
        return False
    return True


def status(found: bytes) -> int:
    return int(found.split(b" ", 2)[1])


def ended_after(connection: socket.socket) -> float:
    """Seconds until the server ends the connection."""
    started = time.monotonic()
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - started


@contextmanager
def serve(
    limits: ConnectionLimits = LIMITS,
    keep_alive_s: int = 60,
    turn_away: TurnAway = read_all,
    drain_timeout_s: int = 3,
) -> Iterator[Served]:
    routes = [
        Route("/", _count, methods=["GET", "POST"]),
        Route("/refuse", _refuse, methods=["POST"]),
        Route("/slow", _slow),
        Route("/large", _large),
        Route("/{path:path}", _count),
    ]
    protocol: Any = guarded(limits, turn_away)
    config = uvicorn.Config(
        Starlette(routes=routes), http=protocol, ws="none", lifespan="off", log_config=None,
        timeout_keep_alive=keep_alive_s, timeout_graceful_shutdown=drain_timeout_s,
        h11_max_incomplete_event_size=limits.max_header_bytes,
    )  # fmt: skip
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Served(port=listener.getsockname()[1], guard=protocol.guard, server=server)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve() as found:
        yield found


@pytest.fixture(autouse=True)
def _none_left(served: Served) -> Iterator[None]:
    yield
    wait_until(lambda: served.open() == 0)
    assert not served.guard.waiting


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_headers_that_do_not_come_are_not_waited_for(served: Served, sent: bytes) -> None:
    started = time.monotonic()
    found = served.ask(sent)
    assert SHORT <= time.monotonic() - started < 8 * SHORT
    if sent:
        check_refused(found, 408, "did not arrive within 0.3 s")
    else:
        assert found == b""  # nobody asked


def test_a_byte_now_and_then_buys_no_time(served: Served) -> None:
    """Slowloris: one header line a while, for ever."""
    with closing(served.connect(b"GET / HTTP/1.1\r\n")) as connection:
        started = time.monotonic()
        while send(connection, b"X-a: b\r\n"):
            assert time.monotonic() - started < 20 * SHORT
            time.sleep(SHORT / 8)
        assert time.monotonic() - started < 8 * SHORT


def test_a_slow_next_request_is_not_waited_for_either(served: Served) -> None:
    with closing(served.connect(GET)) as connection:
        assert status(answer(connection)) == 200
        time.sleep(2 * SHORT)  # idle, which is something else
        connection.sendall(b"GET / HTTP/1.1\r\n")
        time.sleep(SHORT / 2)
        connection.sendall(b"Host: x\r\n")
        assert ended_after(connection) < 4 * SHORT


def test_an_answer_that_takes_long_is_no_slow_client(served: Served) -> None:
    assert served.ask(GET.replace(b"/", b"/slow", 1)).endswith(b"done")


def test_pipelined_requests_are_all_answered(served: Served) -> None:
    with closing(served.connect(GET * 5)) as connection:
        found = b""
        while found.count(b"HTTP/1.1 200") < 5:
            found += connection.recv(65536)
    with closing(served.connect(GET + GET[:20])) as connection:  # the second one stays a part
        assert status(answer(connection)) == 200
        assert ended_after(connection) < 4 * SHORT


def check_refused(found: bytes, code: int, says: str) -> None:
    head, _, body = found.partition(b"\r\n\r\n")
    assert status(head) == code
    assert b"Content-Type: application/problem+json" in head
    assert b"X-Content-Type-Options: nosniff" in head
    assert b"Connection: close" in head
    document = json.loads(body)
    assert set(document) == {"type", "title", "status", "detail", "instance", "request_id"}
    assert document["status"] == code
    assert says in document["detail"]


def test_a_body_of_two_lengths_is_refused_and_nothing_behind_it_is_a_request(served: Served) -> None:
    """Whoever stands between may have taken the other one for it (RFC 9112, 6.1)."""
    both = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with closing(served.connect(both + GET)) as connection:
        found = b""
        while more := connection.recv(65536):
            found += more
    check_refused(found, 400, "Content-Length beside Transfer-Encoding")


@pytest.mark.parametrize("version", [b"2.0", b"1.2", b"0.9", b"9.9"])
def test_another_version_is_refused(served: Served, version: bytes) -> None:
    check_refused(served.ask(GET.replace(b"1.1", version)), 400, f"HTTP/{version.decode()}; allowed: HTTP/1.1")


def test_the_version_before_is_taken_for_one_request(served: Served) -> None:
    with closing(served.connect(b"GET / HTTP/1.0\r\n\r\n")) as connection:
        check_last(connection)


def test_a_bare_line_feed_ends_a_line(served: Served) -> None:
    """As RFC 9112, 2.2 allows; docs/input.md says so."""
    assert status(served.ask(GET.replace(b"\r\n", b"\n"))) == 200


@pytest.mark.parametrize(
    ("target", "host", "path"),
    [
        (b"http://localhost/where?a=b", b"localhost", b"/where?a=b"),
        (b"HTTPS://[::1]:8000/where", b"[::1]:8000", b"/where"),
        (b"http://evil.example/where", b"evil.example", b"/where"),
        (b"http://localhost.", b"localhost.", b"/"),
        (b"http://localhost:80?a", b"localhost:80", b"/?a"),
        (b"http://localhost//evil.example/x", b"localhost", b"//evil.example/x"),
    ],
)
def test_a_target_with_an_authority_is_taken_and_names_the_host(
    served: Served, target: bytes, host: bytes, path: bytes
) -> None:
    """RFC 9112, 3.2.2: what the header says does not count then."""
    found = served.ask(b"GET %b HTTP/1.1\r\nHost: x\r\nX-Echo: yes\r\n\r\n" % target)
    assert found.endswith(b"\r\n\r\n%b %b" % (host, path))


@pytest.mark.parametrize(
    "target",
    [
        b"http://",
        b"http:///path",
        b"http://localhost@evil.example/",
        b"http://evil.example@localhost/",
        b"http://localhost\\@evil.example/",
        b"http://localhost%00.evil.example/",
        b"http://localhost:x/",
        b"http://localhost#/",
        b"http://[::1/",
    ],
)
def test_an_authority_that_could_be_read_in_two_ways_is_refused(served: Served, target: bytes) -> None:
    check_refused(served.ask(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target), 400, "the target's authority")


HEADERS = {
    "many": (b"X-%d: 1\r\n" * 31 % tuple(range(31)), 431, "at most 30 headers of 4096 bytes"),
    "thousands in one piece": (b"X: 1\r\n" * 20_000, 431, "at most 30 headers"),
    "one long": (b"X: " + b"a" * 5000 + b"\r\n", 431, "at most 30 headers"),
    "one endless": (b"X: " + b"a" * 300_000, 431, "at most 30 headers"),
    "not a header": (b"hello\r\n", 400, "not readable as HTTP/1.1"),
    "a null byte": (b"X: \0\r\n", 400, "not readable as HTTP/1.1"),
    "two lengths": (b"Content-Length: 1\r\nContent-Length: 2\r\n", 400, "not readable"),
    "a length below zero": (b"Content-Length: -1\r\n", 400, "not readable"),
    "another encoding": (b"Transfer-Encoding: gzip\r\n", 501, "not readable"),
}


@pytest.mark.parametrize(("lines", "code", "says"), HEADERS.values(), ids=HEADERS)
def test_header_floods_and_bad_headers_are_refused(served: Served, lines: bytes, code: int, says: str) -> None:
    check_refused(served.ask(b"GET / HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n"), code, says)


def test_as_many_headers_as_allowed(served: Served) -> None:
    assert status(served.ask(GET[:-2] + b"X-a: 1\r\n" * 29 + b"\r\n")) == 200


POST = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_body_in_crumbs_is_refused(served: Served) -> None:
    """Each chunk costs the event loop some 20 microseconds, whatever it holds: 32 MiB bytewise are ten minutes."""
    check_refused(served.ask(POST + b"1\r\nx\r\n" * 8_000), 400, "crumbs")
    assert served.ask(POST + b"1\r\nx\r\n" * 4_000 + b"0\r\n\r\n").endswith(b"4000")
    assert served.ask(POST + b"200\r\n" + b"x" * 512 + b"\r\n0\r\n\r\n").endswith(b"512")


def test_a_length_that_lies(served: Served) -> None:
    short = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabcdef"
    with closing(served.connect(short)) as connection:  # the rest would be another request, and is none
        found = b""
        while more := connection.recv(65536):
            found += more
    assert b"\r\n\r\n3HTTP/1.1 408 " in found


def test_the_rest_of_a_refused_body_is_not_read_for_ever(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.connections._LATE_BODY_S", SHORT)
    with closing(served.connect(POST.replace(b"/", b"/refuse", 1))) as connection:
        assert status(answer(connection)) == 413
        started = time.monotonic()
        while send(connection, b"1000\r\n" + b"x" * 4096 + b"\r\n"):
            assert time.monotonic() - started < 20 * SHORT
        assert time.monotonic() - started < 8 * SHORT


def test_after_the_rest_of_a_refused_body_the_connection_lives(served: Served) -> None:
    with closing(served.connect(POST.replace(b"/", b"/refuse", 1) + b"1\r\nx\r\n")) as connection:
        assert status(answer(connection)) == 413
        connection.sendall(b"0\r\n\r\n")
        time.sleep(2 * SHORT)
        connection.sendall(GET)
        assert status(answer(connection)) == 200


def test_an_answer_that_is_not_read_is_given_up(served: Served) -> None:
    with closing(served.connect(GET.replace(b"/", b"/large", 1))):
        wait_until(lambda: served.open() == 1)
        wait_until(lambda: served.open() == 0, seconds=10)


def test_an_idle_connection_is_closed() -> None:
    with serve(keep_alive_s=1) as served, closing(served.connect(GET)) as connection:
        assert status(answer(connection)) == 200
        assert 0.5 < ended_after(connection) < 5


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nX", GET], ids=["silent", "slowloris", "idle"])
def test_clients_that_only_sit_there_keep_nobody_out(sent: bytes) -> None:
    limits = ConnectionLimits(max_connections=20, header_timeout_s=60, max_headers=30, max_header_bytes=4096)
    with serve(limits) as served, ExitStack() as sitting:
        for _ in range(200):
            sitting.enter_context(closing(served.connect(sent)))
        ended, most = served.guard.ended, limits.max_connections
        # All have been dealt with: so long as every place is just being answered, one more would be 503.
        wait_until(lambda: ended["place taken"] + ended["503"] >= 200 - most)
        wait_until(lambda: served.open() == len(served.guard.waiting) <= most)
        for _ in range(20):
            assert status(served.ask()) == 200
        assert served.open() <= most


def test_where_every_connection_has_a_request_one_more_is_refused() -> None:
    limits = ConnectionLimits(max_connections=3, header_timeout_s=5, max_headers=30, max_header_bytes=4096)
    with serve(limits) as served:
        busy = [served.connect(GET.replace(b"/", b"/slow", 1)) for _ in range(3)]
        wait_until(lambda: served.open() == 3 and not served.guard.waiting)
        found = served.ask()
        check_refused(found, 503, "all connections are in use")
        assert b"Retry-After: 1" in found
        for connection in busy:
            assert answer(connection).endswith(b"done")
            connection.close()
        assert status(served.ask()) == 200


def test_an_upgrade_is_a_plain_request(served: Served) -> None:
    assert status(served.ask(GET[:-2] + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n")) == 200


# What is turned away before it is parsed

KNOCK = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nknok"
NO = b"HTTP/1.1 429 No\r\nContent-Length: 2\r\n\r\nno"


class Doorman:
    """Turns away every KNOCK that it is shown whole, and remembers what it was shown and told."""

    def __init__(self) -> None:
        self.shown: list[bytes] = []
        self.told: list[bool] = []

    def __call__(self, data: bytes, client: tuple[str, int] | None, last: bool) -> bytes | None:
        assert client is not None
        self.shown.append(data)
        self.told.append(last)
        return NO if data == KNOCK else None


@pytest.fixture(scope="module")
def doorman() -> Doorman:
    return Doorman()


@pytest.fixture(scope="module")
def guarded_door(doorman: Doorman) -> Iterator[Served]:
    with serve(turn_away=doorman) as found:
        yield found


@pytest.fixture
def door(guarded_door: Served, doorman: Doorman) -> Iterator[tuple[Served, Doorman]]:
    doorman.shown.clear()
    yield guarded_door, doorman
    wait_until(lambda: guarded_door.open() == 0)
    assert not guarded_door.guard.waiting


def test_who_is_turned_away_may_go_on_asking(door: tuple[Served, Doorman]) -> None:
    served, doorman = door
    with closing(served.connect()) as connection:
        for sent, wanted in ((KNOCK, NO), (KNOCK, NO), (GET, b"0"), (KNOCK, NO), (GET, b"0")):
            connection.sendall(sent)
            found = answer(connection)
            assert found == NO if wanted is NO else (status(found) == 200 and found.endswith(wanted))
    assert doorman.shown == [KNOCK, KNOCK, GET, KNOCK, GET]


def test_what_belongs_to_another_request_is_not_shown(door: tuple[Served, Doorman]) -> None:
    """Else the two ends would disagree on where a request begins."""
    served, doorman = door
    for first in (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(KNOCK),  # it is the body
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(KNOCK) + b"X: ",  # it goes on with the headers
    ):
        with closing(served.connect(first)) as connection:
            wait_until(lambda first=first: first in doorman.shown)  # type: ignore[misc]
            connection.sendall(KNOCK)
            if first.endswith(b"X: "):
                connection.sendall(KNOCK)
            assert answer(connection) != NO
    assert KNOCK not in doorman.shown


def test_behind_a_request_in_hand_it_waits_for_its_turn(door: tuple[Served, Doorman]) -> None:
    served, doorman = door
    with closing(served.connect(GET.replace(b"/", b"/slow", 1))) as connection:
        wait_until(lambda: len(doorman.shown) == 1)
        connection.sendall(KNOCK)
        found = b""
        while found.count(b"HTTP/1.1 ") < 2 or not found.endswith(b"4"):
            more = connection.recv(65536)
            assert more, found
            found += more
        assert found.index(b"done") < found.rindex(b"HTTP/1.1 200")  # the parser's, in order
    assert KNOCK not in doorman.shown


def test_who_is_turned_away_and_then_idle_is_closed() -> None:
    with serve(keep_alive_s=1, turn_away=Doorman()) as served, closing(served.connect(KNOCK)) as connection:
        assert answer(connection) == NO
        time.sleep(0.6)
        connection.sendall(KNOCK)  # a new second begins
        assert answer(connection) == NO
        assert 0.7 < ended_after(connection) < 5
        assert served.guard.ended["idle"] == 1


def test_a_server_that_ends_does_not_wait_long_for_who_was_turned_away() -> None:
    with serve(turn_away=Doorman()) as served:
        connection = served.connect(KNOCK)
        assert answer(connection) == NO
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert connection.recv(10) == b""
    connection.close()


# A server that drains, and one that ends


def check_last(connection: socket.socket) -> None:
    """One answer arrives, which says that there will be no other, and then the connection is closed."""
    found = answer(connection)
    assert status(found) in (200, 413), found
    assert b"connection: close\r\n" in found.partition(b"\r\n\r\n")[0].lower() + b"\r\n"
    assert connection.recv(10) == b""


def test_while_a_server_drains_each_answer_is_the_last_on_its_connection() -> None:
    doorman = Doorman()
    with serve(turn_away=doorman) as served, ExitStack() as opened:
        idle, busy, turned_away = (opened.enter_context(closing(served.connect(GET))) for _ in range(3))
        for connection in (idle, busy, turned_away):
            assert b"connection:" not in answer(connection).lower()
        busy.sendall(GET.replace(b"/", b"/slow", 1))
        wait_until(lambda: len(doorman.shown) == 4)
        served.guard.draining = True
        check_last(busy)
        idle.sendall(GET)
        check_last(idle)
        turned_away.sendall(KNOCK)
        assert answer(turned_away) == NO
        assert turned_away.recv(10) == b""
        assert doorman.told == [False, False, False, False, True, True]
        with closing(served.connect(GET)) as fresh:  # the port is open
            check_last(fresh)


def test_the_last_answer_is_not_cut_off_by_a_body_that_is_still_coming() -> None:
    """What a closed connection receives is answered with a reset, which takes along what was not read yet."""
    with serve() as served:
        served.guard.draining = True
        with closing(served.connect(POST.replace(b"/", b"/refuse", 1))) as connection:
            wait_until(lambda: served.open() == 1)
            time.sleep(SHORT)
            for _ in range(10):
                assert send(connection, b"1000\r\n" + b"x" * 4096 + b"\r\n")
                time.sleep(SHORT / 10)
            check_last(connection)
        wait_until(lambda: served.open() == 0)
        assert not served.guard.waiting


def test_a_client_that_goes_on_after_the_last_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.connections._LATE_BODY_S", SHORT)
    with serve() as served:
        served.guard.draining = True
        with closing(served.connect(POST.replace(b"/", b"/refuse", 1))) as connection:
            started = time.monotonic()
            while send(connection, b"1000\r\n" + b"x" * 4096 + b"\r\n"):
                assert time.monotonic() - started < 20 * SHORT
                time.sleep(SHORT / 10)


def test_who_is_idle_when_the_port_is_closed_may_ask_once_more() -> None:
    with serve() as served, ExitStack() as opened:
        asking, silent, fresh = (opened.enter_context(closing(served.connect())) for _ in range(3))
        for connection in (asking, silent):
            connection.sendall(GET)
            assert status(answer(connection)) == 200
        wait_until(lambda: served.open() == 3)
        served.server.should_exit = True
        closed = time.monotonic()
        wait_until(lambda: served.guard.leaving)
        with pytest.raises(ConnectionRefusedError):
            served.connect()
        for connection in (asking, fresh):
            connection.sendall(GET)
            check_last(connection)
        assert silent.recv(10) == b""
        assert 0.9 < time.monotonic() - closed < 5


def test_a_request_that_has_begun_to_arrive_when_the_port_is_closed_is_answered() -> None:
    limits = ConnectionLimits(max_connections=20, header_timeout_s=10, max_headers=30, max_header_bytes=4096)
    with serve(limits, drain_timeout_s=10) as served, closing(served.connect(GET[:20])) as connection:
        wait_until(lambda: served.open() == 1)
        served.server.should_exit = True
        wait_until(lambda: served.guard.leaving)
        time.sleep(1.3)
        connection.sendall(GET[20:])
        check_last(connection)
