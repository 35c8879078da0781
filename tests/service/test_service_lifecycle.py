"""From the first byte read to the last answer given: loading, ready, draining, gone."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from service_helpers import (
    SLOW,
    ServerProcess,
    Serving,
    answer,
    check_problem,
    post,
    predictions,
    wait_ready,
    wait_until,
)
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from mithridate.bundle import MANIFEST, MODEL
from mithridate.errors import InputError, OptionError
from service.app import create_app
from service.connections import connection_options
from service.server import _bind, _DrainingServer, serve
from service.settings import load_settings

Starting = Callable[..., ServerProcess]
SECONDS_LONG = "rmc:scope=all,neighbors=512,epochs=40,patience=1000"


@pytest.fixture
def starting(digits_bundle: Path, tmp_path: Path) -> Iterator[Starting]:
    """``starting(drain_seconds=1)``: the service in a process of its own."""
    with contextlib.ExitStack() as stack:

        def start(**flags: Any) -> ServerProcess:
            server = ServerProcess(tmp_path / "log", bundle=digits_bundle, threads=1, **flags)
            stack.callback(server.close)
            return server

        yield start


def test_alive_before_ready(digits_bundle: Path) -> None:
    async def main() -> None:
        app = create_app(load_settings(bundle=digits_bundle))
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client,
        ):
            assert (await client.get("/livez")).json() == {"status": "alive"}
            for path in ("/readyz", "/v1/bundle", "/v1/defenses"):
                check_problem(await client.get(path), 503, "loading")
            early = await client.post("/v1/predict", content=b"x", headers={"Content-Type": "image/png"})
            check_problem(early, 503, "loading")
            assert int(early.headers["retry-after"]) >= 1
            assert "mithridate_ready 0.0" in (await client.get("/metrics")).text
            assert app.state.service.engine.loaded is None, "all of this happened before it was ready"
            while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            assert (await client.get("/readyz")).json() == {"status": "ready"}
            assert "mithridate_ready 1.0" in (await client.get("/metrics")).text

    asyncio.run(main())


def flip_a_bit(bundle: Path) -> None:
    data = bytearray((bundle / MODEL).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / MODEL).write_bytes(data)


def cut_the_index(bundle: Path) -> None:
    index = bundle / "index.faiss"
    index.write_bytes(index.read_bytes()[:-100])


def lose_the_labels(bundle: Path) -> None:
    (bundle / "labels.npy").unlink()


def add_a_file(bundle: Path) -> None:
    (bundle / "extra.pkl").write_bytes(b"hello")


def age_the_schema(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**manifest, "schema_version": 99}))


def lose_everything(bundle: Path) -> None:
    shutil.rmtree(bundle)


TAMPERING = {
    MODEL: flip_a_bit,
    "index.faiss": cut_the_index,
    "labels.npy": lose_the_labels,
    "extra.pkl": add_a_file,
    "schema version 99": age_the_schema,
    "copy": lose_everything,
}


@pytest.mark.parametrize(("named", "tamper"), TAMPERING.items(), ids=[f.__name__ for f in TAMPERING.values()])
def test_a_tampered_bundle_is_never_served(
    digits_bundle: Path, tmp_path: Path, named: str, tamper: Callable[[Path], None]
) -> None:
    bundle = tmp_path / "copy"
    shutil.copytree(digits_bundle, bundle)
    tamper(bundle)
    settings = load_settings(bundle=bundle, port=0, isolation="thread")
    with pytest.raises(InputError, match=named) as raised:
        serve(settings)
    assert "\n" not in str(raised.value)
    app = create_app(settings)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        while app.state.service.failure is None:
            check_problem(client.get("/readyz"), 503)
        check_problem(client.get("/readyz"), 503, "cannot be served")  # and not a word of where it lies
        check_problem(post(client, b"x"), 503, "cannot be served")
        assert client.get("/livez").status_code == 200
        assert "mithridate_ready 0.0" in client.get("/metrics").text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"defense": "rmcc"}, "did you mean 'rmc'"),
        ({"offer": ["none", "rmc:neighbors=0"]}, "neighbors=0 is out of range"),
        ({"device": "abacus"}, "abacus"),
        ({"log_level": "loud"}, "allowed: debug"),
        ({"host": "256.1.1.1", "insecure_no_keys": True}, "cannot listen at 256.1.1.1"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(digits_bundle: Path, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says) as raised:
        serve(load_settings(**{"bundle": digits_bundle, "port": 0, "isolation": "thread", **flags}))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("listening", [True, False])
def test_a_port_in_use(digits_bundle: Path, listening: bool) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listening:
            other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OptionError, match=f"cannot listen at 127.0.0.1:{port} .*choose another --port"):
            serve(load_settings(bundle=digits_bundle, port=port))


def test_a_port_taken_by_another_service_that_is_still_starting(digits_bundle: Path) -> None:
    first = _bind(load_settings(bundle=digits_bundle, port=0))
    with first, pytest.raises(OptionError, match="cannot listen"):
        _bind(load_settings(bundle=digits_bundle, port=first.getsockname()[1]))


def test_a_free_port_and_a_request_that_outlives_the_signal(starting: Starting, clean: list[bytes]) -> None:
    server = starting(offer=["none", SECONDS_LONG])
    assert not server.url.endswith(":0")
    wait_ready(server.client)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(post, server.client, clean[0], defense=SECONDS_LONG)
        while "mithridate_requests_in_flight 1.0" not in server.client.get("/metrics").text:
            time.sleep(0.02)
        time.sleep(0.2)
        server.terminate()
        assert not slow.done(), "the request was over before the signal came"
        (answer,) = predictions(slow.result())
    assert answer["adaptation"]["steps"] > 0
    assert server.process.wait(30) == 0
    with pytest.raises(httpx2.ConnectError):
        server.client.get("/livez")
    assert "Traceback" not in server.log


def test_draining_answers_but_asks_for_no_more(starting: Starting, clean: list[bytes]) -> None:
    server = starting(drain_seconds=1.5)
    wait_ready(server.client)
    signalled = time.monotonic()
    server.terminate()
    while server.client.get("/readyz").status_code == 200:
        assert time.monotonic() - signalled < 1
    refused, answered = server.client.get("/readyz"), post(server.client, clean[0])
    check_problem(refused, 503, "draining")
    assert predictions(answered)[0]["label"] == "4"
    assert refused.headers["connection"] == answered.headers["connection"] == "close"
    assert "mithridate_ready 0.0" in server.client.get("/metrics").text
    assert server.process.wait(30) == 0
    assert time.monotonic() - signalled >= 1.5


class Persistent:
    """A client that keeps its connection until it is told that it ends, and goes where no new one is taken."""

    def __init__(self, url: str, image: bytes) -> None:
        self._address, self._image = httpx2.URL(url), image
        self._connection: http.client.HTTPConnection | None = None
        self.statuses: list[int] = []
        self.reused = 0

    def ask(self) -> None:
        """Raises ConnectionRefusedError where it has no connection and gets none; any other error is a lost request."""
        if self._connection is None:
            connection = http.client.HTTPConnection(self._address.host, self._address.port, timeout=60)
            connection.connect()
            self._connection = connection
        else:
            self.reused += 1
        connection = self._connection
        connection.request("POST", "/v1/predict?defense=none", self._image, {"Content-Type": "image/png"})
        response = connection.getresponse()
        response.read()
        self.statuses.append(response.status)
        if response.getheader("connection") == "close":
            connection.close()
            self._connection = None

    def keep_asking(self) -> None:
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                self.ask()


@pytest.mark.parametrize("drain_seconds", [0, 1])
def test_the_end_breaks_no_connection_that_is_kept_alive(
    starting: Starting, clean: list[bytes], drain_seconds: float
) -> None:
    """Neither of those who ask all the time nor of who is silent and asks just when the port has been closed."""
    server = starting(drain_seconds=drain_seconds, offer=["none"], defense="none")
    wait_ready(server.client)
    busy, idle = ([Persistent(server.url, clean[0]) for _ in range(count)] for count in (8, 2))
    for client in (*busy, *idle):
        client.ask()
    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(client.keep_asking) for client in busy]
        wait_until(lambda: all(client.reused > 5 for client in busy))
        server.terminate()
        for one in asking:
            one.result()
    for client in idle:
        client.ask()
        with pytest.raises(ConnectionRefusedError):
            client.ask()
        assert client.statuses == [200, 200]
    assert {status for client in busy for status in client.statuses} == {200}
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log


def test_who_is_connected_when_the_port_is_closed_is_answered(digits_bundle: Path) -> None:
    """The system has told the client so; nobody has accepted the connection yet."""
    settings = load_settings(bundle=digits_bundle, port=0)
    options = connection_options(settings)
    config = uvicorn.Config(PlainTextResponse("here"), log_config=None, lifespan="off", **options)
    server = _DrainingServer(config, create_app(settings).state.service, options["http"].guard, 0)

    async def main() -> bytes:
        listener = _bind(settings)
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup([listener])
        with socket.create_connection(listener.getsockname(), timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await server.shutdown([listener])
            return answer(client)

    found = asyncio.run(main())
    assert found.startswith(b"HTTP/1.1 200 OK\r\n")
    assert found.endswith(b"\r\n\r\nhere")
    assert b"\r\nconnection: close\r\n" in found.lower()


def test_a_second_signal_ends_the_drain_and_the_drain_timeout_what_still_runs(
    starting: Starting, clean: list[bytes]
) -> None:
    server = starting(offer=["none", SLOW], drain_seconds=600, drain_timeout_s=1)
    wait_ready(server.client)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(post, server.client, clean[0], defense=SLOW)
        while "mithridate_requests_in_flight 1.0" not in server.client.get("/metrics").text:
            time.sleep(0.02)
        server.terminate()
        while server.client.get("/readyz").status_code == 200:
            time.sleep(0.02)
        server.terminate()
        assert server.process.wait(10) == 0
        with contextlib.suppress(httpx2.TransportError):
            assert slow.result().status_code >= 500


def test_what_is_draining_becomes_ready_no_more_and_loads_nothing(digits_bundle: Path) -> None:
    app = create_app(load_settings(bundle=digits_bundle, offer=["none"], defense="none"))
    service = app.state.service
    service.drain()  # a signal while it loads
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        wait_until(lambda: service.bundles.current is not None)
        assert "mithridate_ready 0.0" in client.get("/metrics").text
        service.reload()
        assert service._reloading is None


def test_stopping_leaves_no_thread_behind(serving: Serving, clean: list[bytes]) -> None:
    before = set(threading.enumerate())
    with serving() as client:
        post(client, clean[0])
        mine = {thread.name.rsplit("_")[0] for thread in set(threading.enumerate()) - before}
        assert {"engine", "decode"} <= mine
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not any(name.startswith(("engine", "decode")) for name in left)
