"""Running the application: a port that is really free, an engine beside it, an end that loses no request."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from mithridate.bundle import Bundle
from mithridate.errors import MithridateError, OptionError
from service import garbage, logs
from service.app import Service, create_app
from service.connections import Guard, connection_options
from service.door import Door
from service.settings import Settings

_SWITCH_SECONDS = 0.0002
"""After so long a thread that decodes gives way to the event loop, which asks for that at every call of the system;
Python's own 5 ms are as long as a small answer takes."""

LOG_LEVELS = ("debug", "info", "warning", "error")


class BrokenServiceError(MithridateError):
    """The service has ended by itself: its engine died or hung. Command line: one line on stderr and exit code 1."""


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then drains.

    Raises OptionError where the bundle or the port cannot be used, BrokenServiceError where the engine ended by itself.
    """
    if settings.log_level not in LOG_LEVELS:
        raise OptionError(f"log level {settings.log_level!r} is unknown; allowed: {', '.join(LOG_LEVELS)}")
    logs.configure(settings)
    Bundle.open(settings.bundle, verify=False)  # a wrong path is said before anything is started
    # Refuses what must not be listened at.
    app = create_app(settings.model_copy(update={"isolation": settings.isolation or "process"}))
    listener = _bind(settings)
    service: Service = app.state.service
    options = connection_options(settings, Door(service).turn_away)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=settings.log_level,
        access_log=False,  # the middleware writes one line a request, with its id
        server_header=False,
        proxy_headers=False,  # whose address a client has is what the socket says, not a header that anybody can send
        timeout_graceful_shutdown=settings.drain_timeout_s,
        **options,
    )
    server = _DrainingServer(config, service, options["http"].guard, settings.drain_seconds)
    service.on_failure = server.stop
    service.on_settled = garbage.set_aside
    host, port = listener.getsockname()[:2]
    logging.getLogger("mithridate.service").info("listening on http://%s:%d", host, port)
    if service.settings.isolation == "process":  # else what computes is a thread, too
        sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        server.run(sockets=[listener])
    finally:
        garbage.take_back()
    if service.failure:
        raise (BrokenServiceError if service.broken else OptionError)(service.failure)


class _DrainingServer(uvicorn.Server):
    """On the first signal: not ready at once, each answer the last one on its connection, the port closed after the
    drain time, and whatever was accepted answered."""

    def __init__(self, config: uvicorn.Config, service: Service, guard: Guard, drain_seconds: float) -> None:
        super().__init__(config)
        self._service = service
        self._guard = guard
        self._drain_seconds = drain_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Also listens to SIGHUP, which asks for the bundle that the configured path leads to by now."""
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._service.reload)
        await super().startup(sockets)

    def stop(self) -> None:
        """Ends the server."""
        self._guard.draining = self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the port first of all. Whoever the system has connected by then is let in: to them that is a
        connection like any other, and closing would break it."""
        connected = _accept_all(sockets or (), most=self.config.backlog)
        for server in self.servers:
            server.close()
        self._guard.leaving = True
        for connection in connected:
            with suppress(OSError):  # the client has gone again
                await asyncio.get_running_loop().connect_accepted_socket(self._make_protocol, connection)
        await super().shutdown(sockets)

    def _make_protocol(self) -> Any:
        """As uvicorn makes one for each connection."""
        protocol: Any = self.config.http_protocol_class
        return protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:  # a second signal: do not wait
            self.force_exit = sig == signal.SIGINT
            self.stop()
            return
        self._service.drain()
        self._guard.draining = True
        if self._drain_seconds:
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(loop.call_later, self._drain_seconds, self.stop)
        else:
            self.stop()


def _accept_all(listeners: Iterable[socket.socket], *, most: int) -> list[socket.socket]:
    """Those who are connected and whom nobody has accepted, ``most`` a listener."""
    found: list[socket.socket] = []
    for listener in listeners:
        for _ in range(most):
            try:
                connection, _address = listener.accept()
            except ConnectionAbortedError:  # that one has gone again
                continue
            except OSError:  # there is no other, as a rule
                break
            connection.setblocking(False)
            found.append(connection)
    return found


def _bind(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol must be named: asyncio sends small packets at once (TCP_NODELAY) only where it is, and without that
    # every answer on a kept-alive connection waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen()  # until then Linux lets a second server bind the same port
    except OSError as error:
        listener.close()
        raise OptionError(
            f"cannot listen at {settings.host}:{settings.port} ({error.strerror or error}); choose another --port"
        ) from error
    listener.set_inheritable(True)
    return listener
