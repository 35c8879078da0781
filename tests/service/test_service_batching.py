"""Requests that wait together are answered together, and nobody can tell from the answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from service_helpers import (
    QUICK_ALL,
    Serving,
    Wrapped,
    assert_same,
    check_problem,
    crowd,
    install,
    post,
    post_json,
    predictions,
    wait_until,
)
from starlette.testclient import TestClient
from test_service_describe import read_metrics

from mithridate.defenses import Adaptation, Defence, Neighborhood, Outcome, Prediction, Request
from mithridate.images import encode_png

DEFENCES = ("none", "rmc", "webnn", "deepnn")


@pytest.fixture
def fresh(serving: Serving) -> Iterator[TestClient]:
    with serving(offer=(*DEFENCES, QUICK_ALL)) as client:
        yield client


def base(client: TestClient) -> Defence:
    app: Any = client.app
    found: Defence = app.state.service.engine.loaded.defences["none"]
    return found


def batch(sent: Future[httpx2.Response]) -> tuple[int, int]:
    answer = sent.result().json()
    return answer["batch"]["requests"], answer["batch"]["images"]


@pytest.mark.parametrize("defense", DEFENCES)
def test_who_waits_together_is_answered_together_and_as_if_alone(
    fresh: TestClient, clean: list[bytes], adversarial: list[bytes], defense: str
) -> None:
    files = [[clean[0]], [adversarial[1], clean[2]], [adversarial[3]], [adversarial[0]], [clean[3]]]
    options: dict[str, Any] = {"defense": defense, "top_k": 10, "explain": True}
    alone = [post_json(fresh, own, **options) for own in files]
    assert {tuple(answer.json()["batch"].values()) for answer in alone} == {(1, 1), (1, 2)}
    for order in ([0, 1, 2, 3, 4], [4, 2, 1, 3, 0]):
        with crowd(fresh, clean[0]) as waiting:
            sent = {number: waiting.ask(*files[number], **options) for number in order}
            waiting.open()
            for number, answer in sent.items():
                assert batch(answer) == (5, 6)
                assert_same(predictions(answer.result()), predictions(alone[number]))
            assert batch(waiting.first) == (1, 1), "the engine was idle: it did not wait for company"


def test_timings_are_each_requests_own_but_for_the_work_they_shared(fresh: TestClient, clean: list[bytes]) -> None:
    with crowd(fresh, clean[0]) as waiting:
        sent = [waiting.ask(file, defense="webnn") for file in clean[:3]]
        waiting.open()
        timings = [answer.result().json()["timings_ms"] for answer in sent]
    for phase in ("embed", "search", "predict"):
        assert len({timing[phase] for timing in timings}) == 1
        assert timings[0][phase] > 0
    queued = [timing["queue"] for timing in timings]
    assert queued == sorted(queued, reverse=True), "who came first waited longest"
    assert len(set(queued)) == 3
    for timing in timings:
        assert sum(timing.values()) - timing["total"] <= timing["total"]


def test_the_ceiling_is_in_images_and_nobody_overtakes(serving: Serving, clean: list[bytes]) -> None:
    with serving(offer=DEFENCES, max_batch_images=4) as client:
        counted = Wrapped(base(client), "counted")
        install(client, counted)
        with crowd(client, clean[0]) as waiting:
            for images in (1, 2, 2, 1, 6, 1, 1):
                waiting.ask(*clean[:images], defense="counted")
    assert counted.seen == [[1, 2], [2, 1], [6], [1, 1]]


def test_other_defences_are_not_starved(serving: Serving, clean: list[bytes]) -> None:
    with serving(offer=DEFENCES, max_batch_images=2) as client:
        order: list[str] = []

        class Noting(Wrapped):
            def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
                order.append(self.name * len(requests))
                return super().predict_together(requests)

        install(client, Noting(base(client), "a"), Noting(base(client), "b"))
        with crowd(client, clean[0]) as waiting:
            for name in "abaaaba":
                waiting.ask(clean[0], defense=name)
    assert order == ["aa", "bb", "aa", "a"]


def test_what_gains_nothing_is_answered_one_by_one(fresh: TestClient, clean: list[bytes]) -> None:
    """The quick client would wait for the slow ones."""
    with crowd(fresh, clean[0]) as waiting:
        sent = [waiting.ask(file, defense=QUICK_ALL) for file in clean[:3]]
        waiting.open()
        assert [batch(answer) for answer in sent] == [(1, 1)] * 3


class Poisoned(Wrapped):
    """Fails on a white image, after it has used up some of everybody's randomness, which is in its answers."""

    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        outcomes = super().predict_together(requests)
        drawn = [float(torch.rand((), generator=request.generator)) for request in requests]
        if any(bool((request.images == 1).all()) for request in requests):
            raise RuntimeError("division by zero in /srv/secret/kernel.cu")
        shaded = []
        for outcome, share in zip(outcomes, drawn, strict=True):
            assert isinstance(outcome, Prediction)
            shaded.append(replace(outcome, scores=outcome.scores * share))
        return list(shaded)


