"""Attack telemetry in a thread of its own: no answer waits for it, and none depends on it."""

from __future__ import annotations

import hashlib
import logging
import queue
import secrets
import threading
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.bundle import Bundle
from service.metrics import Metrics
from service.queries import RecentQueries, Seen, Yardstick
from service.settings import Settings

logger = logging.getLogger("mithridate.telemetry")

_BACKLOG = 256
"""Requests that may wait to be compared; telemetry that is further behind leaves requests out, and counts them."""

_RATED_AT_LEAST = 50
_RECENT_SECONDS = 300.0
_EVENT_EVERY_SECONDS, _ANY_EVENT_EVERY_SECONDS = 60.0, 1.0


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Whose queries are compared with each other: a key, or a network ``address`` where there are no keys."""

    key_id: str | None
    address: str


class QueryTelemetry:
    """Counts near-duplicate queries a client, and warns once a minute of a client that sends many."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._inbox: queue.Queue[tuple[Bundle, Asker, NDArray[np.float32]] | None] = queue.Queue(_BACKLOG)
        self._digest: str | None = None
        self._recent: RecentQueries | None = None
        self._lock = threading.Lock()
        self._warned: dict[str, float] = {}
        self._warned_last = float("-inf")
        self._salt = secrets.token_bytes(16)
        self._thread = threading.Thread(target=self._work, name="query-telemetry", daemon=True)
        metrics.near_duplicate_rate.set_function(self._highest_rate)
        self._thread.start()

    def saw(self, bundle: Bundle, asker: Asker, images: int, embeddings: torch.Tensor | None) -> None:
        """Hands over the ``embeddings`` ``[N, D]`` of an answered request; never waits."""
        if embeddings is not None and self._thread.is_alive():
            try:
                self._inbox.put_nowait((bundle, asker, embeddings.numpy()))
                return
            except queue.Full:
                pass
        self._metrics.not_compared.inc(images)

    def flush(self) -> None:
        """Returns when all that was handed over has been compared."""
        self._inbox.join()

    def close(self) -> None:
        """Ends the thread, after what it was handed."""
        self._inbox.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._inbox.get()) is not None:
            try:
                self._compare(*item)
            except Exception:  # telemetry must not end, and must not take the service along
                logger.exception("telemetry failed for one request")
                self._metrics.not_compared.inc(len(item[2]))
            finally:
                self._inbox.task_done()
        self._inbox.task_done()

    def _compare(self, bundle: Bundle, asker: Asker, embeddings: NDArray[np.float32]) -> None:
        client = f"key {asker.key_id}" if asker.key_id is not None else f"address {asker.address}"
        now = time.monotonic()
        with self._lock:
            if self._recent is None or self._digest != bundle.digest:
                self._recent, self._digest = self._begin(bundle), bundle.digest
            seen = self._recent.add(client, embeddings, now=now)
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

    def _highest_rate(self) -> float:
        with self._lock:
            if self._recent is None:
                return 0.0
            return self._recent.highest_rate(since=time.monotonic() - _RECENT_SECONDS, at_least=_RATED_AT_LEAST)
