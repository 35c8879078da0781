"""Too little memory: one smaller try, and where that does not do either, no service instead of a broken one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from service_helpers import Serving, Wrapped, assert_same, check_problem, crowd, install, post, post_json, predictions

from mithridate.defenses import Outcome, Prediction, Request
from service.out_of_memory import is_out_of_memory

SAID = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


class Short(Wrapped):
    """Has memory for so many images at once."""

    def __init__(self, inner: Any, room: int, error: type[Exception]) -> None:
        super().__init__(inner, "short")
        self.room, self.error = room, error

    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        outcomes = super().predict_together(requests)
        if sum(len(request.images) for request in requests) > self.room:
            raise self.error(SAID)
        return outcomes


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, torch.OutOfMemoryError])
def test_a_request_that_is_too_large_is_answered_in_halves(
    serving: Serving, clean: list[bytes], error: type[Exception]
) -> None:
    with serving(offer=["none", "rmc"]) as client:
        app: Any = client.app
        short = Short(app.state.service.engine.loaded.defences["rmc"], 3, error)
        install(client, short)
        found = predictions(post_json(client, clean[:5], defense="short", explain=True))
        assert short.seen == [[5], [2], [3]]
        assert_same(found, predictions(post_json(client, clean[:5], defense="rmc", explain=True)))


def test_a_batch_that_is_too_large_is_answered_one_by_one(serving: Serving, clean: list[bytes]) -> None:
    with serving(offer=["none"]) as client:
        app: Any = client.app
        short = Short(app.state.service.engine.loaded.defences["none"], 2, MemoryError)
        install(client, short)
        with crowd(client, clean[0]) as waiting:
            sent = [waiting.ask(*clean[n : n + 2], defense="short") for n in (0, 2)]
            waiting.open()
            for one, n in zip(sent, (0, 2), strict=True):
                plain = predictions(post_json(client, clean[n : n + 2], defense="none"))
                assert_same(predictions(one.result(10)), plain)
        assert short.seen == [[2, 2], [2], [2]]
        assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize(("room", "images", "tries"), [(1, 4, [[4], [2]]), (0, 1, [[1], [1]])])
def test_where_a_smaller_try_does_not_do_there_is_no_service(
    serving: Serving, clean: list[bytes], room: int, images: int, tries: list[list[int]]
) -> None:
    with serving(offer=["none"]) as client:
        app: Any = client.app
        stopped = threading.Event()
        app.state.service.on_failure = stopped.set
        short = Short(app.state.service.engine.loaded.defences["none"], room, RuntimeError)
        install(client, short)
        with crowd(client, clean[0]) as waiting:
            large, innocent = waiting.ask(*clean[:images], defense="short"), waiting.ask(clean[0], defense="none")
            waiting.open()
            for sent in (large, innocent):
                response = sent.result(10)
                check_problem(response, 503, "stopped")
                assert response.headers["retry-after"] == "1"
        assert short.seen == tries
        assert stopped.wait(5)
        assert "out of memory: [enforce fail" in app.state.service.failure
        check_problem(client.get("/readyz"), 503)
        check_problem(post(client, clean[0]), 503)


class Full(Wrapped):
    """Has no memory the first ``times``."""

    def __init__(self, inner: Any, times: int) -> None:
        super().__init__(inner, "full")
        self.resources, self.times = inner.resources, times

    def predict(self, images: Any, *, generator: Any, budget: Any) -> Prediction:
        self.times -= 1
        if self.times >= 0:
            raise MemoryError(SAID)
        found: Prediction = self.inner.predict(images, generator=generator, budget=budget)
        return found


@pytest.mark.parametrize("times", [1, 2])
def test_an_attack_of_the_lab_has_no_halves(serving: Serving, clean: list[bytes], times: int) -> None:
    """Its two images are one question: tried again as it is, and then as for anything else."""
    with serving(offer=["none"], lab=True) as client:
        app: Any = client.app
        install(client, Full(app.state.service.engine.loaded.defences["none"], times))
        params, headers = {"defense": "full"}, {"Content-Type": "image/png"}
        answer = client.post("/v1/lab/attack", content=clean[0], params=params, headers=headers)
        if times == 1:
            assert answer.status_code == 200, answer.text
            assert client.get("/readyz").status_code == 200
        else:
            check_problem(answer, 503, "stopped")
            assert "out of memory" in app.state.service.failure


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError(SAID))
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**58, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
