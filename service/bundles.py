"""Which bundle answers, and how another takes its place without anybody noticing.

The new one is verified, loaded and warmed in an engine of its own while the old one serves. Then new requests go to the
new one; those that had begun with the old one, in whatever phase, end with it; and then it is closed. A request never
sees both.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mithridate.bundle import Bundle
from mithridate.errors import BundleError, MithridateError, OptionError
from service.batching import BatchSize
from service.device_memory import DeviceMemory, together
from service.engines import AnyEngine, make_engine
from service.loading import Loaded
from service.settings import Settings

logger = logging.getLogger("mithridate.service")


class SwapBusyError(MithridateError):
    """Another bundle is being loaded, or there is nothing to go back to."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A bundle that answers or has answered: where it lies, and what it was."""

    path: Path
    name: str
    digest: str


class _Generation:
    """One bundle's engine, and how many requests use it."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.bundle
        self.engine = make_engine(settings)
        self.users = 0
        self.unused = asyncio.Event()
        self.unused.set()

    def served(self, loaded: Loaded[Any]) -> Served:
        return Served(path=self.path, name=loaded.bundle.manifest.name, digest=loaded.bundle.digest)


class Bundles:
    """The one that is live, the one before it, and the way from one to the next. Everything runs in one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._live: _Generation = _Generation(_at(settings, settings.bundle))
        self._retiring: set[asyncio.Task[None]] = set()
        self._open = {self._live}
        self.current: Served | None = None
        """What answers; None while nothing does yet."""
        self.previous: Served | None = None
        """What answered before it, if anything did."""
        self.loading: str | None = None
        """What is being loaded to take its place, as it was named."""
        self.on_batch: Callable[[BatchSize], None] = lambda size: None
        """Called with each batch that an engine has run."""
        self.on_live: Callable[[Loaded[Any]], None] = lambda loaded: None
        """Called with what answers from now on."""
        self.on_death: Callable[[BaseException], None] = lambda error: None
        """Called where the engine that is live ends without having been told to."""
        self.on_retired: Callable[[], None] = lambda: None
        """Called when a bundle that was live has been closed."""
        self._listen(self._live)

    @property
    def engine(self) -> AnyEngine:
        """The one that new requests go to."""
        return self._live.engine

    @property
    def device_memory(self) -> Sequence[DeviceMemory]:
        """What the engine that is live, the one before it and the one that is being loaded hold of each GPU."""
        return together(generation.engine.device_memory for generation in self._open)

    @contextmanager
    def use(self) -> Iterator[AnyEngine]:
        """The engine that is live, which stays one for as long as the block lasts."""
        generation = self._live
        generation.users += 1
        generation.unused.clear()
        try:
            yield generation.engine
        finally:
            generation.users -= 1
            if not generation.users:
                generation.unused.set()

    async def load(self) -> None:
        """Loads the first one. Raises what its engine does."""
        loaded = await self._live.engine.load()
        self.current = self._live.served(loaded)
        self.on_live(loaded)

    async def swap(self, path: Path, *, named: str, digest: str | None = None) -> Served:
        """Puts the bundle at ``path`` live, which the caller has called ``named``; ``digest``: only if it is that one.

        Raises SwapBusyError while another is loaded, BundleError or another MithridateError where it cannot be served,
        and whatever else ends its engine; the one that is live goes on in any case.
        """
        if self.loading is not None:
            raise SwapBusyError(f"{self.loading} is being loaded; wait until that has ended")
        self.loading = named
        try:
            fresh = await self._prepare(path, digest)
            loaded = fresh.engine.loaded
            if loaded is None:  # it has ended since
                await self._close(fresh)
                raise OptionError("its engine has ended before it was live")
            old, self._live = self._live, fresh
            self._listen(fresh)
            self._listen(old)
            self.previous, self.current = self.current, fresh.served(loaded)
            self.on_live(loaded)
        finally:
            self.loading = None
        logger.info("live: %s (%s); before: %s", named, loaded.bundle.digest, self.previous and self.previous.digest)
        task = asyncio.create_task(self._retire(old))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return self.current

    async def roll_back(self) -> Served:
        """Puts the one before live again, if it is still what it was. Raises as ``swap`` does."""
        previous = self.previous
        if previous is None:
            raise SwapBusyError("there is no bundle before this one")
        return await self.swap(previous.path, named=previous.name, digest=previous.digest)

    async def reload(self) -> None:
        """Puts live what the configured path leads to by now, a link moved to another bundle, say. Raises nothing."""
        path = self._settings.bundle
        try:
            if self.current is not None:  # else it is being loaded
                await self.swap(path.resolve(), named=path.name)
        except Exception as error:
            logger.error("%s was not loaded, the bundle stays what it was: %s", path, error)

    async def end(self) -> None:
        """Ends all engines."""
        await self._live.engine.end()
        if self._retiring:
            await asyncio.wait(self._retiring)

    async def _retire(self, old: _Generation) -> None:
        await old.unused.wait()
        await self._close(old)
        logger.info("the bundle before this one is closed")
        del old  # else what is called now would find it in use
        self.on_retired()

    async def _prepare(self, path: Path, digest: str | None) -> _Generation:
        manifest = await asyncio.to_thread(Bundle.open, path, verify=False)
        _require(manifest.digest, digest)  # a first look, which costs nothing; the engine looks at every file
        fresh = _Generation(_at(self._settings, path))
        self._open.add(fresh)
        try:
            _require((await fresh.engine.load()).bundle.digest, digest)
        except BaseException:  # also where nobody waits for it any more
            await asyncio.shield(self._close(fresh))
            raise
        return fresh

    async def _close(self, generation: _Generation) -> None:
        try:
            await generation.engine.end()
        finally:
            self._open.discard(generation)

    def _listen(self, generation: _Generation) -> None:
        """Only the death of what is live is the service's: one that is being replaced takes its requests along."""

        def died(error: BaseException) -> None:
            if generation is self._live:
                self.on_death(error)
            else:
                logger.error("the engine of the bundle before this one has stopped: %s", error)

        generation.engine.on_batch = lambda size: self.on_batch(size)
        generation.engine.on_death = died


def _at(settings: Settings, path: Path) -> Settings:
    """Resolved: what a link leads to later is another bundle."""
    return settings.model_copy(update={"bundle": path.resolve()})


def _require(seen: str, wanted: str | None) -> None:
    if wanted is not None and seen != wanted:
        raise BundleError(f"it is not what it was: its digest is {seen}, it was {wanted}")
