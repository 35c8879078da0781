"""Every request starts from the same base weights: nobody's answer depends on who else was, is or goes wrong there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from service_helpers import QUICK_ALL, SLOW, Serving, assert_same, check_problem, post, post_json, predictions
from starlette.testclient import TestClient

from mithridate.defenses import Budget, Outcome, Prediction, Request
from mithridate.types import Images, Logits

DEFENCES = ("none", "rmc", QUICK_ALL, "webnn", "deepnn")
Answers = dict[tuple[str, int], list[dict[str, Any]]]


class Broken:
    """A defence that fails half way: after it has drawn its randomness and run the network."""

    name = "broken"

    def __init__(self, network: torch.nn.Module) -> None:
        self._network = network

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        raise NotImplementedError

    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        for request in requests:
            torch.rand(3, generator=request.generator)
            self._network(request.images)
        raise RuntimeError("out of memory at /srv/secret/weights.py")

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        raise NotImplementedError


@pytest.fixture(scope="module")
def probes(clean: list[bytes], adversarial: list[bytes]) -> list[bytes]:
    return [*clean[10:12], *adversarial[10:12]]


@pytest.fixture(scope="module")
def alone(serving: Serving, probes: list[bytes]) -> Answers:
    """What every defence says of every probe, each asked of a service that has never answered anything else."""
    found = {}
    for defense in DEFENCES:
        for number, probe in enumerate(probes):
            with serving(offer=[defense]) as fresh:
                found[defense, number] = ask(fresh, probe, defense)
    return found


@pytest.fixture
def shared(serving: Serving) -> Iterator[TestClient]:
    with serving(offer=(*DEFENCES, SLOW)) as client:
        yield client


def ask(client: TestClient, file: bytes, defense: str) -> list[dict[str, Any]]:
    return predictions(post(client, file, defense=defense, top_k=10, explain=True))


def ask_all(client: TestClient, probes: list[bytes]) -> Answers:
    return {
        (defense, number): ask(client, probe, defense) for defense in DEFENCES for number, probe in enumerate(probes)
    }


def scores(answer: dict[str, Any]) -> np.ndarray[Any, Any]:
    ranked = sorted(answer["top"], key=lambda entry: entry["class_index"])
    return np.array([entry["confidence"] for entry in ranked])


def test_fine_tuning_really_happens_here(alone: Answers) -> None:
    """Else the others would hold for nothing."""
    for defense in ("rmc", QUICK_ALL):
        moved = [abs(a["confidence"] - a["undefended"]["confidence"]) for n in range(4) for a in alone[defense, n]]
        assert max(moved) > 1e-3, defense


def test_the_first_request_is_like_any_other(shared: TestClient, probes: list[bytes], alone: Answers) -> None:
    assert ask_all(shared, probes) == alone
    assert ask_all(shared, probes[::-1])["rmc", 0] == alone["rmc", 3]


def test_the_same_after_fifty_other_requests(
    shared: TestClient, clean: list[bytes], adversarial: list[bytes], probes: list[bytes], alone: Answers
) -> None:
    for number in range(50):
        other = (clean if number % 2 else adversarial)[number % 40]
        assert post(shared, other, defense=DEFENCES[number % 5 and 1 + number % 4]).status_code == 200
    assert ask_all(shared, probes) == alone


@pytest.mark.parametrize("defense", DEFENCES)
def test_the_same_among_other_images(
    client: TestClient,
    clean: list[bytes],
    adversarial: list[bytes],
    probes: list[bytes],
    alone: Answers,
    defense: str,
) -> None:
    crowd = [*adversarial[:3], *clean[:2]]
    for place in (0, 2, 5):
        files = [*crowd[:place], *probes, *crowd[place:]]
        answers = predictions(post_json(client, files, defense=defense, top_k=10))
        for number in range(len(probes)):
            served, expected = answers[place + number], alone[defense, number][0]
            assert np.abs(scores(served) - scores(expected)).max() <= 1e-4
            assert served["class_index"] == expected["class_index"]
        assert answers == predictions(post_json(client, files, defense=defense, top_k=10)), "same request, same answer"


@pytest.mark.parametrize("defense", DEFENCES)
def test_an_image_sent_twice_is_answered_twice_alike(client: TestClient, probes: list[bytes], defense: str) -> None:
    first, second = predictions(post_json(client, [probes[2], probes[2]], defense=defense, top_k=10))
    assert np.abs(scores(first) - scores(second)).max() <= 1e-4


def test_the_same_beside_seven_other_clients(
    shared: TestClient, clean: list[bytes], adversarial: list[bytes], probes: list[bytes], alone: Answers
) -> None:
    def one(number: int) -> None:
        defense = DEFENCES[number % 5]
        if number % 2:
            assert post(shared, [*clean, *adversarial][number], defense=defense).status_code == 200
        else:
            # Not ==: they may be answered together with others, and another batch size rounds otherwise.
            assert_same(ask(shared, probes[number % 4], defense), alone[defense, number % 4])

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(one, range(80)))


def test_the_same_after_errors_of_every_kind(shared: TestClient, probes: list[bytes], alone: Answers) -> None:
    app: Any = shared.app
    loaded = app.state.service.engine.loaded
    loaded.defences["broken"] = Broken(loaded.resources.classifier)
    for _ in range(3):
        check_problem(post(shared, b"not an image"), 415)
        check_problem(post(shared, probes[0][:-9], defense=QUICK_ALL), 400)
        check_problem(post(shared, probes[0], defense="broken"), 500, "the server failed")
        check_problem(post(shared, probes[2], defense=QUICK_ALL, deadline_ms=0.01), 504, "deadline")
        check_problem(post(shared, probes[2], defense=SLOW, deadline_ms=250), 504, "deadline")
    assert ask_all(shared, probes) == alone


def test_without_a_fixed_seed_every_request_draws_its_own(serving: Serving, probes: list[bytes]) -> None:
    """An attacker must not be able to rehearse the randomness that a request will get."""
    with serving(offer=DEFENCES, seed=None) as client:
        drawn = {ask(client, probes[2], QUICK_ALL)[0]["confidence"] for _ in range(6)}
        assert len(drawn) > 1
        assert len({ask(client, probes[2], "rmc")[0]["confidence"] for _ in range(6)}) == 1, "nothing random in it"
