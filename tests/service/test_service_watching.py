"""What an operator sees of a service: metrics that promtool takes, times, and lines for machines."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from service_helpers import ServerProcess, Serving, crowd, post, post_json, predictions, wait_ready
from starlette.testclient import TestClient
from test_service_describe import read_metrics

from service import engine_process
from service.collectors import QueueWait, watch_lag
from service.logs import JsonFormatter
from service.record import REQUEST_ID


def check_metrics(exposition: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    found = subprocess.run([promtool, "check", "metrics"], input=exposition, capture_output=True, text=True)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_promtool_accepts_the_metrics(client: TestClient, clean: list[bytes], adversarial: list[bytes]) -> None:
    post_json(client, [clean[0], adversarial[0]])
    post(client, b"GIF89a")
    check_metrics(client.get("/metrics").text)


def test_reasons_and_kinds_are_there_before_the_first(serving: Serving) -> None:
    with serving() as client:
        metrics = read_metrics(client)
    for reason in ("queue-full", "cost", "allowance", "not-ready", "draining", "engine-stopped", "deadline"):
        assert metrics["shed_total", reason] == 0
    for kind in ("type", "too-large", "malformed", "unusable"):
        assert metrics["decode_errors_total", kind] == 0
    assert metrics["near_duplicate_queries_total", "near"] == 0


def test_what_is_shed_is_counted_by_reason(serving: Serving, clean: list[bytes]) -> None:
    with serving(queue_size=2) as client, crowd(client, clean[0]) as waiting:
        waiting.ask(clean[1])
        assert post(client, clean[2]).status_code == 429
        metrics = read_metrics(client)
        assert metrics["shed_total", "queue-full"] == 1
        assert metrics["requests_total", "unknown", "429"] == 1
        assert metrics["requests_waiting",] == 1
        assert metrics["backlog_seconds",] > 0
        app: Any = client.app
        service, kept = app.state.service, app.state.service.engine._loaded
        service.draining, service.engine._loaded = True, None
        for reason, ended in (("engine-stopped", False), ("draining", True)):  # by itself, or as it was told
            service._ending = ended
            assert post(client, clean[2]).status_code == 503
            assert client.get("/readyz").status_code == 503
            assert read_metrics(client)["shed_total", reason] == 1, "a probe is not a request that was shed"
        service.engine._loaded = kept


def test_access_lines_say_why_a_request_was_shed(serving: Serving, clean: list[bytes], json_lines: Any) -> None:
    with serving(queue_size=1, offer=["none"], defense="none") as client, crowd(client, clean[0]):
        assert post(client, clean[1]).status_code == 429
    with serving(max_buffered_bytes=10, offer=["none"], defense="none") as client:
        assert post(client, clean[1]).status_code == 429
        assert read_metrics(client)["shed_total", "memory"] == 1
    lines = [line for line in json_lines() if line["logger"] == "mithridate.access" and line["status"] == 429]
    assert [line["outcome"] for line in lines] == ["queue-full", "memory"]


def test_a_deadline_that_passes_is_a_reason(serving: Serving, clean: list[bytes]) -> None:
    with serving() as client, crowd(client, clean[0]):
        assert post(client, clean[1], deadline_ms=20).status_code == 504
        assert read_metrics(client)["shed_total", "deadline"] == 1


def test_the_queue_wait_grows_while_nobody_is_answered(serving: Serving, clean: list[bytes]) -> None:
    """An autoscaler must see a queue that stands still, not only one that has moved."""
    with serving() as client:
        assert read_metrics(client)["queue_wait_seconds",] == 0
        with crowd(client, clean[0]) as waiting:
            asked = waiting.ask(clean[1])
            time.sleep(0.2)
            assert read_metrics(client)["queue_wait_seconds",] >= 0.2
            waiting.open()
            assert asked.result().status_code == 200
        assert 0.2 <= read_metrics(client)["queue_wait_seconds",] < 60, "it is remembered for a while"


def test_waits_are_forgotten_and_those_that_wait_now_count(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, now = QueueWait(), 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    for milliseconds in range(1, 101):
        waits.add(milliseconds / 1000)
    assert waits.seconds() == 0.095
    now += 31
    assert waits.seconds() == 0
    with waits.asking():
        now += 5
        with waits.asking():
            now += 2
            assert waits.seconds() == 0, "both are being answered"
            waits.waiting = lambda: 1
            assert waits.seconds() == 2, "the first is being answered"
            waits.waiting = lambda: 3
            assert waits.seconds() == 7
    assert waits.seconds() == 0


def test_images_that_cannot_be_used_are_counted_by_kind(serving: Serving, clean: list[bytes]) -> None:
    with serving(max_pixels=63) as client:
        post(client, b"GIF89a")
        post(client, clean[0])
        post(client, clean[0][:40])
        metrics = read_metrics(client)
    assert metrics["decode_errors_total", "type"] == 1
    assert sum(metrics["decode_errors_total", kind] for kind in ("too-large", "malformed")) == 2


def test_what_runs_and_what_it_holds(client: TestClient) -> None:
    text = client.get("/metrics").text
    described = client.get("/v1/bundle").json()
    assert f'mithridate_bundle_info{{digest="{described["digest"]}",name="digits-small-cnn"}} 1.0' in text
    metrics = read_metrics(client)
    assert any(name[0] == "build_info" and torch.__version__ in name for name in metrics)
    assert metrics["resident_memory_bytes", "server"] > 50e6
    assert "process_resident_memory_bytes" in text
    assert (metrics.get(("device_memory_bytes", "cuda:0", "allocated")) is None) or torch.cuda.is_available()


def test_what_engines_in_other_processes_hold_of_a_gpu(
    serving: Serving, clean: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's own process never uses one."""
    told = "service.engine_worker.device_memory = lambda: [('cuda:0', 'allocated', next(held))]"
    fake = f"import itertools, service.engine_worker; held = itertools.count(100, 10); {told}; main(int"
    monkeypatch.setattr(engine_process, "_MAIN", engine_process._MAIN.replace("main(int", fake))
    with serving(isolation="process", devices="cpu,cpu", threads=1) as client:
        assert read_metrics(client)["device_memory_bytes", "cuda:0", "allocated"] == 200
        assert predictions(post(client, clean[0]))
        assert read_metrics(client)["device_memory_bytes", "cuda:0", "allocated"] == 210


