"""A bounded number of kept-alive connections, and the requests under way on them.

Callbacks rather than coroutines: a task for each request would cost more than the request.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable

from attack_client.wire import AnswerReader, MalformedAnswerError, Target
from mithridate.errors import InputError

REFUSED, RESET, UNREACHABLE = "refused", "reset", "unreachable"
TIMEOUT, NOT_SENT, MALFORMED = "timeout", "not sent in time", "malformed answer"
CONNECTION_ERRORS = frozenset({REFUSED, RESET, UNREACHABLE, MALFORMED})
"""Errors that cost the client no time: one that loops on them would do nothing else."""


class Flight:
    """One request, from when it was due until it was answered or given up; times in seconds of ``perf_counter``."""

    __slots__ = ("content", "done", "due", "error", "holder", "number", "resent", "sent", "status", "taken", "timer")

    def __init__(self, number: int, content: bytes, due: float, taken: float) -> None:
        self.number = number
        self.content = content
        self.due = due
        self.taken = taken
        self.sent: float | None = None
        self.done: float | None = None
        self.status = 0
        self.error: str | None = None
        self.resent = False
        self.holder: Connection | asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None


class Connection(asyncio.Protocol):
    """One connection; what happens on it is told to the pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._reader = AnswerReader()
        self.flight: Flight | None = None
        self.answers = 0
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, flight: Flight) -> None:
        """Sends it, and waits for the answer."""
        assert self._transport is not None
        self.flight, flight.holder = flight, self
        self._reader = AnswerReader()
        if flight.sent is None:
            flight.sent = time.perf_counter()
        self._transport.write(flight.content)

    def data_received(self, data: bytes) -> None:
        if self.flight is None:  # nobody asked
            self.abort()
            return
        try:
            complete = self._reader.feed(data)
        except MalformedAnswerError:
            self._end(MALFORMED)
            return
        if complete:
            self._answered()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._pool.gone(self)
        flight = self.flight
        if flight is None:
            return
        if exc is None and self._reader.end():
            self._answered()
        elif self.answers and not self._reader.begun and not flight.resent:
            # The server closed an idle connection while our request was on its way: it never saw it.
            self.flight, flight.holder, flight.resent = None, None, True
            self._pool.place(flight)
        else:
            self._end(RESET)

    def abort(self) -> None:
        """Closes at once."""
        if self._transport is not None:
            self._transport.abort()

    def _answered(self) -> None:
        flight, self.flight = self.flight, None
        assert flight is not None
        flight.done = time.perf_counter()
        flight.status = self._reader.status
        self.answers += 1
        if self._reader.keeps_alive:
            self._pool.free(self)
        else:
            self.abort()
        error = None if flight.status < 400 else f"http {flight.status}"
        self._pool.finish(flight, error)

    def _end(self, error: str) -> None:
        flight, self.flight = self.flight, None
        assert flight is not None
        self.abort()
        self._pool.finish(flight, error)


class Pool:
    """At most ``connections`` at once. A request that finds none free waits, and grows older.

    ``timeout_seconds`` counts from when a request was due. ``finished`` is told of each, however it ended.
    """

    def __init__(
        self, target: Target, *, connections: int, timeout_seconds: float, finished: Callable[[Flight], None]
    ) -> None:
        self._target = target
        self._limit = connections
        self._timeout = timeout_seconds
        self._finished = finished
        self._loop = asyncio.get_running_loop()
        self._tls = target.tls()
        self._address: tuple[str, int] = (target.host, target.port)
        self._all: set[Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._idle: list[Connection] = []
        self._waiting: deque[Flight] = deque()

    async def open(self) -> None:
        """Finds the address, once, and connects for the first time. Raises InputError where nobody is there."""
        problem = "no address"
        try:
            found = await self._loop.getaddrinfo(*self._address, type=socket.SOCK_STREAM)
        except OSError as error:
            raise InputError(f"{self._target.url} does not answer ({error.strerror or error})") from error
        for *_, address in found:
            self._address = (str(address[0]), int(address[1]))
            try:
                async with asyncio.timeout(self._timeout):
                    self._idle.append(await self._connection())
                return
            except OSError as error:  # TimeoutError is one
                problem = str(error) or f"no connection within {self._timeout:g} s"
        raise InputError(f"{self._target.url} does not answer ({problem}); is the service running?")

    def submit(self, flight: Flight) -> None:
        """Sends it as soon as a connection is free."""
        left = flight.due + self._timeout - time.perf_counter()
        flight.timer = self._loop.call_later(max(0.0, left), self._expire, flight)
        self.place(flight)

    def place(self, flight: Flight) -> None:
        """On a free connection, a new one, or in the queue."""
        if self._idle:
            self._idle.pop().send(flight)  # the one used last: it is the least likely to be closed by now
        elif len(self._all) + len(self._connecting) < self._limit:
            task = self._loop.create_task(self._connect(flight))
            flight.holder = task
            self._connecting.add(task)
        elif flight.resent:
            self._waiting.appendleft(flight)
        else:
            self._waiting.append(flight)

    def free(self, connection: Connection) -> None:
        """This connection can take the next one."""
        if (flight := self._next()) is None:
            self._idle.append(connection)
        else:
            connection.send(flight)

    def gone(self, connection: Connection) -> None:
        """This connection is closed."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._refill()

    def finish(self, flight: Flight, error: str | None) -> None:
        """It is over; ``error`` None where it was answered."""
        if flight.timer is not None:
            flight.timer.cancel()
        flight.error, flight.holder = error, None
        if flight.done is None:
            flight.done = time.perf_counter()
        self._finished(flight)

    async def close(self) -> None:
        """Closes all connections, whatever is under way."""
        self._waiting.clear()
        for connection in tuple(self._all):
            connection.flight = None
            connection.abort()
        tasks = tuple(self._connecting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports close in the next turn

    async def _connection(self) -> Connection:
        host, port = self._address
        name = self._target.host if self._tls else None
        _, connection = await self._loop.create_connection(
            lambda: Connection(self), host, port, ssl=self._tls, server_hostname=name
        )
        self._all.add(connection)
        return connection

    async def _connect(self, flight: Flight) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            connection = await self._connection()
        except asyncio.CancelledError:  # it ran out of time, or we are closed
            self._connecting.discard(task)
            self._refill()
            return
        except OSError as error:
            self._connecting.discard(task)
            self.finish(flight, _kind(error))
            self._refill()
            return
        self._connecting.discard(task)
        if connection.lost:  # accepted and hung up on at once: on it nobody would ever answer
            if flight.done is None:
                self.finish(flight, RESET)
            self._refill()
        elif flight.done is None:
            connection.send(flight)
        else:
            self.free(connection)

    def _next(self) -> Flight | None:
        while self._waiting:
            flight = self._waiting.popleft()
            if flight.done is None:
                return flight
        return None

    def _refill(self) -> None:
        """Where a connection ended, the next in the queue may open another."""
        if (flight := self._next()) is not None:
            self.place(flight)

    def _expire(self, flight: Flight) -> None:
        holder = flight.holder
        if isinstance(holder, Connection):
            holder.flight = None
        self.finish(flight, TIMEOUT if flight.sent is not None else NOT_SENT)
        if isinstance(holder, Connection):
            holder.abort()
        elif holder is not None:
            holder.cancel()


def _kind(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return REFUSED
    if isinstance(error, ConnectionError) and not isinstance(error, ssl.SSLError):
        return RESET
    return UNREACHABLE
