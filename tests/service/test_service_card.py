"""The verdict of an evaluation: served to whoever asks, and told to whoever starts the service."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation_helpers import synthetic
from service_helpers import Serving, check_problem
from starlette.testclient import TestClient

from mithridate.bundle import Bundle
from mithridate.evaluation.card import Card, make_card, write_card
from mithridate.evaluation.findings import Evaluation


@pytest.fixture
def evaluated(digits_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with a card, in which ``none`` is the base and ``rmc:scope=tail`` harms."""
    bundle = tmp_path / "bundle"
    shutil.copytree(digits_bundle, bundle)
    write_card(bundle, make_card(evaluation_of(bundle)))
    return bundle


def evaluation_of(bundle: Path) -> Evaluation:
    return synthetic(bundle={"digest": Bundle.open(bundle, verify=False).digest})


def test_the_card_is_served_without_the_operators_paths(serving: Serving, evaluated: Path) -> None:
    with serving(bundle=evaluated, offer=["none"], defense="none") as client:
        answer = client.get("/v1/card")
    card = make_card(evaluation_of(evaluated))
    assert answer.status_code == 200
    assert Card.model_validate_json(answer.content) == card.model_copy(update={"command": None})
    assert answer.json()["defenses"][2]["ruling"] == "harmful"


def test_no_card_is_a_404(client: TestClient) -> None:
    check_problem(client.get("/v1/card"), 404, "was not evaluated")


def test_the_schema_names_the_card_and_its_errors(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    responses = schema["paths"]["/v1/card"]["get"]["responses"]
    assert responses["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/Card")
    for status in ("404", "503"):
        assert list(responses[status]["content"]) == ["application/problem+json"]
    assert "404" not in schema["paths"]["/v1/predict"]["post"]["responses"]


def start_lines(caplog: pytest.LogCaptureFixture, serving: Serving, **flags: object) -> list[logging.LogRecord]:
    with caplog.at_level(logging.INFO, logger="mithridate.service"), serving(**flags):
        pass
    return [record for record in caplog.records if "evaluated" in record.message or "card" in record.message]


def test_a_harmful_default_is_said_once_at_the_start(
    serving: Serving, evaluated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = evaluation_of(evaluated)
    harmful = next(entry for entry in evaluation.defences if entry.ruling == "harmful")
    changed = replace(evaluation, defences=(evaluation.base, replace(harmful, name="rmc")))
    write_card(evaluated, make_card(changed))
    (line,) = start_lines(caplog, serving, bundle=evaluated, offer=["none", "rmc"], defense="rmc")
    assert line.levelno == logging.WARNING
    assert "Harmful on this base" in line.message


def test_a_default_that_harms_nobody_is_not_spoken_of(
    serving: Serving, evaluated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert start_lines(caplog, serving, bundle=evaluated, offer=["none", "rmc"], defense="none") == []


def test_a_bundle_that_nobody_measured_is_a_gentle_line(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    (line,) = start_lines(caplog, serving, offer=["none"], defense="none")
    assert line.levelno == logging.INFO
    assert "not evaluated" in line.message
