"""An engine in a process of its own, as the service sees it: the event loop sends, waits, and never computes.

The process is spawned, never forked (torch and CUDA do not survive a fork), and speaks the frames of ``service.wire``
over a pair of sockets. It ends when its end of them is closed, so it never outlives the service, however that ends.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mithridate import errors
from mithridate.bundle import Bundle
from mithridate.errors import BudgetExceededError, BundleError, MithridateError
from mithridate.evaluation.card import read_card
from service.batching import Answer, BatchSize, EngineStoppedError
from service.device_memory import DeviceMemory
from service.loading import Loaded, Named, Shown
from service.settings import Settings
from service.wire import PREFIX, Buffer, Message, WireError, decode, encode, sizes

logger = logging.getLogger("mithridate.service")

_MAIN = (
    "import json, os, sys; os.nice(int(sys.argv[3])); sys.path[:] = json.loads(sys.argv[1]); "
    "from service.engine_worker import main; main(int(sys.argv[2]))"
)
_NEEDED = (
    "bundle",
    "defense",
    "offer",
    "arch",
    "device",
    "threads",
    "max_batch_images",
    "max_neighbors",
    "max_steps",
    "max_passes",
    "seed",
    "log_level",
    "log_format",
)
"""The settings that an engine looks at. What else there is, keys among it, is not sent."""

_READ_AHEAD = 2**20
_LOOKED_EVERY_SECONDS = 1.0
_LAST_SECONDS = 20.0
"""So long a process that was told to close may take for the step it is in; then it is killed."""


class EngineDiedError(MithridateError):
    """The process has ended without having been told to."""


class RemoteError(Exception):
    """What went wrong in the engine process was no error of ours; its log has the traceback."""


@dataclass(frozen=True)
class Elsewhere:
    """A defence that the engine process has, by its canonical name."""

    name: str


@dataclass(kw_only=True, eq=False)
class _Asked:
    """A request that the process has not answered: ``begun`` once it works on it, ``told`` once it knows that nobody
    waits any more. ``deadline``: the ``time.monotonic()`` instant that ends it."""

    answer: asyncio.Future[Answer]
    deadline: float
    cancelled: threading.Event
    images: int
    begun: bool = False
    told: bool = False


@dataclass(kw_only=True)
class _Child:
    """The process and the connection to it."""

    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    loaded: asyncio.Future[Message] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class ProcessEngine:
    """``Engine``, with the work in another process. Everything is called in one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loaded: Loaded[Named] | None = None
        self._asked: dict[int, _Asked] = {}
        self._numbers = itertools.count()
        self._outbox: list[Buffer] = []
        self._child: _Child | None = None
        self._listening: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._closing = False
        self.device_memory: Sequence[DeviceMemory] = ()
        """What the process holds of each GPU, as it said with its latest batch."""
        self._last_words: str | None = None
        self.on_batch: Callable[[BatchSize], None] = lambda size: None
        """Called with each batch that it has run."""
        self.on_death: Callable[[BaseException], None] = lambda error: None
        """Called where the process ends without having been told to."""

    @property
    def loaded(self) -> Loaded[Named] | None:
        """What it answers from; None before it is loaded, and as soon as nobody answers any more."""
        return self._loaded

    @property
    def waiting(self) -> int:
        """How many requests it has not begun."""
        return sum(not asked.begun for asked in self._asked.values())

    @property
    def outstanding(self) -> int:
        """Images of the requests that it has not answered."""
        return sum(asked.images for asked in self._asked.values())

    @property
    def process_id(self) -> int | None:
        """Of the process, where there is one."""
        return None if self._child is None else self._child.process.pid

    async def load(self) -> Loaded[Named]:
        """Starts the process, which verifies and loads the bundle and answers once with every defence.

        Raises the error it gives up with, and EngineDiedError where it ends without one.
        """
        try:
            self._child = child = await _spawn(self._settings)
            self._listening = asyncio.create_task(self._listen(child))
            self._watching = asyncio.create_task(self._watch(child))
            found = await child.loaded
            loaded = await asyncio.to_thread(_show, self._settings, found)
        except BaseException:
            await asyncio.shield(self._kill())
            raise
        self._loaded = loaded
        return loaded

    async def predict(
        self,
        defence: Named,
        pixels: NDArray[np.uint8],
        *,
        deadline: float,
        cancelled: threading.Event,
        seed: int | None = None,
    ) -> Answer:
        """Answers for uint8 ``pixels`` ``[N, C, H, W]``; ``deadline`` is a ``time.monotonic()`` instant, a clock that
        all processes of a machine share.

        Raises BudgetExceededError where the deadline passes or ``cancelled`` is set before there is an answer, and
        EngineStoppedError where there will be none.
        """
        if self._loaded is None or self._closing:
            raise EngineStoppedError
        number = next(self._numbers)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        asked = self._asked[number] = _Asked(answer=answer, deadline=deadline, cancelled=cancelled, images=len(pixels))
        self._send(
            {
                "type": "ask",
                "id": number,
                "defence": defence.name,
                "pixels": pixels,
                "deadline": deadline,
                "seed": seed,
                "submitted": time.perf_counter(),
            }
        )
        try:
            return await answer
        finally:
            if answer.cancelled():
                self._cancel({number: asked})

    def forget_ended(self) -> None:
        """Tells the process of those whose client has left: it stops working for them."""
        self._cancel({number: asked for number, asked in self._asked.items() if asked.cancelled.is_set()})

    async def end(self) -> None:
        """Lets the running batch end and takes no other; what waits gets EngineStoppedError."""
        self._closing = True
        child = self._child
        if child is not None and self._listening is not None:
            self._send({"type": "close"})
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._listening), _LAST_SECONDS)
        await self._kill()

    async def _kill(self) -> None:
        """Ends the process, if it has not ended, and everything that belonged to it."""
        self._closing, self._loaded = True, None
        child = self._child
        if child is None:
            return
        child.loaded.cancel()
        if self._watching is not None:
            self._watching.cancel()
        child.process.kill()
        await asyncio.to_thread(child.process.wait)
        if self._listening is not None:
            await asyncio.wait([self._listening])
        child.writer.close()
        with suppress(OSError):
            await child.writer.wait_closed()
        self._refuse()

    def _send(self, message: Message) -> None:
        """With all else that is sent in this turn of the event loop: the system is asked once."""
        parts = encode(message)
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._post)
        self._outbox += parts

    def _post(self) -> None:
        parts, self._outbox = self._outbox, []
        if self._child is not None and not self._child.writer.is_closing():
            self._child.writer.writelines(parts)

    def _cancel(self, leaving: dict[int, _Asked]) -> None:
        told = {number: asked for number, asked in leaving.items() if not asked.told and number in self._asked}
        for asked in told.values():
            asked.told = True
        if told:
            self._send({"type": "cancel", "ids": list(told)})

    def _refuse(self) -> None:
        asked, self._asked = list(self._asked.values()), {}
        for one in asked:
            if not one.answer.done():
                one.answer.set_exception(EngineStoppedError())

    async def _listen(self, child: _Child) -> None:
        """Until the process has no more to say. If that was not expected, nobody is left waiting, and nothing claims
        to be ready."""
        try:
            while True:
                message = await _read(child.reader)
                self._hear(message, child)
                if message["type"] == "answer":
                    # A batch's come at once. One a turn of the loop, or whoever asks meanwhile waits for all of them.
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, OSError):  # the other end was closed: the process has ended, or will
            pass
        except Exception as error:
            logger.exception("what the engine process says cannot be read")
            self._last_words = f"{type(error).__name__}: {error}"
            child.process.kill()
        self._loaded = None
        self._refuse()
        if self._closing and child.loaded.done():
            return
        died = EngineDiedError(self._last_words or f"the engine process {await _how_it_ended(child.process)}")
        if not child.loaded.done():
            child.loaded.set_exception(died)
        else:
            self.on_death(died)

    async def _watch(self, child: _Child) -> None:
        """Ends a process that hangs: past its deadline a request gets no other step, and one takes much less than
        ``engine_hang_s``. Only what is overdue when looked at twice counts, since its answer may wait to be read."""
        allowed, seen = self._settings.engine_hang_s, frozenset[int]()
        while not self._closing:
            await asyncio.sleep(_LOOKED_EVERY_SECONDS)
            since = time.monotonic() - allowed
            overdue = frozenset(number for number, asked in self._asked.items() if asked.deadline < since)
            if overdue & seen:
                said = f"the engine process ({child.process.pid}) hangs: {len(overdue)} requests are unanswered"
                self._last_words = f"{said} {allowed:g} s after their deadlines"
                child.process.kill()
                return
            seen = overdue

    def _hear(self, message: Message, child: _Child) -> None:
        match message["type"]:
            case "loaded" | "failed" if child.loaded.done():  # nobody waits for it any more
                pass
            case "loaded":
                self.device_memory = message["device_memory"]
                child.loaded.set_result(message)
            case "failed":
                child.loaded.set_exception(_error(message))
            case "begun":
                for number in message["ids"]:
                    if number in self._asked:
                        self._asked[number].begun = True
            case "batch":
                self.device_memory = message["device_memory"]
                self.on_batch(BatchSize(requests=message["requests"], images=message["images"]))
            case "answer" | "error":
                asked = self._asked.pop(message["id"], None)
                if asked is not None and not asked.answer.done():
                    _settle(asked.answer, message)
            case "dying":  # it is as good as dead; what it knows of the reason is more than its exit status says
                self._last_words = message["said"]
                self._loaded = None
                self._refuse()
            case other:
                raise WireError(f"a message of type {other!r}")


