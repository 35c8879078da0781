"""Admission by count, by cost and by allowance: with a clock of its own, then over HTTP."""

from __future__ import annotations

import math
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service_helpers import SLOW, Serving, check_problem, crowd, post, post_json, predictions, wait_until
from starlette.testclient import TestClient

from mithridate.defenses import Resources, build_defence
from mithridate.errors import OptionError
from service.admission import Admission, Ticket
from service.allowances import Bucket
from service.ceilings import check_ceilings
from service.keys import Caller, Key, hash_key, new_key
from service.problems import Problem
from service.settings import load_settings


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def caller(**limits: float) -> Caller:
    key = Key(id="a", sha256="0" * 64, scopes=frozenset({"predict"}), **limits)  # type: ignore[arg-type]
    return Caller(key_id="a", scopes=key.scopes, key=key)


def admission(clock: Clock, **flags: Any) -> Admission:
    made = Admission(load_settings(bundle="b", **flags), clock)
    made.default = "quick"
    made.costs.seed({"quick": 0.01, "slow": 2.0})
    return made


def shed(act: Any, reason: str | None = None) -> int:
    """The ``Retry-After`` of a 429, which is for that ``reason``."""
    with pytest.raises(Problem) as raised:
        act()
    assert raised.value.status == 429
    assert reason in (None, raised.value.reason)
    return int(raised.value.headers["Retry-After"])


def ask(doors: Admission, who: Caller, defence: str, images: int = 1, *, left: float = 1e9) -> Ticket:
    ticket = doors.enter(who)
    try:
        doors.price(ticket, defence, images, seconds_left=left)
    except Problem:
        doors.leave(ticket)
        raise
    doors.ask(ticket)
    return ticket


def test_a_place_for_so_many_and_no_more() -> None:
    doors = admission(Clock(), queue_size=2)
    inside = [ask(doors, caller(), "quick") for _ in range(2)]
    assert shed(lambda: doors.enter(caller()), "queue-full") == 1
    doors.leave(inside[0])
    ask(doors, caller(), "quick")


def test_a_place_for_so_much_work_and_no_more() -> None:
    """Bounded by count alone, eight of these would keep the last waiting for 16 s."""
    doors = admission(Clock(), queue_seconds=9)
    inside = [ask(doors, caller(), "slow") for _ in range(4)]
    assert shed(lambda: ask(doors, caller(), "slow"), "cost") == 8
    assert doors.in_flight == 4, "it was inside until it was known what it wants"
    inside.append(ask(doors, caller(), "quick", 50))  # for half a second there is room
    inside.append(ask(doors, caller(), "quick", 50))
    assert shed(lambda: doors.enter(caller()), "cost") == 9, "not even read"
    for ticket in inside:
        doors.leave(ticket)
    assert doors.queued_seconds == doors.in_flight == 0


def test_whoever_is_alone_may_take_long() -> None:
    doors = admission(Clock(), queue_seconds=1)
    ticket = ask(doors, caller(), "slow", 64)
    shed(lambda: ask(doors, caller(), "quick"))
    doors.leave(ticket)
    ask(doors, caller(), "quick")


def test_estimates_follow_what_is_measured() -> None:
    """A defence that takes a tenth of what the start said gets ten times the places, and the other way round."""
    clock = Clock()
    doors = admission(clock, queue_seconds=4)
    for _ in range(60):
        ticket = ask(doors, caller(), "slow")
        doors.settle(ticket, 0.2, images_together=1)
        doors.leave(ticket)
    assert doors.costs.estimate("slow", 10) == pytest.approx(2, rel=0.05)
    for _ in range(60):
        ticket = ask(doors, caller(), "quick", 4)
        doors.settle(ticket, 8.0, images_together=4)
        doors.leave(ticket)
    assert doors.costs.estimate("quick", 1) == pytest.approx(2, rel=0.05)


def test_one_that_was_cut_off_counts_as_long_as_it_ran() -> None:
    """Where fine-tuning is always cut off by the deadline, no answer ever tells how long it takes."""
    clock = Clock()
    doors = admission(clock, queue_seconds=100)
    long, behind = ask(doors, caller(), "quick"), ask(doors, caller(), "slow")
    clock.now += 30
    doors.leave(behind)
    assert doors.costs.estimate("slow", 1) == 2, "it only waited: nothing is known of it"
    doors.leave(long)
    assert doors.costs.estimate("quick", 1) == 30


