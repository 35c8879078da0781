"""What Prometheus is told. One registry an application: one process answers, so there is nothing to merge.

No label has values that a client can make up: defences are those that are offered, clients have no label at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from mithridate.defenses import Prediction
from mithridate.errors import (
    ImageError,
    ImageMalformedError,
    ImageTooLargeError,
    ImageTypeError,
    ImageUnusableError,
)
from service.batching import BatchSize
from service.collectors import QueueWait
from service.problems import Problem, ShedReason
from service.queries import Seen

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_IMAGE_FAULTS: dict[type[ImageError], str] = {
    ImageTypeError: "type",
    ImageTooLargeError: "too-large",
    ImageMalformedError: "malformed",
    ImageUnusableError: "unusable",
}
"""What can be wrong with an image, as the label of it."""

UNKNOWN = "unknown"
"""The defence of a request that ended before one was chosen."""

LAB = "lab"
"""The defence of whatever the lab attacks: what that shows is the operator's own doing, and no sign of an attacker."""


class Metrics:
    """Counters and histograms of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.waits = QueueWait()
        self._turning_away: dict[ShedReason | None, tuple[Counter, ...]] = {}
        ProcessCollector(registry=self.registry)
        self._add_requests()
        self._add_answers()
        self._add_load()
        self._add_queries()

    def _add_requests(self) -> None:
        self.requests = self._counter("requests", "Requests to predict", "outcome", "defense")
        self.images = self._counter("images", "Images answered", "defense")
        self.shed = self._counter("shed", "Well-formed requests that were not answered, by reason", "reason")
        for reason in get_args(ShedReason):
            self.shed.labels(reason)  # at 0 before the first: else a rate misses it
        self.decode_errors = self._counter("decode_errors", "Requests with an image that cannot be used", "kind")
        for kind in _IMAGE_FAULTS.values():
            self.decode_errors.labels(kind)
        self.phases = self._histogram(
            "phase_seconds",
            "Time by phase of a request; embed, search, adapt and predict are those of the batch it was in",
            _SECONDS,
            "phase",
        )

    def _add_answers(self) -> None:
        self.steps = self._histogram("adaptation_steps", "Optimiser steps an image", _STEPS)
        self.stops = self._counter("adaptation_stops", "Why adaptation stopped", "reason")
        self.answered_from = self._counter(
            "adaptation_answered_from",
            "Which weights gave the answer: adapted, or base where adaptation was not let through",
            "weights",
        )
        self.batch_requests = self._histogram("batch_requests", "Requests answered together", _COUNTS)
        self.batch_images = self._histogram("batch_images", "Images answered together", _COUNTS)
        self.abstained = self._counter("abstained", "Images whose answer the defence does not stand by")
        self.suspicious = self._counter("suspicious", "Images where base and defended answers differ")

    def _add_load(self) -> None:
        self.in_flight = self._gauge("requests_in_flight", "Requests admitted")
        self.waiting = self._gauge("requests_waiting", "Requests that the engine has not begun")
        self.backlog = self._gauge("backlog_seconds", "The engine's time that admitted requests will take, estimated")
        self.queue_wait = self._gauge(
            "queue_wait_seconds",
            "How long a request waits for the engine: the 95th percentile of the last half minute's, or the age of the "
            "oldest one that waits, whichever is more",
        )
        self.queue_wait.set_function(self.waits.seconds)
        self.ready = self._gauge("ready", "1 while the service is ready")
        self.loop_lag = self._histogram("loop_lag_seconds", "How late the event loop wakes a sleeper", _LAG_SECONDS)

    def _add_queries(self) -> None:
        self.compared = self._counter("compared_queries", "Images compared with earlier ones of the same client")
        self.near_duplicates = self._counter(
            "near_duplicate_queries", "Of these: near an earlier one, or identical to it", "kind"
        )
        for kind in ("near", "identical"):
            self.near_duplicates.labels(kind)
        self.near_duplicate_rate = self._gauge(
            "near_duplicate_rate", "Share of near ones among a client's latest images: of the client with the highest"
        )
        self.not_compared = self._counter(
            "not_compared_queries",
            "Images not compared: telemetry was behind, it gives no embedding, or a new bundle is live",
        )

    def count(self, outcome: str, defense: str) -> None:
        """One request has ended."""
        self.requests.labels(outcome, defense).inc()

    def answered(self, defense: str, prediction: Prediction, timings_ms: dict[str, float]) -> None:
        """Records what one answered request took and was told."""
        self.images.labels(defense).inc(len(prediction.scores))
        for phase, milliseconds in timings_ms.items():
            self.phases.labels(phase).observe(milliseconds / 1000)
        self.waits.add(timings_ms["queue"] / 1000)
        if defense != LAB:
            self._judge(prediction)

    def _judge(self, prediction: Prediction) -> None:
        for adaptation in prediction.adaptations:
            if adaptation is not None:
                self.steps.observe(adaptation.steps)
                self.stops.labels(adaptation.stop_reason).inc()
                self.answered_from.labels(adaptation.weights).inc()
        differing = prediction.scores.argmax(1) != prediction.base_scores.argmax(1)
        self.suspicious.inc(int(differing.sum()))
        if prediction.abstained is not None:
            self.abstained.inc(int(prediction.abstained.sum()))

    def ran(self, size: BatchSize) -> None:
        """Records one batch, in the engine's thread."""
        self.batch_requests.observe(size.requests)
        self.batch_images.observe(size.images)

    def refused(self, problem: Problem) -> None:
        """Records why a request got an error."""
        if problem.reason is not None:
            self.shed.labels(problem.reason).inc()
        kind = next((kind for fault, kind in _IMAGE_FAULTS.items() if isinstance(problem.__cause__, fault)), None)
        if kind is not None:
            self.decode_errors.labels(kind).inc()

    def turned_away(self, reason: ShedReason | None) -> None:
        """Records a request that got 429 before anything made a record of it: often, so its counters are at hand."""
        counters = self._turning_away.get(reason)
        if counters is None:
            shed = [] if reason is None else [self.shed.labels(reason)]
            counters = self._turning_away[reason] = (*shed, self.requests.labels("429", UNKNOWN))
        for counter in counters:
            counter.inc()

    def compared_with_earlier(self, seen: Seen) -> None:
        """Records what telemetry found, in its thread."""
        self.compared.inc(seen.compared)
        self.near_duplicates.labels("near").inc(seen.near)
        self.near_duplicates.labels("identical").inc(seen.identical)

    def render(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"mithridate_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"mithridate_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"mithridate_{name}", text, labels, buckets=buckets, registry=self.registry)
