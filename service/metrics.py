"""What Prometheus is told. One registry an application: one process answers, so there is nothing to merge."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mithridate.defenses import Prediction
from service.batching import BatchSize

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and histograms of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mithridate_requests", "Requests to predict", ["outcome", "defense"], registry=self.registry
        )
        self.images = Counter("mithridate_images", "Images answered", ["defense"], registry=self.registry)
        self.phases = Histogram(
            "mithridate_phase_seconds",
            "Time by phase of a request; embed, search, adapt and predict are those of the batch it was in",
            ["phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.steps = Histogram(
            "mithridate_adaptation_steps", "Optimiser steps an image", buckets=_STEPS, registry=self.registry
        )
        self.stops = Counter(
            "mithridate_adaptation_stops", "Why adaptation stopped", ["reason"], registry=self.registry
        )
        self.answered_from = Counter(
            "mithridate_adaptation_answered_from",
            "Which weights gave the answer: adapted, or base where adaptation was not let through",
            ["weights"],
            registry=self.registry,
        )
        self.batch_requests = Histogram(
            "mithridate_batch_requests", "Requests answered together", buckets=_COUNTS, registry=self.registry
        )
        self.batch_images = Histogram(
            "mithridate_batch_images", "Images answered together", buckets=_COUNTS, registry=self.registry
        )
        self.abstained = Counter(
            "mithridate_abstained", "Images whose answer the defence does not stand by", registry=self.registry
        )
        self.suspicious = Counter(
            "mithridate_suspicious", "Images where base and defended answers differ", registry=self.registry
        )
        self.in_flight = Gauge("mithridate_requests_in_flight", "Requests admitted", registry=self.registry)
        self.waiting = Gauge(
            "mithridate_requests_waiting", "Requests that the engine has not begun", registry=self.registry
        )
        self.ready = Gauge("mithridate_ready", "1 while the service is ready", registry=self.registry)

    def answered(self, defense: str, prediction: Prediction, timings_ms: dict[str, float]) -> None:
        """Records one answered request."""
        self.requests.labels("ok", defense).inc()
        self.images.labels(defense).inc(len(prediction.scores))
        for phase, milliseconds in timings_ms.items():
            self.phases.labels(phase).observe(milliseconds / 1000)
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

    def refused(self, status: int, defense: str) -> None:
        """Records one request that got an error."""
        self.requests.labels(str(status), defense).inc()

    def render(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
