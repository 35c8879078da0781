"""What OpenAPI promises: every status that is answered, every error in its form, examples that are true."""

from __future__ import annotations

import importlib.util
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
from PIL import Image
from service_helpers import ROOT, check_problem, post, predictions, save, wait_ready, wait_until
from starlette.testclient import TestClient

from service.app import create_app
from service.connections import connection_options
from service.schemas import PredictResponse
from service.settings import load_settings


@contextmanager
def listening(bundle: Path, **flags: Any) -> Iterator[str]:
    """The address of a service in a thread of this process, held to its limits of connections too."""
    settings = load_settings(bundle=bundle, seed=7, **flags)
    listener = socket.create_server(("127.0.0.1", 0))
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
    run += ["--exclude-path-regex", "^/(v2|admin)"]  # in the long run they are there
    with listening(digits_bundle) as url:
        done = subprocess.run(
            [*command, *run, f"{url}/openapi.json"],
            env=environment,
            cwd=tmp_path,  # it keeps what it finds
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Tested: 7" in done.stdout, done.stdout[-3000:]


@pytest.fixture(scope="module")
def operation(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]
    return found


def test_every_body_form_and_every_error_has_an_example(client: TestClient, operation: dict[str, Any]) -> None:
    for body in operation["requestBody"]["content"].values():
        assert body["examples"]
    assert set(operation["responses"]) == {
        *("200", "400", "401", "403", "405", "408", "413", "415", "422", "429", "431", "500", "503", "504"),
    }  # fmt: skip
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        if path.startswith("/v2"):  # its errors have a form of their own
            continue
        for status, response in next(iter(methods.values()))["responses"].items():
            if status != "200":
                example = response["content"]["application/problem+json"]["example"]
                assert (example["status"], example["instance"]) == (int(status), path)


def test_the_examples_of_bodies_are_taken(client: TestClient, operation: dict[str, Any]) -> None:
    for example in operation["requestBody"]["content"]["application/json"]["examples"].values():
        answered = predictions(client.post("/v1/predict", json=example["value"]))
        assert [found["label"] for found in answered] == ["4"] * len(example["value"]["images"])


def test_the_example_of_an_answer_has_its_form(operation: dict[str, Any]) -> None:
    example = operation["responses"]["200"]["content"]["application/json"]["example"]
    dumped = PredictResponse.model_validate(example).model_dump(by_alias=True, exclude_none=True)
    assert dumped == example, "but for what is null, which an OpenAPI document leaves out"


def test_the_examples_of_errors_are_what_is_said(client: TestClient, operation: dict[str, Any]) -> None:
    def said(status: int) -> str:
        found: str = operation["responses"][str(status)]["content"]["application/problem+json"]["example"]["detail"]
        return found

    check_problem(post(client, save(Image.new("RGB", (16, 9)), "PNG")), 422, said(422))
    gif = save(Image.new("L", (8, 8)), "GIF").replace(b"GIF87a", b"GIF89a")
    check_problem(post(client, gif), 415, said(415))
    check_problem(client.get("/v1/predict"), 405, said(405))