def test_a_blocked_loop_is_seen() -> None:
    async def block() -> list[float]:
        lags: list[float] = []
        task = asyncio.create_task(watch_lag(lags.append))
        await asyncio.sleep(0.12)
        time.sleep(0.3)  # noqa: ASYNC251 - the fault that is looked for
        await asyncio.sleep(0.06)
        task.cancel()
        return lags

    assert max(asyncio.run(block())) > 0.2


def test_answers_say_what_took_how_long(client: TestClient, clean: list[bytes]) -> None:
    response = post(client, clean[0])
    timings = response.json()["timings_ms"]
    parts = [part.split(";dur=") for part in response.headers["server-timing"].split(", ")]
    assert {name: float(value) for name, value in parts} == pytest.approx(timings, abs=6e-4)
    assert "server-timing" not in post(client, b"GIF89a").headers
    assert "server-timing" not in client.get("/livez").headers


SECRET = "mth_0123456789abcdef"


@pytest.fixture
def json_lines(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """``json_lines()``: what the service would have written with ``--log-format json`` so far."""
    caplog.set_level(logging.DEBUG)
    caplog.handler.setFormatter(JsonFormatter())

    def lines() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in caplog.text.splitlines()]
        return [line for line in lines if line["logger"] != "httpx2"]  # the test's own client

    return lines


def test_an_access_line_for_machines(client: TestClient, clean: list[bytes], json_lines: Any) -> None:
    headers = {"Content-Type": "image/png", "X-Request-ID": "job-7", "Authorization": f"Bearer {SECRET}"}
    client.post(f"/v1/predict?defense=none&token={SECRET}", content=clean[0], headers=headers)
    client.post("/v1/predict?defense=none", content=clean[0], headers=headers)
    client.get("/v1/%0a%7b%22forged%22%3a1%7d", headers=headers)
    lines = [line for line in json_lines() if line["logger"] == "mithridate.access"]
    assert len(lines) == 3
    answered = lines[1]
    assert answered["ts"].endswith("+00:00")
    assert answered["ms"] > 0
    assert {name: answered[name] for name in ("level", "request_id", "method", "path", "status", "defense")} == {
        "level": "info",
        "request_id": "job-7",
        "method": "POST",
        "path": "/v1/predict",
        "status": 200,
        "defense": "none",
    }
    assert answered["outcome"] == "ok"
    assert not {"client", "key_id"} & set(answered), "nobody allowed addresses, and there are no keys"
    assert "forged" not in lines[2]
    everything = json.dumps(json_lines())
    assert SECRET not in everything
    assert "PNG" not in everything


def test_an_address_is_logged_where_that_is_allowed(serving: Serving, clean: list[bytes], json_lines: Any) -> None:
    with serving(log_client_address=True) as client:
        post(client, clean[0], defense="none")
    clients = {line["client"] for line in json_lines() if line["logger"] == "mithridate.access"}
    assert clients == {"127.0.0.1"}


def test_lines_name_the_request_they_belong_to() -> None:
    formatter, record = JsonFormatter(), logging.LogRecord("x", logging.ERROR, "", 0, "a\nb %s", ("c",), None)
    assert "request_id" not in json.loads(formatter.format(record))
    token = REQUEST_ID.set("job-8")
    line = formatter.format(record)
    REQUEST_ID.reset(token)
    assert "\n" not in line
    assert json.loads(line)["request_id"] == "job-8"
    assert json.loads(line)["message"] == "a\nb c"


def test_every_line_of_the_process_is_an_object(digits_bundle: Path, tmp_path: Path) -> None:
    """uvicorn's too, and what it says of a request that is no HTTP."""
    server = ServerProcess(tmp_path / "log", bundle=digits_bundle, threads=1, log_format="json", offer=["none"])
    try:
        wait_ready(server.client)
        server.terminate()
        server.process.wait(30)
    finally:
        server.close()
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert {"mithridate.service", "mithridate.access", "uvicorn.error"} <= {line["logger"] for line in lines}
    assert all({"ts", "level", "message"} <= set(line) for line in lines)


def test_no_answer_depends_on_being_watched(serving: Serving, clean: list[bytes]) -> None:
    with serving(query_telemetry=False) as plain, serving() as watched:
        for _ in range(2):
            assert predictions(post(watched, clean[0], top_k=10)) == predictions(post(plain, clean[0], top_k=10))
        assert ("compared_queries_total",) in read_metrics(plain)