async def _spawn(settings: Settings) -> _Child:
    ours, theirs = socket.socketpair()
    with theirs:
        # A group of its own: Ctrl-C in a terminal is for the service, which lets its requests end. Not a session of
        # its own, among which Linux would share out processors whatever their priorities.
        process = await asyncio.to_thread(
            subprocess.Popen,
            [
                sys.executable,
                *_options(),
                "-c",
                _MAIN,
                json.dumps(sys.path),
                str(theirs.fileno()),
                str(settings.engine_nice),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            process_group=0,
            env={name: value for name, value in os.environ.items() if not name.upper().startswith("MITHRIDATE_")},
        )
    ours.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=ours, limit=_READ_AHEAD)
    logger.info("engine process %d for %s", process.pid, settings.device)
    hello = settings.model_dump(mode="json", include=set(_NEEDED), exclude_unset=True)
    writer.writelines(encode({"settings": hello}))
    return _Child(process=process, reader=reader, writer=writer)


def _options() -> Sequence[str]:
    """Of the interpreter, that it warns of what this one warns of."""
    return [f"-W{option}" for option in sys.warnoptions]


async def _read(reader: asyncio.StreamReader) -> Message:
    header_bytes, body_bytes = sizes(await reader.readexactly(PREFIX.size))
    header = await reader.readexactly(header_bytes)
    return decode(header, bytearray(await reader.readexactly(body_bytes)))


