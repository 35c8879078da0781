"""Which engine a service has: a thread, a process, or several processes with a device each."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mithridate.errors import BundleError
from service.batching import Answer, BatchSize, EngineStoppedError
from service.device_memory import DeviceMemory, together
from service.engine import Engine
from service.engine_process import ProcessEngine
from service.loading import Loaded, Named
from service.settings import Settings


class AnyEngine(Protocol):
    """What the service needs of whatever answers its requests."""

    on_batch: Callable[[BatchSize], None]
    on_death: Callable[[BaseException], None]

    @property
    def loaded(self) -> Loaded[Any] | None:
        """What it answers from; None before it is loaded, and as soon as nobody answers any more."""
        ...

    @property
    def waiting(self) -> int:
        """How many requests it has not begun."""
        ...

    @property
    def device_memory(self) -> Sequence[DeviceMemory]:
        """What it holds of each GPU, as of its latest batch where it is another process."""
        ...

    async def load(self) -> Loaded[Any]:
        """Verifies and loads the bundle; called once."""
        ...

    async def predict(
        self,
        defence: Any,
        pixels: NDArray[np.uint8],
        *,
        deadline: float,
        cancelled: threading.Event,
        seed: int | None = None,
    ) -> Answer:
        """Answers for ``pixels`` with a defence of ``loaded``."""
        ...

    def forget_ended(self) -> None:
        """Stops working for clients that have left."""
        ...

    async def end(self) -> None:
        """Lets what runs end and takes no more."""
        ...


def make_engine(settings: Settings) -> AnyEngine:
    """As ``settings`` want it."""
    devices = settings.used_devices
    if settings.isolation != "process" and len(devices) == 1:
        return Engine(settings.model_copy(update={"device": devices[0]}))
    return Processes(settings) if len(devices) > 1 else ProcessEngine(_on(settings, devices[0], settings.threads))


class Processes:
    """Several engine processes with the same bundle. Where one ends, there is no service: a rest of it that answers
    would look healthy."""

    def __init__(self, settings: Settings) -> None:
        devices = settings.used_devices
        on_cpu = devices.count("cpu")
        shared = max(1, len(os.sched_getaffinity(0)) // on_cpu) if on_cpu > 1 else None
        self._engines = [ProcessEngine(_on(settings, device, settings.threads or shared)) for device in devices]
        self._loaded: Loaded[Named] | None = None
        self.on_batch: Callable[[BatchSize], None] = lambda size: None
        """Called with each batch that one of them has run."""
        self.on_death: Callable[[BaseException], None] = lambda error: None
        """Called where one of them ends without having been told to."""
        for engine in self._engines:
            engine.on_batch = lambda size: self.on_batch(size)
            engine.on_death = lambda error: self.on_death(error)

    @property
    def loaded(self) -> Loaded[Named] | None:
        """What they answer from; None before all have it, and as soon as one of them has ended."""
        return self._loaded if all(engine.loaded for engine in self._engines) else None

    @property
    def waiting(self) -> int:
        """How many requests none of them has begun."""
        return sum(engine.waiting for engine in self._engines)

    @property
    def device_memory(self) -> Sequence[DeviceMemory]:
        """Of all of them."""
        return together(engine.device_memory for engine in self._engines)

    async def load(self) -> Loaded[Named]:
        """Starts all of them; raises the first error of any."""
        loading = [asyncio.create_task(engine.load()) for engine in self._engines]
        try:
            found = await asyncio.gather(*loading)
            if len({loaded.bundle.digest for loaded in found}) > 1:
                raise BundleError("the bundle was changed while it was loaded")
        except BaseException:
            for task in loading:
                task.cancel()
            await asyncio.wait(loading)
            await self.end()
            raise
        self._loaded = found[0]
        return found[0]

    async def predict(
        self,
        defence: Named,
        pixels: NDArray[np.uint8],
        *,
        deadline: float,
        cancelled: threading.Event,
        seed: int | None = None,
    ) -> Answer:
        """Gives the request to the one with the least to do."""
        alive = [engine for engine in self._engines if engine.loaded]
        if not alive:
            raise EngineStoppedError
        idlest = min(alive, key=lambda engine: engine.outstanding)
        return await idlest.predict(defence, pixels, deadline=deadline, cancelled=cancelled, seed=seed)

    def forget_ended(self) -> None:
        """Tells all of them whose clients have left."""
        for engine in self._engines:
            engine.forget_ended()

    async def end(self) -> None:
        """Ends all of them."""
        await asyncio.gather(*(engine.end() for engine in self._engines))


def _on(settings: Settings, device: str, threads: int | None) -> Settings:
    changes = {"device": device} | ({} if threads is None else {"threads": threads})
    return settings.model_copy(update=changes)