def test_a_poisonous_request_harms_itself_only(fresh: TestClient, clean: list[bytes]) -> None:
    white = encode_png(np.full((1, 8, 8), 255, np.uint8))
    poisoned = Poisoned(base(fresh), "poisoned")
    install(fresh, poisoned)
    alone = [predictions(post(fresh, file, defense="poisoned", top_k=10)) for file in clean[:3]]
    with crowd(fresh, clean[0]) as waiting:
        sent = [waiting.ask(file, defense="poisoned", top_k=10) for file in clean[:3]]
        waiting.open()
        for answer, expected in zip(sent, alone, strict=True):
            assert_same(predictions(answer.result()), expected)
            assert batch(answer) == (3, 3), "without poison there is one run, with everybody's own randomness"
    poisoned.seen.clear()
    for place in range(4):
        files = [*clean[:place], white, *clean[place:3]]
        with crowd(fresh, clean[0]) as waiting:
            sent = [waiting.ask(file, defense="poisoned", top_k=10) for file in files]
            waiting.open()
            check_problem(sent.pop(place).result(), 500, "the server failed")
            for answer, expected in zip(sent, alone, strict=True):
                assert_same(predictions(answer.result()), expected)
                assert batch(answer) == (1, 1)
    assert poisoned.seen == 4 * [[1, 1, 1, 1], [1], [1], [1], [1]], "one retry, and no more"
    assert fresh.get("/readyz").status_code == 200


@pytest.mark.parametrize("wrong", ["one answer too few", "two swapped", "none at all"])
def test_nobody_gets_the_answer_of_another(fresh: TestClient, clean: list[bytes], wrong: str) -> None:
    class Confused(Wrapped):
        def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
            outcomes: Any = super().predict_together(requests)
            if len(requests) == 1:
                return list(outcomes)
            if wrong == "none at all":
                return [None] * len(requests)  # type: ignore[list-item]
            return list(outcomes[1:] if wrong == "one answer too few" else outcomes[::-1])

    install(fresh, Confused(base(fresh), "confused"))
    expected = [predictions(post_json(fresh, own, defense="none")) for own in (clean[:1], clean[1:3])]
    with crowd(fresh, clean[0]) as waiting:
        sent = [waiting.ask(*own, defense="confused") for own in (clean[:1], clean[1:3])]
        waiting.open()
        for answer, own in zip(sent, expected, strict=True):
            assert_same(predictions(answer.result()), own)


class Waits(Wrapped):
    """Works until the first budget ends, and says of that request that its adaptation was cut short."""

    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        outcomes = super().predict_together(requests)
        wait_until(lambda: any(request.budget.interruption() for request in requests))
        given: list[Outcome] = []
        for request, outcome in zip(requests, outcomes, strict=True):
            reason = request.budget.interruption()
            if reason is not None and isinstance(outcome, Prediction):
                cut = Adaptation(steps=3, stop_reason=reason)
                outcome = replace(outcome, adaptations=(cut,) * len(outcome.scores))
            given.append(outcome)
        return given