def _show(settings: Settings, found: Message) -> Loaded[Named]:
    """What is told of the bundle that the process has loaded. It has been verified there, so it is not again here."""
    bundle = Bundle.open(settings.bundle, verify=False)
    if bundle.digest != found["digest"]:
        raise BundleError(f"bundle {settings.bundle} was changed while it was loaded")
    return Loaded(
        bundle=bundle,
        resources=Shown(exemplars=bundle.exemplars(), tuning=found["tuning"]),
        defences={name: Elsewhere(name) for name in found["defences"]},
        descriptions=found["defences"],
        costs=found["costs"],
        seconds=found["seconds"],
        default=found["default"],
        card=read_card(bundle.path, bundle.digest),
    )


def _settle(answer: asyncio.Future[Answer], message: Message) -> None:
    if message["type"] == "error":
        answer.set_exception(_error(message))
        return
    size = BatchSize(requests=message["requests"], images=message["images"])
    answer.set_result(Answer(prediction=message["prediction"], queue_seconds=message["queue_seconds"], batch=size))


def _error(message: Message) -> Exception:
    """The library's error of that name; of others only what they said."""
    name, said = message["kind"], message["said"]
    if message["reason"] is not None:
        return BudgetExceededError(message["reason"])
    if name == EngineStoppedError.__name__:
        return EngineStoppedError()
    kind: Any = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, MithridateError):
        found: Exception = kind(said)
        return found
    return RemoteError(f"{name}: {said}")


async def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    """In words. The socket is closed a moment before the status can be had."""
    for _ in range(100):
        status = process.poll()
        if status is not None:
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            return f"({process.pid}) {how}"
        await asyncio.sleep(0.01)
    return f"({process.pid}) does not answer"
