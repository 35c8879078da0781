"""OpenTelemetry, where it is asked for: a span a request, and in it one for each phase.

Nothing of it is imported before ``otel=true``. Where spans go, and which are kept, is said in OpenTelemetry's own
environment variables (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_TRACES_SAMPLER`` ...).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from starlette.datastructures import Headers
from starlette.types import Scope

from mithridate import __version__
from mithridate.errors import OptionError
from service.record import PHASES, Record, key_id
from service.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger("mithridate.service")

_LAST_SPANS_SECONDS = 3.0

_UNTRACED = ("/livez", "/readyz", "/metrics", "/v2/health/")
"""Asked every few seconds by machines."""


class Tracing(Protocol):
    """Where requests are told of once they are over; ``started`` and ``ended`` are ``time.perf_counter()`` instants.
    ``on``: whether anything comes of it."""

    on: bool

    def request(self, scope: Scope, record: Record, *, status: int, started: float, ended: float) -> None: ...

    def close(self) -> None:
        """Sends what is not sent yet; gives up after a few seconds."""
        ...


class NoTracing:
    """Costs nothing."""

    on = False

    def request(self, scope: Scope, record: Record, *, status: int, started: float, ended: float) -> None:
        return

    def close(self) -> None:
        return


def make_tracing(settings: Settings) -> Tracing:
    """What the settings ask for. Raises OptionError where that is OpenTelemetry and it is not installed."""
    if not settings.otel:
        return NoTracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise OptionError(
            f"otel=true needs OpenTelemetry, which is not installed ({error}); pip install 'mithridate[otel]'"
        ) from error
    named = "OTEL_SERVICE_NAME" in os.environ or SERVICE_NAME in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    own = {SERVICE_VERSION: __version__} | ({} if named else {SERVICE_NAME: "mithridate"})
    provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)  # close() does, and not for long
    exporter = OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OpenTelemetryTracing(provider, exporter)


class OpenTelemetryTracing:
    """Makes all spans of a request when it is over: their times were measured, they need not be measured again."""

    on = True

    def __init__(self, provider: TracerProvider, exporter: SpanExporter) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace, self._provider, self._exporter = trace, provider, exporter
        self._tracer = provider.get_tracer("mithridate", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def request(self, scope: Scope, record: Record, *, status: int, started: float, ended: float) -> None:
        if scope["path"].startswith(_UNTRACED):
            return
        trace, headers = self._trace, Headers(scope=scope)
        now = time.time_ns() - round(1e9 * time.perf_counter())  # of the wall clock, at the other clock's zero
        parent = self._propagator.extract(
            {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        )
        route = getattr(scope.get("route"), "path", None)
        attributes = {
            "http.request.method": scope["method"],
            "http.response.status_code": status,
            "http.route": route,
            "mithridate.request_id": scope["state"]["request_id"],
            "mithridate.key_id": key_id(scope),
            "mithridate.defense": record.defense,
            "mithridate.outcome": record.outcome,
            **{f"mithridate.batch.{name}": value for name, value in record.batch.items()},
        }
        span = self._tracer.start_span(
            f"{scope['method']} {route}" if route else scope["method"],  # not the path: a client chooses that
            context=parent,
            kind=trace.SpanKind.SERVER,
            start_time=now + round(1e9 * started),
            attributes={name: value for name, value in attributes.items() if value is not None},
        )
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        inside = trace.set_span_in_context(span, parent)
        for phase, begins, seconds in _phases(record):
            begun = now + round(1e9 * begins)
            child = self._tracer.start_span(phase, context=inside, start_time=begun)
            child.end(begun + round(1e9 * seconds))
        span.end(now + round(1e9 * ended))

    def close(self) -> None:
        # A collector that does not answer is tried again for half a minute, which a service that stops does not have.
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(_LAST_SPANS_SECONDS)
        if sending.is_alive():
            self._exporter.shutdown()  # else the thread goes on trying after the service has ended
            sending.join(_LAST_SPANS_SECONDS)
            logger.warning("the last traces were not sent: no collector has taken them in %g s", _LAST_SPANS_SECONDS)


def _phases(record: Record) -> Iterator[tuple[str, float, float]]:
    """Name, start and seconds of each. Durations are what was measured; one is taken to follow the other."""
    if record.timings_ms is None or record.decoding is None:
        return
    at = record.decoding
    for phase in PHASES:
        seconds = record.timings_ms.get(phase, 0.0) / 1000
        if seconds:
            yield phase, at, seconds
        at += seconds
