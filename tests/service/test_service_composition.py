"""Every stage and every composition of PRM, RMC and SAP over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from service_helpers import Serving, check_problem, post, post_json, predictions
from starlette.testclient import TestClient

COMPOSED = ["prm+rmc", "prm+sap", "rmc+sap", "prm+rmc+sap"]
RANDOM = ["prm", "sap", "randomization", "region", "pixel-deflection", *COMPOSED]


@pytest.fixture(scope="module")
def everything(serving: Serving, manipulated_bundle: Path) -> Iterator[TestClient]:
    """A service with secret seeds that offers all there is."""
    with serving(bundle=manipulated_bundle, offer=("all",), seed=None) as client:
        yield client


def test_all_are_offered_with_what_they_cost(everything: TestClient) -> None:
    listed = {entry["name"]: entry for entry in everything.get("/v1/defenses").json()["defenses"]}
    assert set(listed) == {"none", "rmc", "webnn", "deepnn", "tta", *RANDOM}
    assert all(entry["description"] for entry in listed.values())
    costs = {name: entry["cost"] for name, entry in listed.items()}
    assert all(cost is not None and cost > 0 for cost in costs.values())
    assert costs["sap"] > costs["rmc"]
    assert costs["prm+rmc+sap"] > costs["prm"]


def test_the_bundle_says_which_prms_it_has(everything: TestClient) -> None:
    assert everything.get("/v1/bundle").json()["prm"] == ["v0"]


@pytest.mark.parametrize("defense", RANDOM)
def test_every_one_answers_under_its_name(everything: TestClient, clean: list[bytes], defense: str) -> None:
    answer = post_json(everything, clean[:2], defense=defense, top_k=10)
    found = predictions(answer)
    assert answer.json()["defense"] == defense
    for image in found:
        assert abs(sum(entry["confidence"] for entry in image["top"]) - 1) < 1e-4
        assert (image["adaptation"] is not None) == ("rmc" in defense)


def test_a_plus_in_a_url_may_be_written_as_it_is(everything: TestClient, clean: list[bytes]) -> None:
    for query in ("prm+rmc+sap", "prm%2Brmc%2Bsap", "prm%20rmc%20sap"):
        response = everything.post(
            f"/v1/predict?defense={query}", content=clean[0], headers={"Content-Type": "image/png"}
        )
        assert predictions(response)
        assert response.json()["defense"] == "prm+rmc+sap"


@pytest.mark.parametrize("defense", RANDOM)
def test_unseeded_calls_differ(everything: TestClient, clean: list[bytes], defense: str) -> None:
    """In which sizes and votes are drawn few results are possible: several images are asked for, twice each."""
    first, second = (
        [image["top"] for image in predictions(post_json(everything, clean[:12], defense=defense, top_k=10))]
        for _ in range(2)
    )
    assert first != second


@pytest.fixture(scope="module")
def seeded(serving: Serving, manipulated_bundle: Path) -> Iterator[TestClient]:
    """A service with one seed for all."""
    with serving(bundle=manipulated_bundle, offer=("none", *RANDOM)) as client:
        yield client


@pytest.mark.parametrize("defense", RANDOM)
def test_seeded_calls_repeat_exactly_and_beside_others_too(
    seeded: TestClient, clean: list[bytes], defense: str
) -> None:
    first, again = (predictions(post(seeded, clean[0], defense=defense, top_k=10)) for _ in range(2))
    assert first == again
    with ThreadPoolExecutor(7) as pool:
        others = [pool.submit(post_json, seeded, clean[3 + n : 6 + n], defense=defense) for n in range(6)]
        beside = [pool.submit(post, seeded, clean[0], defense=defense, top_k=10) for _ in range(3)]
        assert all(other.result().status_code == 200 for other in others)
        for answer in beside:
            assert _scores(predictions(answer.result())) == pytest.approx(_scores(first), abs=1e-4)


def test_requests_for_one_pass_are_answered_in_one_run(seeded: TestClient, clean: list[bytes]) -> None:
    """And nobody's draws are anybody else's: each answer is the one that its image gets alone."""
    alone = [_scores(predictions(post(seeded, clean[n], defense="prm+rmc", top_k=10))) for n in range(12)]
    with ThreadPoolExecutor(12) as pool:
        busy = pool.submit(post_json, seeded, clean, defense="sap")  # while it runs, the others gather
        answers = list(pool.map(lambda n: post(seeded, clean[n], defense="prm+rmc", top_k=10), range(12)))
        busy.result()
    assert max(answer.json()["batch"]["requests"] for answer in answers) > 1
    for answer, wanted in zip(answers, alone, strict=True):
        assert _scores(predictions(answer)) == pytest.approx(wanted, abs=1e-4)


def _scores(found: object) -> list[float]:
    assert isinstance(found, list)
    return [entry["confidence"] for image in found for entry in sorted(image["top"], key=lambda e: e["class_index"])]


@pytest.mark.parametrize(
    ("defense", "part"),
    [
        ("sap+rmc", "is not in order, or has two stages of a kind: sap (average), rmc (adapt)"),
        ("prm+prm", "two stages of a kind"),
        ("webnn+sap", "webnn stands alone"),
        ("prm:passes=4+sap", "passes=4 cannot be followed by another stage"),
        ("prm+rmd", "unknown defence 'prm+rmd' (did you mean 'prm+rmc'?)"),
        ("prm:lambda=3+rmc", "lambda=3.0 is out of range; allowed: 0 to 1"),
        ("prm:module=4+rmc", "is not offered here; allowed: "),
        ("rmc+region", "is not offered here; allowed: "),
    ],
)
def test_nonsense_is_422(everything: TestClient, clean: list[bytes], defense: str, part: str) -> None:
    check_problem(post(everything, clean[0], defense=defense), 422, part)


def test_what_a_bundle_has_is_offered_without_being_told(
    serving: Serving, manipulated_bundle: Path, clean: list[bytes]
) -> None:
    with serving(bundle=manipulated_bundle) as client:
        offered = [entry["name"] for entry in client.get("/v1/defenses").json()["defenses"]]
        assert offered == ["rmc", "none", "webnn", "deepnn", "prm", "prm+rmc"]
        assert predictions(post(client, clean[0], defense="prm+rmc"))


def test_a_deadline_between_passes_is_504(everything: TestClient, clean: list[bytes]) -> None:
    many = post_json(everything, clean[:40], defense="prm+rmc+sap", deadline_ms=1)
    assert many.status_code == 504
    assert predictions(post(everything, clean[0], defense="prm+rmc+sap"))