def test_what_cannot_be_done_in_time_is_said_at_once_and_forgotten_after_a_while() -> None:
    clock = Clock()
    doors = admission(clock)
    ticket = ask(doors, caller(), "slow", 2)
    doors.settle(ticket, 6.0, images_together=2)
    doors.leave(ticket)
    ask(doors, caller(), "slow", 1, left=3)  # one may be quicker than two
    with pytest.raises(Problem, match="at least 6 s, and the deadline is in 5 s") as raised:
        ask(doors, caller(), "slow", 3, left=5)
    assert (raised.value.status, raised.value.reason) == (504, "deadline")
    clock.now += 61  # else one slow moment of the machine would forbid it for good
    ask(doors, caller(), "slow", 3, left=5)


def test_retry_after_is_honest() -> None:
    """Whoever comes back when told finds room, and was not sent away for several times as long as was needed."""
    clock = Clock()
    doors = admission(clock, queue_seconds=10)
    line = [ask(doors, caller(), "slow") for _ in range(5)]
    for ran in (0.0, 0.7, 1.9):
        clock.now = 1000 + ran
        told = shed(lambda: doors.enter(caller()))
        until_done = 10 - ran
        assert until_done <= told <= until_done + 1
    clock.now = 1006  # the first should have taken 2 s
    assert shed(lambda: doors.enter(caller())) >= 8 + 2
    for ticket in line:
        doors.settle(ticket, 2.0, images_together=1)
        doors.leave(ticket)
    ask(doors, caller(), "slow")


# --- allowances


def test_requests_a_minute() -> None:
    clock = Clock()
    doors, who = admission(clock), caller(requests_per_minute=3)
    for _ in range(3):
        doors.leave(ask(doors, who, "quick"))
    assert shed(lambda: doors.enter(who)) == 20
    clock.now += 20
    doors.leave(doors.enter(who))
    shed(lambda: doors.enter(who))
    assert doors.enter(Caller(key_id="b", scopes=who.scopes)), "another one's allowance is another one's"
    clock.now += 3600
    for _ in range(3):
        doors.leave(doors.enter(who))
    shed(lambda: doors.enter(who))


def test_seconds_of_computing_a_minute_are_charged_as_measured() -> None:
    clock = Clock()
    doors, who = admission(clock), caller(compute_seconds_per_minute=6)
    ticket = ask(doors, who, "slow")
    assert _compute(doors, who) == pytest.approx(4), "the estimate, at first"
    doors.settle(ticket, 4.0, images_together=8)
    doors.leave(ticket)
    assert _compute(doors, who) == pytest.approx(5.5), "its share of the run"
    ticket = ask(doors, who, "quick")
    doors.settle(ticket, 9.5, images_together=1)
    doors.leave(ticket)
    assert _compute(doors, who) == pytest.approx(-4)
    assert shed(lambda: doors.enter(who)) == 41
    clock.now += 41
    doors.leave(doors.enter(who))


def test_what_never_reached_the_engine_is_not_charged_and_what_was_given_up_is() -> None:
    clock = Clock()
    doors, who = admission(clock), caller(compute_seconds_per_minute=60)
    ticket = doors.enter(who)
    doors.price(ticket, "slow", 5, seconds_left=99)
    doors.leave(ticket)  # an image that cannot be decoded
    assert _compute(doors, who) == 60
    ticket = ask(doors, who, "slow")
    assert _compute(doors, who) == 58
    clock.now += 8
    assert _compute(doors, who) == 60
    doors.leave(ticket)  # the client left after 8 s of work, of which 2 had been charged
    assert _compute(doors, who) == pytest.approx(60 - 6)


def _compute(doors: Admission, who: Caller) -> float:
    allowance = doors._allowances.of(who.key)
    assert allowance is not None
    assert allowance.compute is not None
    return allowance.compute.level


def test_a_key_whose_limit_was_changed_has_the_new_one() -> None:
    doors = admission(Clock())
    doors.leave(doors.enter(caller(requests_per_minute=1)))
    shed(lambda: doors.enter(caller(requests_per_minute=1)))
    doors.leave(doors.enter(caller(requests_per_minute=2)))


