"""What OpenAPI promises: every status that is answered, every error in its form, examples that are true."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.routing import APIRoute
from PIL import Image
from pydantic import TypeAdapter
from service_helpers import ROOT, check_problem, post, predictions, save, wait_ready, wait_until
from starlette.testclient import TestClient

from service.app import create_app
from service.connections import connection_options
from service.examples import DIGIT
from service.oip_schemas import InferResponse
from service.settings import load_settings


@contextmanager
def listening(bundle: Path, **flags: Any) -> Iterator[str]:
    """The address of a service in a thread of this process, held to its limits of connections too."""
    settings = load_settings(bundle=bundle, seed=7, **flags)
    # As the service's own: without the protocol's name each of a thousand answers would wait 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(settings), log_config=None, **connection_options(settings))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx2.Client(base_url=url) as client:
            wait_ready(client)
        yield url
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_no_answer_is_undeclared_and_none_is_500(digits_bundle: Path, tmp_path: Path) -> None:
    """All checks of schemathesis: status, content type, headers and schema of every answer, what must be refused."""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(here)]),
        "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
        "PYTHONWARNINGS": "default",
    }
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(here / "schemathesis.toml")]
    run = ["run", "-c", "all", "--phases", "examples,coverage,fuzzing", "--max-examples", "3", "--seed", "1"]
    with listening(digits_bundle, threads=1, lab=True, bundle_root=digits_bundle.parent) as url:
        done = subprocess.run(
            [*command, *run, f"{url}/openapi.json"],
            env=environment,
            cwd=tmp_path,  # it keeps what it finds
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Tested: 20" in done.stdout, done.stdout[-3000:]


@pytest.fixture(scope="module")
def operation(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]
    return found


@pytest.fixture(scope="module")
def whole(digits_bundle: Path) -> FastAPI:
    """An application with every route that there can be; it is not started."""
    return create_app(load_settings(bundle=digits_bundle, lab=True))


def operations(app: FastAPI) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(path, method, operation) of everything that the document has."""
    for path, methods in app.openapi()["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_every_body_form_has_an_example(whole: FastAPI) -> None:
    with_body = []
    for path, method, operation in operations(whole):
        for media_type, body in operation.get("requestBody", {"content": {}})["content"].items():
            assert body.get("examples") or body.get("example"), (path, media_type)
            with_body.append((path, media_type))
        assert method == "get" or "requestBody" in operation or path == "/admin/bundle/rollback"
    files = {"image/png", "image/jpeg", "image/webp", "application/octet-stream", "multipart/form-data"}
    assert {media_type for path, media_type in with_body if path == "/v1/lab/attack"} == files
    assert {media_type for path, media_type in with_body if path == "/v1/predict"} == files | {"application/json"}


def test_every_error_has_an_example_in_its_form(whole: FastAPI, operation: dict[str, Any]) -> None:
    assert set(operation["responses"]) == {
        *("200", "400", "401", "403", "405", "408", "413", "415", "422", "429", "431", "500", "503", "504"),
    }  # fmt: skip
    for path, _, described in operations(whole):
        for status, response in described["responses"].items():
            if status == "200":
                continue
            if path.startswith("/v2"):
                assert set(response["content"]["application/json"]["example"]) == {"error"}, (path, status)
                assert status not in ("415", "422"), "there it is 400"
                continue
            example = response["content"]["application/problem+json"]["example"]
            assert (example["status"], example["instance"]) == (int(status), path)
    assert "ValidationError" not in json.dumps(whole.openapi()), "the framework's own form is never sent"


def test_every_answer_has_an_example_that_is_one(whole: FastAPI) -> None:
    kinds: dict[str, Any] = {
        route.path_format: route.response_model for route in whole.routes if isinstance(route, APIRoute)
    }
    for path, _, described in operations(whole):
        for media_type, content in described["responses"]["200"]["content"].items():
            assert content.get("example") or content.get("examples"), (path, media_type)
            if media_type == "application/json":
                kind = TypeAdapter(InferResponse if path.endswith("/infer") else kinds[path])
                sent = kind.dump_python(
                    kind.validate_json(json.dumps(content["example"])),
                    mode="json",
                    by_alias=True,
                    exclude_none=path.endswith("/infer"),  # a tensor has data, or its length
                )
                assert sent == content["example"], path


def test_the_examples_say_what_the_service_says(client: TestClient, whole: FastAPI) -> None:
    """Of what is the same for every digits bundle."""
    said = {path: content["responses"]["200"]["content"] for path, _, content in operations(whole)}
    for path in ("/livez", "/readyz", "/v2", "/v2/health/live", "/v2/health/ready"):
        assert client.get(path).json() == said[path]["application/json"]["example"]
    model = said["/v2/models/{name}"]["application/json"]["example"]
    assert {**client.get(f"/v2/models/{model['name']}").json(), "versions": model["versions"]} == model
    assert client.post("/v1/predict", json={"images": [DIGIT]}).status_code == 200
    counted = client.get("/metrics").text
    for line in said["/metrics"]["text/plain"]["example"].splitlines():
        assert line.rpartition(" ")[0] in counted


def test_head_is_taken_wherever_get_is(client: TestClient, whole: FastAPI) -> None:
    version = client.get("/v2/models/digits-small-cnn").json()["versions"][0]
    asked = set()
    for path, method, _ in operations(whole):
        if method == "get":
            address = path.format(name="digits-small-cnn", version=version)
            got, head = client.get(address), client.head(address)
            assert head.status_code == got.status_code, path
            assert head.headers["content-type"] == got.headers["content-type"]
            asked.add(path)
    assert {"/metrics", "/v1/bundle", "/v1/defenses", "/v1/card", "/v2", "/v2/health/live"} <= asked
    refused = client.head("/v1/predict")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_the_examples_of_bodies_are_taken(client: TestClient, operation: dict[str, Any]) -> None:
    for example in operation["requestBody"]["content"]["application/json"]["examples"].values():
        answered = predictions(client.post("/v1/predict", json=example["value"]))
        assert [found["label"] for found in answered] == ["4"] * len(example["value"]["images"])


def test_the_examples_of_errors_are_what_is_said(client: TestClient, operation: dict[str, Any]) -> None:
    def said(status: int) -> str:
        found: str = operation["responses"][str(status)]["content"]["application/problem+json"]["example"]["detail"]
        return found

    check_problem(post(client, save(Image.new("RGB", (16, 9)), "PNG")), 422, said(422))
    gif = save(Image.new("L", (8, 8)), "GIF").replace(b"GIF87a", b"GIF89a")
    check_problem(post(client, gif), 415, said(415))
    check_problem(client.get("/v1/predict"), 405, said(405))
