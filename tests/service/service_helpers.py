"""What the tests of the service share: image files, the three body forms, and what a problem must look like."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image
from starlette.testclient import TestClient

from mithridate.defenses import Defence, Outcome, Prediction, Request
from service.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
Serving = Callable[..., AbstractContextManager[TestClient]]
SLOW = "rmc:scope=all,neighbors=1024,epochs=1000,patience=1000"
"""A defence that takes a minute on any machine, and looks at its budget every few milliseconds."""

QUICK_ALL = "rmc:scope=all,neighbors=48,learning_rate=0.001,epochs=2,batch_size=12"
"""Fine-tunes all weights, visibly and in random order, in a few hundredths of a second."""

SERVE = """
import json, sys
from service.server import serve
from service.settings import load_settings
serve(load_settings(**json.loads(sys.argv[1])))
"""


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def post(client: httpx2.Client, content: bytes, *, media_type: str = "image/png", **params: Any) -> httpx2.Response:
    return client.post("/v1/predict", content=content, headers={"Content-Type": media_type}, params=params)


def post_json(client: httpx2.Client, files: Sequence[bytes], **fields: Any) -> httpx2.Response:
    return client.post("/v1/predict", json={"images": [base64.b64encode(data).decode() for data in files], **fields})


def post_multipart(client: httpx2.Client, files: Sequence[bytes], **params: Any) -> httpx2.Response:
    parts = [("images", (f"{number}.png", data, "image/png")) for number, data in enumerate(files)]
    return client.post("/v1/predict", files=parts, params=params)


def predictions(response: httpx2.Response) -> list[dict[str, Any]]:
    """The part of an answer that must not depend on anything but images, options and seed."""
    assert response.status_code == 200, response.text
    listed: list[dict[str, Any]] = response.json()["predictions"]
    return listed


def check_problem(response: httpx2.Response, status: int, *contains: str) -> dict[str, Any]:
    """That this is a problem document of RFC 9457 which tells a client enough, and an attacker nothing."""
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-content-type-options"] == "nosniff"
    document: dict[str, Any] = response.json()
    assert set(document) == {"type", "title", "status", "detail", "instance", "request_id"}
    assert document["type"] == "about:blank"
    assert document["title"] == HTTPStatus(status).phrase
    assert document["status"] == status
    assert document["instance"] == response.url.path
    assert document["request_id"] == response.headers["x-request-id"] != ""
    for text in contains:
        assert text in document["detail"], document["detail"]
    assert len(document["detail"]) < 600, "a client's own megabytes come back"
    assert "\n" not in document["detail"]
    for leak in ("Traceback", 'File "', ".py", "site-packages", str(ROOT), "/tmp/"):
        assert leak not in response.text
    return document


def assert_same(found: Any, expected: Any, *, within: float = 1e-4) -> None:
    """That two answers agree but for rounding: numbers to ``within``, everything else exactly."""
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert_same(found[key], value, within=within)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, within=within)
    elif isinstance(expected, float):
        assert abs(found - expected) <= within
    else:
        assert found == expected


class Wrapped:
    """A defence that is another one but for what a test changes; ``seen`` lists how many images came together."""

    def __init__(self, inner: Defence, name: str = "wrapped") -> None:
        self.inner = inner
        self.name = name
        self.seen: list[list[int]] = []

    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        self.seen.append([len(request.images) for request in requests])
        return self.inner.predict_together(requests)

    def predict(self, images: Any, *, generator: Any, budget: Any) -> Prediction:
        raise NotImplementedError

    def surrogate(self, images: Any, *, generator: Any, budget: Any) -> Any:
        raise NotImplementedError


class Gate(Wrapped):
    """Answers no earlier than it is opened: whoever asks meanwhile has to wait."""

    batches = False

    def __init__(self, inner: Defence) -> None:
        super().__init__(inner, "gate")
        self.entered = threading.Event()
        self.opened = threading.Event()

    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        self.entered.set()
        assert self.opened.wait(30), "never opened"
        return super().predict_together(requests)


def install(client: TestClient, *defences: Defence) -> None:
    """Offers more defences, under their names."""
    app: Any = client.app
    for defence in defences:
        app.state.service.engine.loaded.defences[defence.name] = defence


def wait_until(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


class Crowd:
    """Requests that wait together: each is in the queue before the next is sent, and all until ``open``."""

    def __init__(self, client: TestClient, threads: Executor, file: bytes) -> None:
        app: Any = client.app
        self._client, self._threads = client, threads
        self.engine: Engine = app.state.service.engine
        loaded = self.engine.loaded
        assert loaded is not None
        self.gate = Gate(loaded.defences["none"])
        install(client, self.gate)
        self.first = threads.submit(post, client, file, defense="gate")
        assert self.gate.entered.wait(30)

    def ask(self, *files: bytes, **options: Any) -> Future[httpx2.Response]:
        """Sends a request and returns when it waits for the engine."""
        before = self.engine.waiting
        sent = self._threads.submit(post_json, self._client, files, **options)
        wait_until(lambda: self.engine.waiting == before + 1)
        return sent

    def open(self) -> None:
        """Lets the engine go on."""
        self.gate.opened.set()


@contextmanager
def crowd(client: TestClient, file: bytes) -> Iterator[Crowd]:
    """``with crowd(client, png) as waiting``: the engine is busy until the block's end, or ``waiting.open()``."""
    with ThreadPoolExecutor(40) as threads:
        waiting = Crowd(client, threads, file)
        try:
            yield waiting
        finally:
            waiting.open()


def wait_ready(client: httpx2.Client, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline, "never ready"
        time.sleep(0.02)


class ServerProcess:
    """The service in a process of its own, at a free port of this machine."""

    def __init__(self, log: Path, *, before: str = "", **flags: Any) -> None:
        """``before``: Python to run before the service."""
        self._log = log
        # A thread unless the test is about processes: to start another costs seconds.
        settings = json.dumps({"port": 0, "seed": 7, "isolation": "thread", **flags}, default=str)
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", before + SERVE, settings], stdout=sink, stderr=sink, cwd=ROOT
            )
        self.url = self._await_url()
        self.client = httpx2.Client(base_url=self.url, timeout=60)

    def _await_url(self) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"listening on (http://[^\s\"]+)", self.log)
            if found:
                return found.group(1)
            time.sleep(0.02)
        self.process.kill()
        self.process.wait()
        raise AssertionError(f"the service did not start:\n{self.log}")

    @property
    def log(self) -> str:
        return self._log.read_text()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def in_flight(client: httpx2.Client) -> int:
    lines = client.get("/metrics").text.splitlines()
    return int(float(next(line for line in lines if line.startswith("mithridate_requests_in_flight ")).split()[1]))


def keep_busy(
    threads: ThreadPoolExecutor, client: httpx2.Client, file: bytes, *, seconds: float
) -> Future[httpx2.Response]:
    """Occupies the engine for ``seconds``."""
    slow = threads.submit(post, client, file, defense=SLOW, deadline_ms=1000 * seconds)
    while in_flight(client) == 0:
        time.sleep(0.01)
    time.sleep(0.1)  # admitted, but perhaps still being decoded: a request sent now could reach the engine first
    return slow


def answer(connection: socket.socket) -> bytes:
    """One whole answer, or what came of it until the server closed."""
    found = b""
    while b"\r\n\r\n" not in found or len(found.partition(b"\r\n\r\n")[2]) < _length(found):
        more = connection.recv(65536)
        if not more:
            break
        found += more
    return found


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 1 << 60
