"""The load generator against servers whose times are known.

On a busy machine a process may lose tens of milliseconds at any moment. So a bound on *times* is only ever from below
(what the server waits cannot have been shorter), or as wide as a whole stall; rates are held by the slope of the
schedule, which a late second does not turn.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time

import numpy as np
import pytest
from client_helpers import closed_port
from load_servers import Respond, after, http, one_at_a_time, serving

from attack_client.generator import (
    Connections,
    Payload,
    Shooting,
    Traffic,
    arrival_times,
    closed_loop,
    open_loop,
)
from attack_client.load_statistics import summarise
from attack_client.wire import Target
from mithridate.errors import InputError
from mithridate.evaluation.service_load import LoadStep


def to(url: str, *, count: int = 16, timeout_seconds: float = 5.0) -> Connections:
    return Connections(target=Target.parse(url), count=count, timeout_seconds=timeout_seconds)


def images(url: str) -> Traffic:
    return Traffic(clean=(Payload("clean", 0, Target.parse(url).predict(b"image")),))


def step(shooting: Shooting, rate: float | None, seconds: float, objective_ms: float = 1000) -> LoadStep:
    return summarise(
        shooting.samples,
        set_rate=rate,
        clients=None if rate else 1,
        seconds=seconds,
        objective_ms=objective_ms,
        cpu_share=shooting.cpu_share,
        seed=0,
    )


def stalling() -> Respond:
    """Stops for a second, once, half a second after the first request."""
    loop = asyncio.get_running_loop()
    first: list[float] = []

    async def respond(path: str, body: bytes) -> bytes:
        del path, body
        first.append(loop.time())
        if 0.5 <= loop.time() - first[0] < 1.5:
            await asyncio.sleep(first[0] + 1.5 - loop.time())
        return http()

    return respond


def test_a_stall_of_a_second_is_seen_by_the_open_loop_and_hidden_by_the_closed_one() -> None:
    """Of 2.5 s, one is a stall: two fifths of those who came had to wait, half of them more than half a second."""
    with serving(stalling) as url:
        opened = open_loop(to(url, count=2), images(url), rate=100, seconds=2.5)
    latency = np.array([sample.done - sample.due for sample in opened.samples])
    late = [sample.taken - sample.due for sample in opened.samples]
    assert len(latency) == 250
    assert np.median(late) < 0.1  # the schedule went on while two connections were stuck
    assert (latency > 0.5).mean() >= 1 / 5 - 0.02
    assert latency.max() >= 0.95
    with serving(stalling) as url:
        closed = closed_loop(to(url, count=1), images(url), seconds=2)
    assert sum(sample.done - sample.due > 0.5 for sample in closed.samples) <= 2


def test_waiting_for_a_connection_counts_as_latency_but_not_as_service_time() -> None:
    """One connection and 40 requests/s of 50 ms each: the queue grows by a second each second."""
    with serving(lambda: after(lambda body: 0.05)) as url:
        shooting = open_loop(to(url, count=1), images(url), rate=40, seconds=1)
    found = step(shooting, 40, 1)
    assert found.answered == 40
    assert found.latency.max is not None
    assert found.latency.max >= 1000 * (40 * 0.05 - 39 / 40) - 1
    assert found.service_time.p50 is not None
    assert 50 <= found.service_time.p50 < 150
    assert found.waited_share >= 0.9
    assert not found.sustained


@pytest.mark.parametrize("poisson", [False, True])
def test_a_rate_is_held_within_one_percent(poisson: bool) -> None:
    """Three tries: the generator is exact to 0.01 %, so that a miss means that the machine stopped it for seconds."""
    with serving(lambda: after(lambda body: 0.0)) as url:
        for _ in range(3):
            shooting = open_loop(to(url), images(url), rate=200, seconds=2, warmup_seconds=0.3, poisson=poisson)
            found = step(shooting, 200, 2)
            if abs(found.sent_rate / 200 - 1) <= 0.01:
                break
    assert found.requests == found.answered == 400
    assert found.sent_rate == pytest.approx(200, rel=0.01)
    assert found.rate_deviation == pytest.approx(0, abs=0.01)


def test_poisson_arrivals_have_exponential_gaps() -> None:
    gaps = np.diff(arrival_times(1000, 50, poisson=True, seed=3))
    assert len(gaps) + 1 == 50_000
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.03)
    assert (gaps > 1e-3).mean() == pytest.approx(np.exp(-1), abs=0.01)


def misbehaving() -> Respond:
    """Answers, sheds, is too slow, hangs up, talks nonsense: in turn."""
    numbers = itertools.count()

    async def respond(path: str, body: bytes) -> bytes | None:
        del path, body
        match next(numbers) % 5:
            case 0:
                return http()
            case 1:
                return http(b"{}", status=429, fields="Retry-After: 1\r\n")
            case 2:
                await asyncio.sleep(3)
                return http()
            case 3:
                return None
        return b"220 mail.example ESMTP\r\n\r\n"

    return respond


def test_errors_are_told_apart() -> None:
    with serving(misbehaving) as url:
        shooting = open_loop(to(url, count=32, timeout_seconds=0.5), images(url), rate=50, seconds=1)
    found = step(shooting, 50, 1, objective_ms=500)
    assert found.requests == 50
    assert set(found.errors) == {"http 429", "timeout", "reset", "malformed answer"}
    assert found.answered + sum(found.errors.values()) == 50
    # A connection that was hung up on before it said a word is tried once more, so that no number is exactly a fifth.
    assert all(5 <= count <= 15 for count in (found.answered, *found.errors.values()))
    assert found.latency.count == found.answered + found.errors["timeout"]
    assert found.latency.max is not None
    assert found.latency.max >= 500  # a request that ran out of time is as old as that, and not left out


def test_what_found_no_connection_in_time_was_not_sent() -> None:
    """A listener that accepts nobody: the system holds one connection or two for it, and lets the others knock."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        shooting = open_loop(to(url, count=8, timeout_seconds=0.4), images(url), rate=20, seconds=1)
        took = time.monotonic() - started
    found = step(shooting, 20, 1, objective_ms=400)
    assert found.answered == 0
    assert found.errors["timeout"] >= 1
    assert found.errors["not sent in time"] >= 5
    assert found.requests == sum(found.errors.values())
    # They waited longest of all: percentiles without them would praise a service that lets nobody in.
    assert found.latency.count == found.requests
    assert found.service_time.count == found.errors["timeout"]
    assert took < 4  # it waits for nothing that is out of time