@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(0, 50)), max_size=40), st.floats(0.01, 1000))
def test_a_bucket_never_holds_more_than_a_minutes_worth(steps: list[tuple[float, float]], per_minute: float) -> None:
    """Also where the clock is set back or forward; and what was promised to be there after a while, is."""
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    most = max(1.0, per_minute)
    for passed, amount in steps:
        clock.now += passed
        before = bucket.level
        assert before <= most
        bucket.take(amount)
        assert bucket.level == pytest.approx(before - amount)
        assert math.isfinite(bucket.wait(amount))
        bucket.take(-1e9)
        assert bucket.level == most
        bucket.take(amount)
    wait = bucket.wait(0.5)
    clock.now = max(clock.now, bucket._at) + wait * (1 + 1e-9) + 1e-9
    assert bucket.wait(0.5) < 1e-6 / (per_minute / 60)


ENDS = st.sampled_from(["unread", "unpriced", "undecoded", "given up", "answered"])


@given(st.lists(st.tuples(ENDS, st.sampled_from(["quick", "slow"]), st.integers(1, 64), st.floats(0, 20)), max_size=30))
@settings(deadline=None)
def test_everything_is_given_back_however_it_ends(requests: list[tuple[str, str, int, float]]) -> None:
    """In any order, several at once: nobody is left inside, no cost is left in the queue, and no charge is negative."""
    clock = Clock()
    doors, who = admission(clock, queue_size=8), caller(compute_seconds_per_minute=600)
    inside: list[tuple[Ticket, str, float]] = []
    for number, (end, defence, images, seconds) in enumerate(requests):
        clock.now += seconds / 8
        try:
            ticket = doors.enter(who)
        except Problem:
            continue
        inside.append((ticket, end, seconds))
        try:
            if end != "unread":
                doors.price(ticket, defence, images, seconds_left=30)
                if end in ("given up", "answered"):
                    doors.ask(ticket)
        except Problem:
            inside[-1] = (ticket, "unpriced", seconds)
        assert doors.in_flight == len(inside) <= 8
        if number % 3 == 2:
            _end(doors, *inside.pop(number % len(inside)))
    while inside:
        _end(doors, *inside.pop())
    assert doors.in_flight == doors.queued_seconds == doors.remaining_seconds == 0
    assert not doors._asking
    assert _compute(doors, who) <= 600


def _end(doors: Admission, ticket: Ticket, end: str, seconds: float) -> None:
    if end == "answered":
        doors.settle(ticket, seconds, images_together=ticket.images)
    doors.leave(ticket)
    assert ticket.charged >= 0
    if end in ("unread", "unpriced", "undecoded"):
        assert ticket.charged == 0
    if end == "answered":
        assert ticket.charged == pytest.approx(seconds)


# --- ceilings


@pytest.mark.parametrize(
    ("text", "setting", "allowed"),
    [
        ("rmc", "max_neighbors", 256),
        ("webnn:neighbors=32", "max_neighbors", 32),
        ("rmc:scope=all,epochs=7", "max_steps", 7),
        ("sap:passes=20", "max_passes", 20),
        ("rmc+sap:passes=3", "max_passes", 3),
        ("region", "max_passes", 1000),
    ],
)
def test_ceilings_bite_where_a_defence_is_offered(resources: Resources, text: str, setting: str, allowed: int) -> None:
    defence = build_defence(text, resources)
    check_ceilings([defence], load_settings(bundle="b", **{setting: allowed}))
    with pytest.raises(OptionError, match=f"more than {setting}={allowed - 1}"):
        check_ceilings([defence], load_settings(bundle="b", **{setting: allowed - 1}))


# --- over HTTP


def service_of(client: TestClient) -> Any:
    app: Any = client.app
    return app.state.service


def test_costs_are_known_when_the_service_is_ready(client: TestClient, clean: list[bytes]) -> None:
    service = service_of(client)
    for name in service.engine.loaded.defences:
        if name in service.engine.loaded.seconds:
            assert 0 < service.admission.costs.estimate(name, 1) < 60
    assert predictions(post(client, clean[0]))
    assert service.admission.queued_seconds == service.admission.in_flight == 0


