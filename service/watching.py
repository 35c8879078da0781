"""Everything that watches the service and changes no answer: metrics, traces, telemetry, and a request's record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request

from mithridate.bundle import Bundle
from service.batching import Answer
from service.collectors import Inventory
from service.device_memory import DeviceMemory
from service.loading import Loaded
from service.metrics import LAB, UNKNOWN, Metrics
from service.problems import Problem
from service.query_telemetry import Asker, QueryTelemetry
from service.record import Record, key_id, record_of
from service.settings import Settings
from service.tracing import make_tracing


class Watching:
    """One a service. Raises OptionError where the settings ask for what is not installed."""

    def __init__(
        self,
        settings: Settings,
        *,
        loaded: Callable[[], Loaded[Any] | None],
        device_memory: Callable[[], Sequence[DeviceMemory]],
    ) -> None:
        self.tracing = make_tracing(settings)
        self.metrics = Metrics()
        self.metrics.registry.register(Inventory(loaded, device_memory))
        self._loaded = loaded
        self.telemetry = QueryTelemetry(settings, self.metrics) if settings.query_telemetry else None

    @contextmanager
    def outcome(self, request: Request) -> Iterator[Record]:
        """Around all that answers one request to predict: counts how it ended, whatever it was asked through. Once a
        request: within another one for it, this does nothing."""
        record = record_of(request.scope)
        if record.watched:
            yield record
            return
        record.watched, record.outcome = True, "cancelled"
        try:
            yield record
            record.outcome = "ok"
        except Problem as problem:
            record.outcome = problem.reason or str(problem.status)
            self.metrics.refused(problem)
            self.metrics.count(str(problem.status), record.defense or UNKNOWN)
            raise
        except Exception:
            record.outcome = "500"
            self.metrics.count("500", record.defense or UNKNOWN)
            raise
        self.metrics.count("ok", record.defense or UNKNOWN)

    def answered(
        self, request: Request, bundle: Bundle, answer: Answer, *, decoding: float, timings_ms: dict[str, float]
    ) -> None:
        """There is an answer: what it took, and what the client seems to be doing. ``decoding``: the
        ``time.perf_counter()`` at which that began."""
        record, prediction = record_of(request.scope), answer.prediction
        record.decoding, record.timings_ms = decoding, timings_ms
        record.batch = {"requests": answer.batch.requests, "images": answer.batch.images}
        self.metrics.answered(record.defense or UNKNOWN, prediction, timings_ms)
        if self.telemetry is None or record.defense == LAB:
            return
        live = self._loaded()
        if live is not None and live.bundle.digest != bundle.digest:
            # One that was under way when another bundle went live: to compare it, telemetry would begin anew twice.
            self.metrics.not_compared.inc(len(prediction.scores))
        else:
            asker = Asker(key_id=key_id(request.scope), address=request.client.host if request.client else "")
            self.telemetry.saw(bundle, asker, len(prediction.scores), prediction.embeddings)

    def close(self) -> None:
        """Sends and compares what is left."""
        if self.telemetry is not None:
            self.telemetry.close()
        self.tracing.close()
