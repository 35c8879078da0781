"""Attack telemetry in a thread of its own: no answer waits for it, and none depends on it."""

from __future__ import annotations

import hashlib
import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.bundle import Bundle
from service.metrics import Metrics
from service.queries import RecentQueries, Seen, Yardstick
from service.settings import Settings

logger = logging.getLogger("mithridate.telemetry")

_EVERY_SECONDS, _PUBLISHED_EVERY = 0.25, 8
_PENDING_BYTES = 16 * 2**20
"""Of embeddings that wait to be compared; what comes when there are more is left out, and counted."""

_ROWS = 256
"""Compared at once: with a thousand earlier ones a megabyte of distances."""

_RATED_AT_LEAST = 50
_RECENT_SECONDS = 300.0
_EVENT_EVERY_SECONDS, _ANY_EVENT_EVERY_SECONDS = 60.0, 1.0


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Whose queries are compared with each other: a key, or a network ``address`` where there are no keys."""

    key_id: str | None
    address: str


@dataclass(frozen=True, kw_only=True, eq=False)
class _Answered:
    bundle: Bundle
    asker: Asker
    client: str
    embeddings: NDArray[np.float32]


class QueryTelemetry:
    """Counts near-duplicate queries a client, and warns once a minute of a client that sends many."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._pending: deque[_Answered] = deque()
        self._pending_bytes = 0
        self._digest: str | None = None
        self._recent: RecentQueries | None = None
        self._lock = threading.Lock()
        self._warned: dict[str, float] = {}
        self._warned_last = float("-inf")
        self._salt = secrets.token_bytes(16)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="query-telemetry", daemon=True)
        self._thread.start()

    def saw(self, bundle: Bundle, asker: Asker, images: int, embeddings: torch.Tensor | None) -> None:
        """Notes the ``embeddings`` ``[N, D]`` of an answered request; never waits. For the event loop's thread only."""
        if embeddings is None or self._pending_bytes + embeddings.nbytes > _PENDING_BYTES:
            self._metrics.not_compared.inc(images)
            return
        client = f"key {asker.key_id}" if asker.key_id is not None else f"address {asker.address}"
        found = _Answered(bundle=bundle, asker=asker, client=client, embeddings=embeddings.numpy())
        self._pending_bytes += embeddings.nbytes
        self._pending.append(found)

    def flush(self) -> None:
        """Compares, in the caller's thread, all that was noted before, and says what came out."""
        self._drain()
        self._publish()

    def _drain(self) -> None:
        with self._lock:
            taken = [self._pending.popleft() for _ in range(len(self._pending))]
            self._pending_bytes = 0  # at worst a little more than allowed is noted meanwhile
            # In the order in which the bundles were live: mixed, each turn between two would make it begin anew.
            for _, run in itertools.groupby(taken, key=lambda answered: answered.bundle.digest):
                self._compare_all(run)

    def _compare_all(self, answered: Iterable[_Answered]) -> None:
        together: dict[str, list[_Answered]] = {}
        for one in answered:
            together.setdefault(one.client, []).append(one)
        for answers in together.values():
            try:
                self._compare(answers)
            except Exception:  # telemetry must not end, and must not take the service along
                logger.exception("telemetry failed for %d requests", len(answers))
                self._metrics.not_compared.inc(sum(len(one.embeddings) for one in answers))

    def close(self) -> None:
        """Ends the thread, and compares what is left."""
        self._closing.set()
        self._thread.join()
        self.flush()

    def _work(self) -> None:
        # Not woken by each request: it would ask for the interpreter just when the answer is sent.
        for turn in itertools.count():
            if self._closing.wait(_EVERY_SECONDS):
                return
            self._drain()
            if turn % _PUBLISHED_EVERY == 0:
                self._publish()

    def _publish(self) -> None:
        """Not when Prometheus asks: that is the event loop's time."""
        with self._lock:
            if self._recent is not None:
                since = time.monotonic() - _RECENT_SECONDS
                rate = self._recent.highest_rate(since=since, at_least=_RATED_AT_LEAST)
                self._metrics.near_duplicate_rate.set(rate)

    def _compare(self, answers: Sequence[_Answered]) -> None:
        """What one client has sent since the last time."""
        bundle, asker, client = answers[0].bundle, answers[0].asker, answers[0].client
        if self._recent is None or self._digest != bundle.digest:
            self._recent, self._digest = self._begin(bundle), bundle.digest
        now, embeddings = time.monotonic(), np.concatenate([answered.embeddings for answered in answers])
        for start in range(0, len(embeddings), _ROWS):
            seen = self._recent.add(client, embeddings[start : start + _ROWS], now=now)
            self._metrics.compared_with_earlier(seen)
            if seen.rated >= _RATED_AT_LEAST and seen.rate >= self._settings.near_duplicate_alert:
                self._warn(client, asker, seen, now)

    def _begin(self, bundle: Bundle) -> RecentQueries:
        """Anew for every bundle: embeddings of two networks cannot be compared."""
        settings, clean = self._settings, bundle.embeddings[: bundle.manifest.dataset.images]
        window = settings.query_window
        yardstick = Yardstick.of(clean, window=window, fraction=settings.near_duplicate_distance)
        logger.info("queries count as near-duplicates within a squared distance of %.4g", yardstick.near)
        return RecentQueries(yardstick, window=window, max_bytes=settings.query_memory_mb * 2**20)

    def _warn(self, client: str, asker: Asker, seen: Seen, now: float) -> None:
        last = self._warned.get(client, float("-inf"))
        if now - last < _EVENT_EVERY_SECONDS or now - self._warned_last < _ANY_EVENT_EVERY_SECONDS:
            return
        self._warned = {name: at for name, at in self._warned.items() if now - at < _EVENT_EVERY_SECONDS}
        self._warned[client] = self._warned_last = now
        name = asker.key_id if asker.key_id is not None else self._name(asker.address)
        fields = {"client": name, "rate": round(seen.rate, 3), "queries": seen.rated}
        line = "near-duplicate queries: %.0f %% of the latest %d of client %s"
        logger.warning(line, 100 * seen.rate, seen.rated, name, extra={"fields": fields})

    def _name(self, address: str) -> str:
        """The address, or a name that stands for it until the service ends and from which it cannot be told."""
        if self._settings.log_client_address:
            return address
        return "anonymous-" + hashlib.blake2b(address.encode(), key=self._salt, digest_size=4).hexdigest()
