"""The queue before the engine, without an engine: who is taken, with whom, and in which order."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mithridate.defenses import Budget
from mithridate.errors import BudgetExceededError
from service.batching import EngineStoppedError, Queue, Waiting

CEILING = 8


class Named:
    """All that the queue wants to know of a defence."""

    def __init__(self, name: str, *, batches: bool = True) -> None:
        self.name = name
        self.batches = batches


def waiting(defence: Any, images: int = 1, **budget: Any) -> Waiting:
    return Waiting(defence=defence, pixels=np.zeros((images, 1, 8, 8), np.uint8), budget=Budget(**budget), seed=0)


def take_all(queue: Queue) -> list[list[Waiting]]:
    batches = []
    while len(queue):
        batches.append(queue.take())
    return batches


REQUESTS = st.lists(st.tuples(st.sampled_from("ABS"), st.integers(1, 12)), min_size=1, max_size=30)


@given(asked=REQUESTS)
def test_everybody_is_taken_once_and_in_order(asked: list[tuple[str, int]]) -> None:
    defences: dict[str, Any] = {"A": Named("A"), "B": Named("B"), "S": Named("S", batches=False)}
    requests = [waiting(defences[name], images) for name, images in asked]
    queue = Queue(CEILING)
    for request in requests:
        queue.put(request)
    batches = take_all(queue)
    assert sorted(requests.index(one) for batch in batches for one in batch) == list(range(len(requests)))
    for name in "ABS":
        order = [requests.index(one) for batch in batches for one in batch if one.defence is defences[name]]
        assert order == sorted(order), "nobody overtakes another one of the same defence"
    left = set(range(len(requests)))
    for batch in batches:
        assert requests.index(batch[0]) == min(left), "the oldest is next: nobody starves"
        left -= {requests.index(one) for one in batch}
        assert len({one.defence.name for one in batch}) == 1
        assert len(batch) == 1 or sum(len(one.pixels) for one in batch) <= CEILING
        assert len(batch) == 1 or batch[0].defence is not defences["S"]
        follower = next((n for n in sorted(left) if requests[n].defence is batch[0].defence), None)
        if follower is not None and batch[0].defence is not defences["S"]:
            assert sum(len(one.pixels) for one in batch) + len(requests[follower].pixels) > CEILING, "there was room"


def test_a_defence_that_says_nothing_is_batched() -> None:
    class Silent:
        name = "silent"

    silent, queue = Silent(), Queue(CEILING)
    for _ in range(3):
        queue.put(waiting(silent))
    assert len(queue.take()) == 3


def test_those_who_left_or_are_late_are_passed_over() -> None:
    defence, queue = Named("A"), Queue(CEILING)
    left = threading.Event()
    requests = [
        waiting(defence, cancelled=left.is_set),
        waiting(defence),
        waiting(defence, deadline=time.monotonic() - 1),
        waiting(defence),
        waiting(defence, 8),
    ]
    for request in requests:
        queue.put(request)
    left.set()
    assert queue.take() == [requests[1], requests[3]], "who is passed over takes no room either"
    for number, reason in ((0, "cancelled"), (2, "deadline")):
        with pytest.raises(BudgetExceededError, match=reason):
            requests[number].answer.result(timeout=0)
    assert queue.take() == [requests[4]]


def test_who_is_cancelled_leaves_the_queue_at_once() -> None:
    queue, request = Queue(CEILING), waiting(Named("A"))
    queue.put(request)
    assert len(queue) == 1
    assert request.answer.cancel()
    assert len(queue) == 0
    queue.put(other := waiting(Named("A")))
    assert queue.take() == [other]
    assert not other.answer.cancel(), "it has begun"


def test_a_sweep_answers_who_left_and_leaves_the_others_alone() -> None:
    defence, queue, left = Named("A"), Queue(CEILING), threading.Event()
    requests = [waiting(defence), waiting(defence, cancelled=left.is_set), waiting(defence)]
    for request in requests:
        queue.put(request)
    queue.sweep()
    assert len(queue) == 3
    left.set()
    queue.sweep()
    with pytest.raises(BudgetExceededError, match="cancelled"):
        requests[1].answer.result(timeout=0)
    assert queue.take() == [requests[0], requests[2]]


def test_taking_waits_and_closing_ends_the_wait() -> None:
    queue, request = Queue(CEILING), waiting(Named("A"))
    with ThreadPoolExecutor(1) as threads:
        taken = threads.submit(queue.take)
        time.sleep(0.05)
        assert not taken.done()
        queue.put(request)
        assert taken.result(5) == [request]
        taken = threads.submit(queue.take)
        time.sleep(0.05)
        assert queue.close() == []
        assert taken.result(5) == []


def test_nothing_goes_in_or_out_after_closing() -> None:
    queue, request = Queue(CEILING), waiting(Named("A"))
    queue.put(request)
    assert queue.close() == [request]
    assert queue.take() == []
    with pytest.raises(EngineStoppedError, match="stopped"):
        queue.put(waiting(Named("A")))
    request.answer.cancel()
    with pytest.raises(CancelledError):
        request.answer.result(timeout=0)
