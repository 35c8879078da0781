"""Pure ASGI middleware: what every answer has with it, and what is told of it: an id, times, an access line, a span."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import NOSNIFF
from service.record import REQUEST_ID, Record, identify, key_id, record_of
from service.tracing import Tracing

logger = logging.getLogger("mithridate.access")

_EVERYWHERE = [(name.lower().encode(), value.encode()) for name, value in NOSNIFF.items()]


class RequestMiddleware:
    """Takes the client's ``X-Request-ID`` where it is plain, else makes one; puts it on the answer and in the log.

    Every answer forbids browsers to guess its type; those that took phases get them as ``Server-Timing``.
    ``log_client_address``: whether access lines have it.
    """

    def __init__(self, app: ASGIApp, *, tracing: Tracing, log_client_address: bool = False) -> None:
        self.app = app
        self._tracing = tracing
        self._log_client_address = log_client_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        identity = identify(Headers(scope=scope).get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = identity
        record, token = record_of(scope), REQUEST_ID.set(identity)
        started, status = time.perf_counter(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.raw.extend(_EVERYWHERE)
                headers["X-Request-ID"] = identity
                if record.timings_ms is not None:
                    headers["Server-Timing"] = server_timing(record.timings_ms)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            ended = time.perf_counter()
            self._log(scope, record, status, 1000 * (ended - started), identity)
            self._tracing.request(scope, record, status=status, started=started, ended=ended)
            REQUEST_ID.reset(token)

    def _log(self, scope: Scope, record: Record, status: int, elapsed_ms: float, identity: str) -> None:
        client = scope.get("client")
        log_access(
            identity,
            scope["method"],
            quote(scope["path"]),  # decoded, it may hold line breaks; without the query: it may hold secrets
            status,
            elapsed_ms,
            key_id=key_id(scope),
            defense=record.defense,
            outcome=record.outcome,
            client=client[0] if client and self._log_client_address else None,
        )


def log_access(identity: str, method: str, path: str, status: int, elapsed_ms: float, **known: str | None) -> None:
    """One line, and its fields for JSON; what is None is left out."""
    if not logger.isEnabledFor(logging.INFO):
        return
    said = {name: value for name, value in known.items() if value is not None}
    fields: dict[str, Any] = {
        "request_id": identity,
        "method": method,
        "path": path,
        "status": status,
        "ms": round(elapsed_ms, 3),
        **said,
    }
    line = f"{method} {path} {status} {elapsed_ms:.1f}ms id={identity}"
    logger.info("%s", " ".join([line, *(f"{name}={value}" for name, value in said.items())]), extra={"fields": fields})


def server_timing(timings_ms: Mapping[str, float]) -> str:
    """The header's value (W3C Server Timing): ``queue;dur=0.1, decode;dur=0.4``, milliseconds."""
    return ", ".join(f"{phase};dur={milliseconds:.3f}" for phase, milliseconds in timings_ms.items())
