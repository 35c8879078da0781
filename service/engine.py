"""The engine: one thread that owns torch. The event loop hands it work and waits; it never computes."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.bundle import Bundle
from mithridate.defenses import (
    Budget,
    Defence,
    Prediction,
    Resources,
    build_defence,
    describe_defence,
    parse_defence,
)
from mithridate.devices import resolve_device, use_threads
from mithridate.errors import BudgetExceededError, ModelError, OptionError
from mithridate.types import to_images
from service.settings import Settings

logger = logging.getLogger("mithridate.service")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A verified bundle and its defences, by canonical name; ``default`` is one of them."""

    bundle: Bundle
    resources: Resources
    defences: dict[str, Defence]
    descriptions: dict[str, str]
    default: str

    def defence(self, text: str | None) -> Defence:
        """The defence a request names, or the default. Raises OptionError where it is not offered."""
        if text is None:
            return self.defences[self.default]
        found = self.defences.get(text) or self.defences.get(self._canonical(text))
        if found is None:
            raise OptionError(f"defence {text!r} is not offered here; allowed: {', '.join(self.defences)}")
        return found

    def _canonical(self, text: str) -> str:
        try:
            return parse_defence(text)(self.resources).name
        except ModelError:  # it needs a head, and this network has none
            return text


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prediction and how long it waited for the engine."""

    prediction: Prediction
    queue_seconds: float


class Engine:
    """Loads a bundle and answers from it, one request at a time, in a thread of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self.loaded: Loaded | None = None
        self.service_seconds = 0.05
        """Moving average of the time a request takes here; what Retry-After is computed from."""

    async def load(self) -> Loaded:
        """Verifies and loads the bundle and answers once with every defence; only then is the service ready."""
        loop = asyncio.get_running_loop()
        self.loaded = await loop.run_in_executor(self._executor, self._load)
        return self.loaded

    async def predict(
        self, defence: Defence, pixels: NDArray[np.uint8], *, deadline: float, cancelled: threading.Event
    ) -> Answer:
        """Answers for uint8 ``pixels`` ``[N, C, H, W]``; ``deadline`` is a ``time.monotonic()`` instant.

        Raises BudgetExceededError where the deadline passes or ``cancelled`` is set before there is an answer.
        """
        loop = asyncio.get_running_loop()
        budget = Budget(deadline=deadline, cancelled=cancelled.is_set)
        submitted = time.perf_counter()
        return await loop.run_in_executor(self._executor, self._predict, defence, pixels, budget, submitted)

    def close(self) -> None:
        """Lets the running request end and takes no other."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _load(self) -> Loaded:
        settings = self._settings
        use_threads(settings.threads)
        bundle = Bundle.open(settings.bundle)
        resources = Resources.load(bundle, device=resolve_device(settings.device), allow_factory=settings.arch)
        offered = settings.offered if resources.classifier.has_head else _without_head(settings)
        made = {text: build_defence(text, resources) for text in offered}
        defences = {defence.name: defence for defence in made.values()}
        loaded = Loaded(
            bundle=bundle,
            resources=resources,
            defences=defences,
            descriptions={name: describe_defence(defence) for name, defence in defences.items()},
            default=made[settings.defense].name,
        )
        self._warm(loaded)
        return loaded

    def _warm(self, loaded: Loaded) -> None:
        """One answer from every defence, on an exemplar; a single step where the whole network is fine-tuned."""
        pixels = loaded.resources.exemplars.pixels(torch.tensor([0])).numpy()
        for defence in loaded.defences.values():
            started = time.perf_counter()
            defence.predict(
                to_images(torch.from_numpy(pixels)), generator=self._generator(), budget=Budget(max_steps=1)
            )
            logger.info("warmed %s in %.0f ms", defence.name, 1000 * (time.perf_counter() - started))

    def _predict(self, defence: Defence, pixels: NDArray[np.uint8], budget: Budget, submitted: float) -> Answer:
        started = time.perf_counter()
        budget.check()
        images = to_images(torch.from_numpy(pixels))
        prediction = defence.predict(images, generator=self._generator(), budget=budget)
        interrupted = {a.stop_reason for a in prediction.adaptations if a is not None} & {"deadline", "cancelled"}
        if interrupted:  # adaptation that was cut short is a weaker defence: a client could ask for it
            raise BudgetExceededError(interrupted.pop())
        self.service_seconds += 0.1 * (time.perf_counter() - started - self.service_seconds)
        return Answer(prediction=prediction, queue_seconds=started - submitted)

    def _generator(self) -> torch.Generator:
        """A secret seed a request, unless the settings fix one."""
        seed = secrets.randbits(62) if self._settings.seed is None else self._settings.seed
        return torch.Generator().manual_seed(seed)


def _without_head(settings: Settings) -> tuple[str, ...]:
    """Leaves out what cannot be, but never what was asked for by name."""
    return tuple(name for name in settings.offered if name != "rmc" or name == settings.defense)
