"""An engine process: reads requests from its end of a socket, has an ``Engine`` answer them, and ends with the service.

The main thread reads, so that a client's leaving reaches the running adaptation between two of its steps; the engine's
thread computes and sends what it found. Where the other end is closed, whoever closed it and however, nobody is left
to answer: the process ends at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NoReturn

from mithridate.defenses import Budget, Defence
from mithridate.errors import BudgetExceededError, MithridateError
from service import garbage, logs
from service.batching import Answer, BatchSize, EngineStoppedError, Waiting
from service.device_memory import device_memory
from service.engine import Engine
from service.lab_defence import read_lab
from service.loading import Loaded
from service.settings import Settings
from service.wire import PREFIX, Message, WireError, decode, encode, sizes

logger = logging.getLogger("mithridate.service")


def main(descriptor: int) -> None:
    """Runs until the other end of the socket ``descriptor`` is closed or says so. Never returns."""
    # Sent to many processes at once, or by a terminal that it must not write to: the service decides.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as connection:
        try:
            _Worker(connection).run()
        except BaseException:
            logger.critical("the engine process ends", exc_info=True)
            _exit(1)
    _exit(0)


def _exit(code: int) -> NoReturn:
    """At once: the engine's thread may be in the middle of something that nobody waits for."""
    logging.shutdown()
    os._exit(code)


class _Worker:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._left: dict[int, threading.Event] = {}  # of what has not been answered
        self._engine: Engine

    def run(self) -> None:
        """Reads until there is nothing more."""
        hello = self._read()
        if hello is None:
            return
        settings = Settings(**hello["settings"])
        logs.configure(settings)
        self._engine = Engine(settings)
        self._engine.on_batch = self._ran
        self._engine.on_begin = self._begin
        self._engine.on_death = self._die
        self._engine.start().add_done_callback(self._say_loaded)
        while (message := self._read()) is not None:
            match message["type"]:
                case "ask":
                    self._ask(message)
                case "cancel":
                    self._cancel(message["ids"])
                case "close":  # while it closes, requests can still be cancelled
                    threading.Thread(target=self._close, name="closing", daemon=True).start()
                case other:
                    raise WireError(f"a message of type {other!r}")

    def _read(self) -> Message | None:
        prefix = self._receive(PREFIX.size)
        if prefix is None:
            return None
        header_bytes, body_bytes = sizes(prefix)
        header, body = self._receive(header_bytes), self._receive(body_bytes)
        return None if header is None or body is None else decode(header, body)

    def _receive(self, count: int) -> bytearray | None:
        """``count`` bytes, None where the other end was closed before them."""
        data = bytearray(count)
        view = memoryview(data)
        while view:
            try:
                got = self._connection.recv_into(view)
            except ConnectionError:
                got = 0
            if not got:
                return None
            view = view[got:]
        return data

    def _send(self, message: Message) -> None:
        parts = encode(message)
        try:
            with self._sending:
                for part in parts:
                    self._connection.sendall(part)
        except OSError:  # nobody reads: run() hears of it, too
            _exit(0)

    def _ask(self, message: Message) -> None:
        number, left, loaded = message["id"], threading.Event(), self._engine.loaded
        try:
            if loaded is None:
                raise EngineStoppedError
            request = self._engine.submit(
                read_lab(message["defence"], loaded) or loaded.defences[message["defence"]],
                message["pixels"],
                budget=Budget(deadline=message["deadline"], cancelled=left.is_set),
                seed=message["seed"],
                number=number,
                submitted=message["submitted"],
            )
        except EngineStoppedError as error:
            self._send(_describe(number, error))
            return
        self._left[number] = left
        request.answer.add_done_callback(lambda answer: self._say_answered(number, answer))

    def _cancel(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            left = self._left.get(number)  # the engine's thread may be answering it
            if left is not None:
                left.set()
        self._engine.forget_ended()

    def _close(self) -> None:
        self._engine.close()
        _exit(0)

    def _begin(self, batch: Sequence[Waiting]) -> None:
        self._send({"type": "begun", "ids": [request.number for request in batch]})

    def _ran(self, size: BatchSize) -> None:
        self._send(
            {"type": "batch", "requests": size.requests, "images": size.images, "device_memory": device_memory()}
        )

    def _die(self, error: BaseException) -> None:
        self._send({"type": "dying", "said": f"{type(error).__name__}: {error}"})
        _exit(1)

    def _say_loaded(self, loading: Future[Loaded[Defence]]) -> None:
        error = loading.exception()
        if error is not None:
            self._send({"type": "failed", **_error(error)})
            return
        loaded = loading.result()
        garbage.set_aside()
        self._send(
            {
                "type": "loaded",
                "digest": loaded.bundle.digest,
                "tuning": loaded.resources.tuning,
                "defences": dict(loaded.descriptions),
                "costs": dict(loaded.costs),
                "seconds": dict(loaded.seconds),
                "default": loaded.default,
                "device_memory": device_memory(),
            }
        )

    def _say_answered(self, number: int, answered: Future[Answer]) -> None:
        self._left.pop(number, None)
        error = answered.exception()
        if error is not None:
            self._send(_describe(number, error))
            return
        answer = answered.result()
        self._send(
            {
                "type": "answer",
                "id": number,
                "prediction": answer.prediction,
                "queue_seconds": answer.queue_seconds,
                "requests": answer.batch.requests,
                "images": answer.batch.images,
            }
        )


def _describe(number: int, error: BaseException) -> Message:
    if not isinstance(error, MithridateError):
        logger.error("a request failed", exc_info=error)
    return {"type": "error", "id": number, **_error(error)}


def _error(error: BaseException) -> dict[str, Any]:
    reason = error.reason if isinstance(error, BudgetExceededError) else None
    return {"kind": type(error).__name__, "said": str(error), "reason": reason}
