"""POST /v1/predict: the answer is the library's, in the documented form, however it was asked for."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from service_helpers import QUICK_ALL, post, post_json, post_multipart, predictions, save
from starlette.testclient import TestClient

from mithridate.datasets import LabelledImages
from mithridate.defenses import DEFAULT_DEFENCES, Budget, Resources, build_defence
from mithridate.types import to_images

QUICK = ("none", "rmc", QUICK_ALL, "webnn", "deepnn")
SCORED = {"label": str, "class_index": int, "confidence": float}
IMAGE = {
    **SCORED,
    "top": [SCORED],
    "undefended": SCORED,
    "suspicious": bool,
    "abstained": bool,
    "adaptation": {
        "steps": int,
        "stop_reason": str,
        "answered_from": str,
        "held_out_loss": {"before": float, "after": float},
        "neighbors": int,
        "neighbor_labels": {str: int},
        "adversarial_fraction": float,
    },
    "neighbors": None,  # a list with explain
}
PHASES = ("queue", "decode", "embed", "search", "adapt", "predict", "total")
ANSWER = {
    "id": str,
    "bundle": {"name": str, "digest": str},
    "defense": str,
    "predictions": [IMAGE],
    "batch": {"requests": int, "images": int},
    "timings_ms": dict.fromkeys(PHASES, float),
}


def check_shape(value: Any, shape: Any, at: str = "answer") -> None:
    """That ``value`` has these keys and types, no more and no fewer."""
    if shape is None:
        assert value is None, at
    elif isinstance(shape, list):
        assert isinstance(value, list), at
        assert value, at
        for number, element in enumerate(value):
            check_shape(element, shape[0], f"{at}[{number}]")
    elif isinstance(shape, dict) and str in shape:
        assert {(type(k), type(v)) for k, v in value.items()} == {(str, shape[str])}, at
    elif isinstance(shape, dict):
        assert set(value) == set(shape), at
        for key, inner in shape.items():
            check_shape(value[key], inner, f"{at}.{key}")
    else:
        assert type(value) is shape, at


def test_an_answer_is_as_documented(client: TestClient, adversarial: list[bytes]) -> None:
    response = post(client, adversarial[0], top_k=3)
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    check_shape(answer, ANSWER)
    assert answer["bundle"]["digest"].startswith("sha256:")
    assert answer["defense"] == "rmc"


@pytest.mark.parametrize("defense", QUICK)
def test_every_defence_answers_as_the_library_does(
    client: TestClient, resources: Resources, digits_test: LabelledImages, clean: list[bytes], defense: str
) -> None:
    answers = predictions(post_json(client, clean[:3], defense=defense, top_k=10))
    images = to_images(torch.from_numpy(digits_test.images[:3]))
    generator = torch.Generator().manual_seed(7)
    expected = build_defence(defense, resources).predict(images, generator=generator, budget=Budget())
    for answer, scores, base in zip(answers, expected.scores, expected.base_scores, strict=True):
        served = [0.0] * 10
        for entry in answer["top"]:
            served[entry["class_index"]] = entry["confidence"]
        np.testing.assert_allclose(served, scores, atol=1e-6)
        assert answer["undefended"]["confidence"] == pytest.approx(float(base.max()), abs=1e-6)


@pytest.mark.parametrize("defense", DEFAULT_DEFENCES)
def test_every_offered_defence_answers_under_its_name(client: TestClient, clean: list[bytes], defense: str) -> None:
    offered = [entry["name"] for entry in client.get("/v1/defenses").json()["defenses"]]
    assert set(offered) == {*DEFAULT_DEFENCES, QUICK_ALL}
    response = post(client, clean[0], defense=defense)
    assert response.json()["defense"] == defense
    (answer,) = predictions(response)
    assert answer["label"] == "4", "the first test digit is a four, and easy"


def test_a_defence_can_be_written_in_any_way_that_means_it(client: TestClient, clean: list[bytes]) -> None:
    response = post(client, clean[0], defense="rmc:scope=head,neighbors=256")
    assert response.json()["defense"] == "rmc"
    assert predictions(response) == predictions(post(client, clean[0]))


@pytest.mark.parametrize("media_type", ["image/png", "application/octet-stream", "IMAGE/PNG; charset=utf-8"])
def test_three_forms_of_one_image(client: TestClient, adversarial: list[bytes], media_type: str) -> None:
    raw = predictions(post(client, adversarial[1], media_type=media_type, top_k=10, explain=True))
    assert raw == predictions(post_multipart(client, adversarial[1:2], top_k=10, explain=True))
    assert raw == predictions(post_json(client, adversarial[1:2], top_k=10, explain=True))


def test_several_images_in_the_order_sent(client: TestClient, clean: list[bytes], adversarial: list[bytes]) -> None:
    files = [*clean[:4], *adversarial[:3]]
    several = predictions(post_json(client, files))
    assert several == predictions(post_multipart(client, files))
    alone = [predictions(post(client, file))[0]["class_index"] for file in files]
    assert [answer["class_index"] for answer in several] == alone
    assert len(set(alone)) > 2, "all alike would not show the order"


@pytest.mark.parametrize("options", [{"defense": "webnn"}, {"top_k": 4}, {"explain": True}, {"deadline_ms": 20_000.5}])
def test_options_mean_the_same_in_query_and_json(
    client: TestClient, adversarial: list[bytes], options: dict[str, Any]
) -> None:
    query, fields = post(client, adversarial[2], **options), post_json(client, adversarial[2:3], **options)
    assert predictions(query) == predictions(fields)
    assert query.json()["defense"] == fields.json()["defense"] == options.get("defense", "rmc")
    assert (predictions(query) == predictions(post(client, adversarial[2]))) is ("deadline_ms" in options)


@pytest.mark.parametrize("defense", QUICK)
def test_undefended_is_what_none_answers(
    client: TestClient, clean: list[bytes], adversarial: list[bytes], defense: str
) -> None:
    suspicious = []
    for file in (clean[3], *adversarial[:4]):
        (plain,) = predictions(post(client, file, defense="none"))
        (defended,) = predictions(post(client, file, defense=defense))
        assert defended["undefended"]["class_index"] == plain["class_index"]
        assert defended["undefended"]["confidence"] == pytest.approx(plain["confidence"], abs=1e-6)
        assert defended["suspicious"] is (defended["class_index"] != defended["undefended"]["class_index"])
        suspicious.append(defended["suspicious"])
    assert any(suspicious) or defense not in ("rmc", "webnn"), "what defends these digits must differ on some"
    assert not any(suspicious) or defense != "none"


def test_a_defence_recovers_what_the_base_model_lost(
    client: TestClient, digits_test: LabelledImages, clean: list[bytes], adversarial: list[bytes]
) -> None:
    def right(files: list[bytes], defense: str) -> int:
        answers = predictions(post_json(client, files, defense=defense))
        return sum(a["class_index"] == label for a, label in zip(answers, digits_test.labels.tolist(), strict=False))

    assert right(clean, "none") >= 36
    assert right(clean, "rmc") >= 34
    assert right(adversarial, "none") <= 8
    assert right(adversarial, "rmc") >= right(adversarial, "none") + 16


@pytest.mark.parametrize("defense", ["none", "webnn", "deepnn"])
def test_no_adaptation_where_nothing_adapts(client: TestClient, clean: list[bytes], defense: str) -> None:
    response = post(client, clean[0], defense=defense)
    assert predictions(response)[0]["adaptation"] is None
    assert response.json()["timings_ms"]["adapt"] == 0


@pytest.mark.parametrize(("defense", "neighbors"), [("rmc", 256), (QUICK_ALL, 48)])
def test_adaptation_adds_up(client: TestClient, adversarial: list[bytes], defense: str, neighbors: int) -> None:
    response = post(client, adversarial[0], defense=defense)
    adaptation = predictions(response)[0]["adaptation"]
    assert adaptation["neighbors"] == neighbors == sum(adaptation["neighbor_labels"].values())
    assert adaptation["steps"] > 0
    assert adaptation["stop_reason"] in ("converged", "patience", "max_steps")
    assert 0 < adaptation["adversarial_fraction"] <= 1
    assert all(a >= b for a, b in pairwise(adaptation["neighbor_labels"].values()))
    assert response.json()["timings_ms"]["adapt"] > 0


def test_timings_are_there_and_no_phase_is_counted_twice(client: TestClient, clean: list[bytes]) -> None:
    timings = post(client, clean[0]).json()["timings_ms"]
    assert set(timings) == set(PHASES)
    assert min(timings.values()) >= 0
    assert sum(timings.values()) - timings["total"] <= timings["total"]


def test_top_k(client: TestClient, adversarial: list[bytes]) -> None:
    (everything,) = predictions(post(client, adversarial[3], top_k=1000))
    assert sorted(entry["class_index"] for entry in everything["top"]) == list(range(10))
    assert sum(entry["confidence"] for entry in everything["top"]) == pytest.approx(1, abs=1e-5)
    assert all(a["confidence"] >= b["confidence"] for a, b in pairwise(everything["top"]))
    assert everything["top"][0] == {key: everything[key] for key in SCORED}
    (three,) = predictions(post(client, adversarial[3], top_k=3))
    assert three["top"] == everything["top"][:3]
    assert len(predictions(post(client, adversarial[3]))[0]["top"]) == 1


def test_explain_lists_the_neighbours_that_adaptation_used(
    client: TestClient, adversarial: list[bytes], digits_train: LabelledImages
) -> None:
    (answer,) = predictions(post(client, adversarial[0], explain=True))
    check_shape(answer["neighbors"], [{"exemplar": int, "source": int, "copy": str, "label": str, "distance": float}])
    neighbors, adaptation = answer["neighbors"], answer["adaptation"]
    assert len({entry["exemplar"] for entry in neighbors}) == len(neighbors) == adaptation["neighbors"]
    assert all(a["distance"] <= b["distance"] for a, b in pairwise(neighbors))
    labels = [entry["label"] for entry in neighbors]
    assert {label: labels.count(label) for label in set(labels)} == adaptation["neighbor_labels"]
    attacked = sum(entry["copy"] == "pgd10" for entry in neighbors)
    assert attacked / len(neighbors) == adaptation["adversarial_fraction"]
    for entry in neighbors:
        assert entry["copy"] in ("clean", "pgd10")
        assert entry["label"] == digits_train.classes[digits_train.labels[entry["source"]]]
    (plain,) = predictions(post(client, adversarial[0]))
    assert plain == {**answer, "neighbors": None}
    assert predictions(post(client, adversarial[0], explain=True, defense="none"))[0]["neighbors"] is None


def test_one_digit_in_every_format_we_take(client: TestClient, clean: list[bytes]) -> None:
    grey = Image.open(io.BytesIO(clean[5]))
    assert grey.mode == "L"
    expected = predictions(post(client, clean[5], top_k=10))
    lossless = {
        "grey webp": save(grey, "WEBP", lossless=True),
        "colour png": save(grey.convert("RGB"), "PNG"),
        "colour webp": save(grey.convert("RGB"), "WEBP", lossless=True),
        "opaque rgba png": save(grey.convert("RGBA"), "PNG"),
    }
    for name, file in lossless.items():
        assert predictions(post(client, file, top_k=10)) == expected, name
    for mode in ("L", "RGB"):
        (answer,) = predictions(post(client, save(grey.convert(mode), "JPEG", quality=95), media_type="image/jpeg"))
        assert answer["label"] == expected[0]["label"]


def test_the_declared_type_is_not_believed(client: TestClient, clean: list[bytes]) -> None:
    expected = predictions(post(client, clean[0]))
    assert predictions(post(client, clean[0], media_type="image/jpeg")) == expected
    assert predictions(post(client, clean[0], media_type="image/webp")) == expected