def test_work_is_shed_before_it_is_read_and_after(serving: Serving, clean: list[bytes]) -> None:
    with serving(defense="none", offer=[], queue_seconds=5) as client, crowd(client, clean[0]) as waiting:
        service = service_of(client)
        service.admission.costs.seed({"none": 1.0, "gate": 1.0})
        three = waiting.ask(*clean[:3])
        # Two more would be too much; it is inside when that is known, and gone again afterwards.
        answer = post_json(client, clean[:2])
        check_problem(answer, 429, "about 3.0 s", "about 2.0 s more")
        assert 3 <= int(answer.headers["retry-after"]) <= 6
        one = waiting.ask(clean[0])
        service.admission.costs.seed({"none": 1.0, "gate": 1.0})
        with ThreadPoolExecutor(4) as threads:
            more = [threads.submit(post, client, clean[0]) for _ in range(3)]
            wait_until(lambda: any(job.done() for job in more))  # nobody is answered yet: it was refused
            waiting.open()
        statuses = [job.result().status_code for job in more]
        assert set(statuses) <= {200, 429}
        assert 429 in statuses
        assert three.result().status_code == one.result().status_code == waiting.first.result().status_code == 200
        wait_until(lambda: service.admission.in_flight == 0)
        assert service.admission.queued_seconds == 0


def test_a_shed_request_keeps_its_connection(serving: Serving, clean: list[bytes]) -> None:
    """A client that is told to come back need not connect anew, though its body was never read."""
    import uvicorn

    with serving(defense="none", offer=[], queue_size=1) as client:
        service = service_of(client)
        occupied = service.admission.enter(Caller(key_id=None, scopes=frozenset()))
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(client.app, log_config=None, lifespan="off"))  # type: ignore[arg-type]
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(server.run, sockets=[listener])
            with socket.create_connection(listener.getsockname(), timeout=20) as connection:
                _send(connection, clean[0] * 500)
                assert _read(connection).startswith(b"HTTP/1.1 429")
                service.admission.leave(occupied)
                _send(connection, clean[0])
                assert _read(connection).startswith(b"HTTP/1.1 200")
            server.should_exit = True
            running.result()


def _send(connection: socket.socket, body: bytes) -> None:
    head = "POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)


def _read(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65_536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65_536)
    return data


def test_an_allowance_over_http(serving: Serving, clean: list[bytes]) -> None:
    one, other = new_key(), new_key()
    keys = [
        {"id": "one", "sha256": hash_key(one).hex(), "scopes": ["predict"], "requests_per_minute": 2},
        {"id": "other", "sha256": hash_key(other).hex(), "scopes": ["predict"], "compute_seconds_per_minute": 0.001},
    ]
    with serving(defense="none", offer=[], keys=keys) as client:

        def send(key: str) -> Any:
            headers = {"Content-Type": "image/png", "Authorization": f"Bearer {key}"}
            return client.post("/v1/predict", content=clean[0], headers=headers)

        assert [send(one).status_code for _ in range(2)] == [200, 200]
        refused = send(one)
        check_problem(refused, 429, "2 requests a minute")
        assert 28 <= int(refused.headers["retry-after"]) <= 30
        service = service_of(client)
        service.admission.costs.seed({"none": 5.0})
        send(other)  # the bucket holds a second at the most, and one request may empty it
        refused = send(other)
        check_problem(refused, 429, "0.001 seconds of computing a minute")
        assert service.admission.in_flight == 0


def test_every_outcome_gives_its_place_back(serving: Serving, clean: list[bytes]) -> None:
    with serving(offer=["none", "rmc", SLOW], max_images=2) as client:
        seen = {
            post(client, clean[0], defense="none").status_code,
            post(client, b"GIF89a").status_code,
            post(client, b"").status_code,
            post(client, clean[0], media_type="text/plain").status_code,
            post(client, clean[0], defense="unknown").status_code,
            post(client, clean[0], defense=SLOW, deadline_ms=200).status_code,
            post_json(client, clean[:3]).status_code,
        }
        assert seen == {200, 400, 413, 415, 422, 504}
        service = service_of(client)
        assert service.admission.in_flight == service.admission.queued_seconds == 0
        assert service.admission.costs.estimate(SLOW, 1) >= 0.1, "it was cut off after 0.2 s"


def test_a_ceiling_ends_the_start(digits_bundle: Path) -> None:
    from service.loading import load

    with pytest.raises(OptionError, match="neighbors=256, more than max_neighbors=100"):
        load(load_settings(bundle=digits_bundle, offer=["none", "rmc"], max_neighbors=100))


def test_turning_away_is_cheap() -> None:
    """Against 64 that wait: far below a millisecond, so that a flood of requests costs the loop next to nothing."""
    doors = admission(Clock(), queue_size=64)
    for _ in range(64):
        ask(doors, caller(), "quick")
    who = caller()
    times = []
    for _ in range(200):
        started = time.perf_counter()
        shed(lambda: doors.enter(who))
        times.append(time.perf_counter() - started)
    assert sorted(times)[100] < 0.001
