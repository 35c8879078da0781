"""A bounded place to decode images in: so many at once, of so many pixels together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

_Result = TypeVar("_Result")

THREADS = 2
"""Images decoded at once. Pillow gives up the interpreter lock while it decodes."""


class DecodePool:
    """Runs decoders in threads, first come, first served, while the pixels in hand stay under a limit.

    The pixels are what bounds memory: a decoder takes 13 to 26 bytes for each, whatever the file's size. An image of
    more than the limit runs alone. What has begun is counted until its thread is done, also where nobody waits for it
    any longer. To be used from one event loop.
    """

    def __init__(self, *, max_pixels: int, threads: int = THREADS) -> None:
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")
        self._max_pixels = max_pixels
        self._held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def held(self) -> int:
        """Pixels of the images that are being decoded, or handed to a thread."""
        return self._held

    async def run(self, pixels: int, decode: Callable[[], _Result]) -> _Result:
        """What ``decode`` returns or raises; ``pixels`` is what it will hold."""
        loop = asyncio.get_running_loop()
        weight = min(pixels, self._max_pixels)
        await self._enter(loop, weight)
        try:
            job = self._executor.submit(decode)
        except RuntimeError:  # shut down
            self._leave(weight)
            raise

        def leave() -> None:
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._leave, weight)

        job.add_done_callback(lambda _: leave())
        return await asyncio.wrap_future(job)

    def shutdown(self) -> None:
        """Waits for what runs, and forgets the rest."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    async def _enter(self, loop: asyncio.AbstractEventLoop, weight: int) -> None:
        if not self._waiting and self._held + weight <= self._max_pixels:
            self._held += weight
            return
        place = loop.create_future()
        self._waiting.append((weight, place))
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # let in and called off at once
                self._leave(weight)
            else:
                self._admit()
            raise

    def _leave(self, weight: int) -> None:
        self._held -= weight
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            weight, place = self._waiting[0]
            if not place.cancelled():
                if self._held + weight > self._max_pixels:
                    return
                self._held += weight
                place.set_result(None)
            self._waiting.popleft()