def test_a_service_that_goes_away_is_refused_and_a_closed_loop_does_not_spin() -> None:
    """A listener that takes two connections, answers each once, and is gone."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def vanish() -> None:
        taken = [listener.accept()[0] for _ in range(2)]
        listener.close()
        for connection in taken:
            connection.recv(10_000)
            connection.sendall(http())
            connection.close()

    thread = threading.Thread(target=vanish)
    thread.start()
    shooting = closed_loop(to(url, count=2), images(url), seconds=1)
    thread.join()
    found = step(shooting, None, 1)
    assert found.answered == 2
    assert found.errors["refused"] >= 5
    assert len(shooting.samples) < 100


def test_a_kept_alive_connection_that_the_server_closed_meanwhile_costs_nobody_an_answer() -> None:
    def brief() -> Respond:
        turns = itertools.count()

        async def respond(path: str, body: bytes) -> bytes | None:
            del path, body
            return None if next(turns) % 3 == 2 else http()

        return respond

    with serving(brief) as url:
        shooting = open_loop(to(url, count=1), images(url), rate=60, seconds=1)
    assert {sample.error for sample in shooting.samples} == {None}


def test_nobody_there_is_said_before_anything_is_sent() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(InputError, match="does not answer"):
        open_loop(to(url), images(url), rate=10, seconds=1)


def test_a_closed_loop_gets_what_its_clients_can_take() -> None:
    """Four clients and 20 ms: at most 200 a second, and not much less."""
    with serving(lambda: after(lambda body: 0.02)) as url:
        shooting = closed_loop(to(url, count=4), images(url), seconds=1.5, warmup_seconds=0.2)
    found = step(shooting, None, 1.5)
    assert 60 <= found.answered_rate <= 201
    assert found.latency.p50 == pytest.approx(found.service_time.p50, rel=0.05)
    assert found.sustained is None


def test_a_closed_loop_ends_before_memory_does() -> None:
    with serving(lambda: after(lambda body: 0.0)) as url, pytest.raises(InputError, match="25 requests"):
        closed_loop(to(url, count=2), images(url), seconds=60, most=25)


def test_attacked_images_that_take_longer_are_told_from_clean_ones() -> None:
    """30 against 60 ms: the median ratio is near 2, and its interval holds it. Traffic is mixed as asked."""
    with serving(lambda: after(lambda body: 0.06 if body == b"bad" else 0.03)) as url:
        target = Target.parse(url)
        traffic = Traffic(
            clean=(Payload("clean", 0, target.predict(b"good")),),
            adversarial=(Payload("pgd20", 0, target.predict(b"bad")),),
            share=0.3,
        )
        shooting = open_loop(to(url, count=64), traffic, rate=200, seconds=2)
    found = step(shooting, 200, 2)
    ratio = found.adversarial_to_clean["p50"]
    assert ratio.low <= ratio.value <= ratio.high
    assert 1.5 < ratio.value < 2.2
    assert found.kinds["pgd20"].count / found.requests == pytest.approx(0.3, abs=0.08)
    assert list(found.kinds) == ["clean", "pgd20"]


def test_capacity_shows_as_answers_a_second() -> None:
    """Asked for 100/s, a server of 50/s gives 50: the schedule is held all the same, and the step is not sustained."""
    with serving(lambda: one_at_a_time(0.02)) as url:
        shooting = open_loop(to(url, count=64), images(url), rate=100, seconds=1)
    found = step(shooting, 100, 1, objective_ms=100)
    assert 40 <= found.answered_rate <= 51
    assert found.sent_rate == pytest.approx(100, rel=0.05)
    assert found.sustained is False
