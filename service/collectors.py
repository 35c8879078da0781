"""What is looked up at the moment Prometheus asks, and the watch on the event loop."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mithridate import __version__
from mithridate.evaluation import percentile
from service.device_memory import DeviceMemory
from service.loading import Loaded

_RECENT_SECONDS, _RECENT_MOST = 30.0, 4096
_LAG_EVERY = 0.05


class QueueWait:
    """How long a request waits for the engine: those that were answered in the last half minute (the latest 4,096 where
    there were more), and those that wait now. ``waiting`` says how many that are."""

    def __init__(self) -> None:
        self.waiting: Callable[[], int] = lambda: 0
        self._answered: deque[tuple[float, float]] = deque(maxlen=_RECENT_MOST)
        self._asking: dict[object, float] = {}

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Around one request to the engine, from its place in the queue to its answer."""
        mine = object()
        self._asking[mine] = time.monotonic()
        try:
            yield
        finally:
            del self._asking[mine]

    def add(self, seconds: float) -> None:
        """One that has been answered waited so long."""
        self._answered.append((time.monotonic(), seconds))

    def seconds(self) -> float:
        """What has to be expected: the larger of what it was and what it already is."""
        return max(self._p95(), self._oldest())

    def _oldest(self) -> float:
        """The engine takes the oldest first: those that wait are the latest of those that ask."""
        asked, waiting = list(self._asking.values()), self.waiting()
        return time.monotonic() - asked[-min(waiting, len(asked))] if asked and waiting else 0.0

    def _p95(self) -> float:
        since = time.monotonic() - _RECENT_SECONDS
        recent = [seconds for at, seconds in self._answered if at >= since]
        return percentile(recent, 0.95) if recent else 0.0


class Inventory(Collector):
    """What runs (version and bundle) and how much memory its processes and devices hold."""

    def __init__(
        self, loaded: Callable[[], Loaded[Any] | None], device_memory: Callable[[], Sequence[DeviceMemory]]
    ) -> None:
        self._loaded, self._device_memory = loaded, device_memory

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("mithridate_build_info", "What runs", labels=["version", "python", "torch"])
        torch = sys.modules.get("torch")
        build.add_metric([__version__, platform.python_version(), str(getattr(torch, "__version__", ""))], 1)
        yield build
        bundle = GaugeMetricFamily("mithridate_bundle_info", "What is served", labels=["name", "digest"])
        loaded = self._loaded()
        if loaded is not None:
            bundle.add_metric([loaded.bundle.manifest.name, loaded.bundle.digest], 1)
        yield bundle
        resident = GaugeMetricFamily(
            "mithridate_resident_memory_bytes", "Memory of the server, and of its child processes", labels=["process"]
        )
        resident.add_metric(["server"], _resident(os.getpid()))
        resident.add_metric(["engines"], sum(map(_resident, _children(os.getpid()))))
        yield resident
        device = GaugeMetricFamily(
            "mithridate_device_memory_bytes",
            "Memory of a GPU that torch has allocated, or reserved, in all engines; as of each one's latest batch",
            labels=["device", "kind"],
        )
        for name, kind, size in self._device_memory():
            device.add_metric([name, kind], size)
        yield device


async def watch_lag(observe: Callable[[float], None]) -> None:
    """Tells ``observe`` twenty times a second how many seconds too late the event loop woke this task; never returns.

    That is what any other request would have waited for no reason of its own.
    """
    while True:
        due = time.perf_counter() + _LAG_EVERY
        await asyncio.sleep(_LAG_EVERY)
        observe(max(0.0, time.perf_counter() - due))


def _resident(process: int) -> int:
    """Bytes; 0 where it has ended, or where there is no /proc."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def _children(process: int) -> list[int]:
    try:
        lists = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for text in lists for child in text.split()]
