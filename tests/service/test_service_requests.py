"""What goes with every answer: its id in header, body and log, and nothing that a client smuggled in."""

from __future__ import annotations

import logging
import re

import pytest
from service_helpers import check_problem, post
from starlette.testclient import TestClient

HOSTILE = {
    "empty": b"",
    "too long": b"a" * 129,
    "line break": b"abc\r\nX-Injected: 1",
    "space": b"a b",
    "markup": b"<script>",
    "not ascii": "é".encode(),
    "null": b"a\x00b",
    "trailing line break": b"abc\n",
}


def test_a_plain_request_id_comes_back(client: TestClient, clean: list[bytes]) -> None:
    headers = {"Content-Type": "image/png", "X-Request-ID": "Job-7.part_2"}
    response = client.post("/v1/predict", content=clean[0], headers=headers)
    assert response.json()["id"] == response.headers["x-request-id"] == "Job-7.part_2"
    assert client.get("/v1/nowhere", headers={"X-Request-ID": "b" * 128}).json()["request_id"] == "b" * 128


def test_without_one_every_request_gets_its_own(client: TestClient, clean: list[bytes]) -> None:
    identities = {post(client, clean[0]).json()["id"] for _ in range(5)}
    assert len(identities) == 5
    assert all(re.fullmatch(r"[0-9a-f]{32}", identity) for identity in identities)
    assert client.get("/livez").headers["x-request-id"] not in identities


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_request_id_is_replaced(client: TestClient, hostile: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mithridate.access")
    response = client.get("/v1/nowhere", headers=[(b"X-Request-ID", hostile)])
    document = check_problem(response, 404)
    assert re.fullmatch(r"[0-9a-f]{32}", document["request_id"])
    assert "x-injected" not in response.headers
    (line,) = [record.getMessage() for record in caplog.records if record.name == "mithridate.access"]
    assert line.endswith(f"id={document['request_id']}")


def test_no_answer_leaves_its_type_to_be_guessed(client: TestClient, clean: list[bytes]) -> None:
    paths = ("/", "/docs", "/openapi.json", "/livez", "/readyz", "/metrics", "/v1/bundle", "/v2", "/v1/nowhere")
    for response in [*map(client.get, paths), post(client, clean[0]), post(client, b"")]:
        assert response.headers.get_list("x-content-type-options") == ["nosniff"], response.url


def test_the_access_log_has_one_line_a_request(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mithridate.access")
    client.get("/v1/%0aPOST%20/v1/predict%20200%20forged%0d")
    client.get("/livez")
    lines = [record.getMessage() for record in caplog.records if record.name == "mithridate.access"]
    assert len(lines) == 2
    assert all(re.fullmatch(r"GET \S+ (404|200) [\d.]+ms id=[0-9a-f]{32}", line) for line in lines), lines