def test_a_deadline_in_a_batch_is_one_requests_own(fresh: TestClient, clean: list[bytes]) -> None:
    install(fresh, Waits(base(fresh), "waits"))
    alone = [predictions(post(fresh, file, defense="none", top_k=10)) for file in clean[:3]]
    with crowd(fresh, clean[0]) as waiting:
        sent = [
            waiting.ask(file, defense="waits", top_k=10, **({"deadline_ms": 1500} if number == 1 else {}))
            for number, file in enumerate(clean[:3])
        ]
        waiting.open()
        check_problem(sent[1].result(), 504, "deadline")
        for number in (0, 2):
            assert_same(predictions(sent[number].result()), alone[number])
            assert batch(sent[number]) == (3, 3)


def test_who_is_late_before_the_engine_is_free_hears_so_at_once(fresh: TestClient, clean: list[bytes]) -> None:
    with crowd(fresh, clean[0]) as waiting:
        late = waiting.ask(clean[0], defense="none", deadline_ms=200)
        sent = waiting.ask(clean[1], defense="none")
        check_problem(late.result(5), 504, "deadline")
        assert waiting.engine.waiting == 1, "it does not keep its place"
        assert not waiting.first.done()
        waiting.open()
        assert batch(sent) == (1, 1)


def test_what_an_answer_says_of_itself_and_the_metrics(fresh: TestClient, clean: list[bytes]) -> None:
    nearest = Neighborhood(
        ids=torch.tensor([0, 5]), distances=torch.tensor([0.1, 0.2]), label_counts={1: 2}, adversarial_fraction=0.5
    )

    class Undecided(Wrapped):
        def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
            (outcome,) = super().predict_together(requests)
            assert isinstance(outcome, Prediction)
            fates = (
                Adaptation(steps=4, stop_reason="converged", held_out_loss=(0.7, 0.2)),
                Adaptation(steps=5, stop_reason="patience", weights="base", held_out_loss=(0.5, math.inf)),
                Adaptation(steps=6, stop_reason="max_steps", weights="base"),
            )
            abstained = torch.tensor([False, True, True])
            return [replace(outcome, adaptations=fates, neighborhoods=(nearest,) * 3, abstained=abstained)]

    install(fresh, Undecided(base(fresh), "undecided"))
    answers = predictions(post_json(fresh, clean[:3], defense="undecided"))
    plain = predictions(post_json(fresh, clean[:3], defense="none"))
    assert [answer["abstained"] for answer in answers] == [False, True, True]
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in plain], "its best guess"
    assert [answer["abstained"] for answer in plain] == [False] * 3
    assert [answer["adaptation"]["answered_from"] for answer in answers] == ["adapted", "base", "base"]
    losses = [answer["adaptation"]["held_out_loss"] for answer in answers]
    assert losses == [{"before": 0.7, "after": 0.2}, None, None]
    metrics = read_metrics(fresh)
    assert metrics["abstained_total",] == 2
    assert metrics["adaptation_answered_from_total", "adapted"] == 1
    assert metrics["adaptation_answered_from_total", "base"] == 2
    assert metrics["batch_requests_count",] == 2
    assert metrics["batch_requests_sum",] == 2
    assert metrics["batch_images_sum",] == 6


def test_metrics_count_each_batch_once(fresh: TestClient, clean: list[bytes]) -> None:
    with crowd(fresh, clean[0]) as waiting:
        for images in (1, 2, 3):
            waiting.ask(*clean[:images], defense="none")
        assert read_metrics(fresh)["requests_waiting",] == 3
        assert read_metrics(fresh)["requests_in_flight",] == 4
    metrics = read_metrics(fresh)
    assert metrics["batch_requests_count",] == metrics["batch_images_count",] == 2
    assert metrics["batch_requests_sum",] == 4
    assert metrics["batch_images_sum",] == 7
    assert metrics["batch_requests_bucket", "2.0"] == 1
    assert metrics["requests_waiting",] == metrics["requests_in_flight",] == 0
