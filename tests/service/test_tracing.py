"""OpenTelemetry, received by a collector in this process: what a user's own would get."""

from __future__ import annotations

import builtins
import gzip
import itertools
import runpy
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from service_helpers import Serving, post

import service.tracing
from mithridate.errors import OptionError
from service.record import Record
from service.settings import load_settings
from service.tracing import NoTracing, make_tracing

PHASES = ["decode", "queue", "embed", "search", "adapt", "predict"]


class Collector:
    """Takes OTLP over HTTP, as protobuf."""

    def __init__(self) -> None:
        pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.resources: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                collector.resources.extend(ExportTraceServiceRequest.FromString(body).resource_spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def spans(self) -> list[Any]:
        return [span for resource in self.resources for scope in resource.scope_spans for span in scope.spans]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def attributes(span: Any) -> dict[str, Any]:
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in span.attributes}


def test_a_request_is_a_span_with_its_phases_inside(
    collector: Collector, serving: Serving, clean: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "classifier-7")
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with serving(otel=True) as client:
        headers = {"Content-Type": "image/png", "traceparent": f"00-{trace}-{parent}-01", "X-Request-ID": "job-9"}
        answer = client.post("/v1/predict", content=clean[0], headers=headers)
        assert answer.status_code == 200
        client.get("/livez")
        assert post(client, b"GIF89a").status_code == 415
    by_parent: dict[bytes, list[Any]] = {}
    for span in collector.spans:
        by_parent.setdefault(span.parent_span_id, []).append(span)
    (root,) = by_parent[bytes.fromhex(parent)]
    assert root.trace_id.hex() == trace
    assert root.name == "POST /v1/predict"
    told = attributes(root)
    assert told["http.response.status_code"] == 200
    assert told["mithridate.defense"] == "rmc"
    assert told["mithridate.request_id"] == "job-9"
    children = sorted(by_parent[root.span_id], key=lambda span: span.start_time_unix_nano)
    timings = answer.json()["timings_ms"]
    assert [span.name for span in children] == [phase for phase in PHASES if timings[phase]]
    for before, after in itertools.pairwise(children):
        assert before.end_time_unix_nano <= after.start_time_unix_nano + 1000
    for span in children:
        assert span.trace_id == root.trace_id
        assert root.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano
        taken = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6
        assert taken == pytest.approx(timings[span.name], abs=1e-3)
    (refused,) = by_parent[b""]
    assert attributes(refused)["http.response.status_code"] == 415
    assert {span.trace_id for span in collector.spans} == {root.trace_id, refused.trace_id}, "probes are not traced"
    (service,) = {attributes(resource.resource)["service.name"] for resource in collector.resources}
    assert service == "classifier-7"


def test_without_the_extra_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    there = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return there(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(OptionError, match=r"mithridate\[otel\]") as raised:
        make_tracing(load_settings(bundle="b", otel=True))
    assert "\n" not in str(raised.value)
    assert isinstance(make_tracing(load_settings(bundle="b")), NoTracing)
    runpy.run_path(service.tracing.__file__)  # nor does the module need it


def test_a_parent_that_is_no_parent_begins_a_trace(
    collector: Collector, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    with serving(otel=True) as client:
        client.get("/v1/bundle", headers={"traceparent": b"00-zz-\xff-1", "tracestate": b"\x7f" * 400})
        client.get("/v1/nowhere/secret-in-a-path")
    names = {span.name for span in collector.spans}
    assert names == {"GET /v1/bundle", "GET"}, "what a client makes up does not name a span"


def test_a_collector_that_is_gone_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(service.tracing, "_LAST_SPANS_SECONDS", 0.3)
    tracing = make_tracing(load_settings(bundle="b", otel=True))
    scope = {"type": "http", "method": "GET", "path": "/v1/bundle", "headers": [], "state": {"request_id": "a"}}
    tracing.request(scope, Record(), status=200, started=time.perf_counter(), ended=time.perf_counter())
    started = time.perf_counter()
    tracing.close()
    assert time.perf_counter() - started < 3
    assert "were not sent" in caplog.text
