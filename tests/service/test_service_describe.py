"""What the service says of itself: what it serves, what it counts, and a schema that a client can be written from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from service_helpers import SLOW, Serving, check_problem, post, post_json, predictions
from starlette.testclient import TestClient

from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import DEFAULT_DEFENCES

PREFIX = "mithridate_"


def read_metrics(client: TestClient) -> dict[tuple[str, ...], float]:
    """Samples by name and label values, in the order of the labels' names; what cannot be parsed raises."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    samples = [sample for family in families for sample in family.samples]
    return {
        (sample.name.removeprefix(PREFIX), *(value for _, value in sorted(sample.labels.items()))): sample.value
        for sample in samples
        if sample.name.startswith(PREFIX)
    }


def test_metrics_count_what_happened(serving: Serving, clean: list[bytes], adversarial: list[bytes]) -> None:
    with serving(offer=(*DEFAULT_DEFENCES, SLOW), max_images=8) as client:
        before = read_metrics(client)
        assert before["ready",] == 1
        assert before["requests_in_flight",] == 0
        assert not any(name[0] == "requests_total" for name in before)
        answered = [
            *predictions(post(client, clean[0])),
            *predictions(post_json(client, adversarial[:5])),
            *predictions(post(client, clean[1], defense="rmc:scope=head")),
        ]
        plain = predictions(post(client, clean[0], defense="none"))
        post(client, b"GIF89a")
        post(client, b"")
        post(client, clean[0], defense="rmc:neighbors=3")
        post(client, clean[0], defense=SLOW, deadline_ms=100)
        post_json(client, clean[:9])
        after = read_metrics(client)
    assert after["requests_total", "rmc", "ok"] == 3
    assert after["requests_total", "none", "ok"] == 1
    assert after["requests_total", "rmc", "415"] == 1
    assert after["requests_total", "unknown", "400"] == 1
    assert after["requests_total", "unknown", "422"] == 1
    assert after["requests_total", "unknown", "413"] == 1
    assert after["requests_total", SLOW, "504"] == 1
    assert sum(value for name, value in after.items() if name[0] == "requests_total") == 9
    assert after["images_total", "rmc"] == len(answered) == 7
    assert after["images_total", "none"] == len(plain) == 1
    assert after["suspicious_total",] == sum(answer["suspicious"] for answer in answered) > 0
    adaptations = [answer["adaptation"] for answer in answered]
    assert after["adaptation_steps_count",] == 7
    assert after["adaptation_steps_sum",] == sum(adaptation["steps"] for adaptation in adaptations)
    for reason in {adaptation["stop_reason"] for adaptation in adaptations}:
        assert after["adaptation_stops_total", reason] == sum(a["stop_reason"] == reason for a in adaptations)
    for phase in ("queue", "decode", "embed", "search", "adapt", "predict", "total"):
        assert after["phase_seconds_count", phase] == 4
        assert 0 <= after["phase_seconds_sum", phase] <= after["phase_seconds_sum", "total"]
    assert after["requests_in_flight",] == 0


def test_a_failure_of_ours_is_counted_too(serving: Serving, clean: list[bytes]) -> None:
    class Broken:
        name = "broken"

        def predict_together(self, requests: Any) -> Any:
            raise RuntimeError("no memory")

    with serving() as client:
        app: Any = client.app
        app.state.service.engine.loaded.defences["broken"] = Broken()
        assert post(client, clean[0], defense="broken").status_code == 500
        metrics = read_metrics(client)
    assert metrics["requests_total", "broken", "500"] == 1
    assert metrics["requests_in_flight",] == 0


def test_no_client_can_make_metrics_grow(serving: Serving, clean: list[bytes]) -> None:
    with serving() as client:
        post(client, clean[0], defense="rmc:neighbors=3")
        before = set(read_metrics(client))
        for number in range(4, 12):
            post(client, clean[0], defense=f"rmc:neighbors={number}")
            client.get(f"/v1/{number}")
        assert set(read_metrics(client)) == before


def test_two_services_in_a_process_count_apart(serving: Serving, clean: list[bytes]) -> None:
    with serving() as one, serving() as other:
        post(one, clean[0])
        assert ("images_total", "rmc") in read_metrics(one)
        assert ("images_total", "rmc") not in read_metrics(other)


def test_bundle(client: TestClient, clean: list[bytes], digits_bundle: Path, digits_train: LabelledImages) -> None:
    bundle = Bundle.open(digits_bundle)
    described = client.get("/v1/bundle").json()
    copies = described.pop("copies")
    assert described == {
        "name": "digits-small-cnn",
        "digest": bundle.digest,
        "dataset": "digits[train]",
        "classes": list(digits_train.classes),
        "image_shape": [1, 8, 8],
        "resize": "exact",
        "arch": "small-cnn",
        "exemplars": 2 * len(digits_train),
        "index": bundle.manifest.index,
        "prm": [],
    }
    assert [(copy["name"], copy["epsilon"]) for copy in copies] == [("clean", None), ("pgd10", "32/255")]
    assert copies[0]["base_accuracy"] > 0.9 > 0.5 > copies[1]["base_accuracy"]
    assert post(client, clean[0]).json()["bundle"] == {"name": described["name"], "digest": described["digest"]}
    assert str(digits_bundle) not in json.dumps(client.get("/v1/bundle").json())


def test_defences(serving: Serving, clean: list[bytes]) -> None:
    with serving(defense="webnn:neighbors=16", offer=["none", "rmc:scope=head", "none", "deepnn"]) as client:
        described = client.get("/v1/defenses").json()
        assert described["default"] == "webnn:neighbors=16"
        assert [entry["name"] for entry in described["defenses"]] == ["webnn:neighbors=16", "none", "rmc", "deepnn"]
        assert all(entry["description"] for entry in described["defenses"])
        assert post(client, clean[0]).json()["defense"] == "webnn:neighbors=16"
        for entry in described["defenses"]:
            assert post(client, clean[0], defense=entry["name"]).json()["defense"] == entry["name"]


def test_random_defences_are_served_with_what_they_cost(serving: Serving, clean: list[bytes]) -> None:
    random = ["sap:passes=40", "region:passes=60", "randomization:fill=0.0", "pixel-deflection:sigma=0.01"]
    with serving(offer=["none", "rmc:scope=all,epochs=1,neighbors=16", *random]) as client:
        entries = client.get("/v1/defenses").json()["defenses"]
        costs = {entry["name"]: entry["cost"] for entry in entries}
        assert set(random) <= set(costs)
        assert [name for name, cost in costs.items() if cost is None] == [n for n in costs if "scope=all" in n]
        assert 0.2 < costs["none"] < 5  # its own time twice, on a busy machine
        assert costs["sap:passes=40"] > 2 * costs["none"]
        for name in random:
            first, second = (predictions(post(client, clean[0], defense=name, top_k=10)) for _ in range(2))
            assert len(first[0]["top"]) == 10
            assert first[0]["adaptation"] is None
            assert first == second  # the service was given a seed
            beside = predictions(post_json(client, [*clean[1:4], clean[0]], defense=name, top_k=10))[3]
            alone, among = (
                {entry["label"]: entry["confidence"] for entry in answer["top"]} for answer in (first[0], beside)
            )
            assert among == pytest.approx(alone, abs=1e-4)
    with serving(offer=random, seed=None) as client:
        answers = [predictions(post(client, clean[0], defense=random[0], top_k=10)) for _ in range(3)]
        assert answers[0] != answers[1] != answers[2]


def test_the_schema_names_bodies_answers_and_errors(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    operation = schema["paths"]["/v1/predict"]["post"]
    content = operation["requestBody"]["content"]
    assert set(content) == {
        *("image/png", "image/jpeg", "image/webp", "application/octet-stream"),
        "multipart/form-data",
        "application/json",
    }
    assert content["multipart/form-data"]["schema"]["required"] == ["images"]
    fields = content["application/json"]["schema"]["properties"]
    parameters = {parameter["name"] for parameter in operation["parameters"]}
    assert parameters == {"defense", "top_k", "explain", "deadline_ms"} == set(fields) - {"images"}
    for status in ("400", "413", "415", "422", "429", "503", "504"):
        (media_type,) = operation["responses"][status]["content"]
        assert media_type == "application/problem+json"
        problem = operation["responses"][status]["content"][media_type]["schema"]
        assert set(problem["required"]) == {"type", "title", "status", "detail", "instance", "request_id"}
    assert "200" in operation["responses"]
    assert {"/livez", "/readyz", "/metrics", "/v1/bundle", "/v1/defenses"} <= set(schema["paths"])


def test_the_answer_has_the_form_that_the_schema_gives(client: TestClient, adversarial: list[bytes]) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    answer = post(client, adversarial[0], explain=True).json()
    assert set(schemas["PredictResponse"]["properties"]) == set(answer)
    assert set(schemas["ImagePrediction"]["properties"]) == set(answer["predictions"][0])
    assert set(schemas["Neighbor"]["properties"]) == set(answer["predictions"][0]["neighbors"][0])
    assert set(schemas["Timings"]["properties"]) == set(answer["timings_ms"])


def test_docs_can_be_hidden(client: TestClient, serving: Serving, clean: list[bytes]) -> None:
    page = client.get("/docs")
    assert "Mithridate" in page.text
    assert "'unsafe-inline'" not in page.headers["content-security-policy"].split("style-src")[0]
    assert client.get("/docs/swagger-ui.css").headers["content-type"].startswith("text/css")
    check_problem(client.get("/docs/other.css"), 404, "no such file")
    check_problem(client.get("/docs/redoc.standalone.js"), 404, "no such file")
    with serving(docs=False) as hidden:
        for path in ("/docs", "/docs/swagger-ui.css", "/openapi.json", "/redoc"):
            assert hidden.get(path).status_code == 404
        assert predictions(post(hidden, clean[0]))
