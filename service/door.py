"""Where a request to predict is turned away while there is no room: before routes, options and keys are looked at.

Under several times the load that can be answered most requests end here, and what each of them costs is taken from the
rest. Therefore there are two doors. One is the outermost place of the application, a quarter of the way through the
framework. Before it, where a whole plain request lies in one piece in the connection's hands, ``Door`` answers without
a parser, for a sixth of that again; whatever is not plain goes the usual way to the same answer.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import suppress
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.middleware import log_access
from service.problems import MEDIA_TYPE, NOSNIFF, Problem, document, respond
from service.record import identify

if TYPE_CHECKING:
    from service.app import Service

_PATH = "/v1/predict"

_START = b"POST " + _PATH.encode()
_PLAIN = re.compile(
    re.escape(_START) + rb"(?:\?[!-~]*)? HTTP/1\.1((?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~]*)+)\r\n\r\n"
)
"""A request line and headers that nobody could read in two ways."""

_NAMED = b"\r\nX-Request-ID: "

_NEEDED = {b"content-length", b"host"}
_READ = {*_NEEDED, b"connection", b"x-request-id"}
"""Of the headers that matter here; with any other of them a request is not plain."""

_HEADER = re.compile(
    rb"\r\n(content-length|host|transfer-encoding|connection|expect|upgrade|x-request-id):([^\r]*)", re.I
)


class DoorMiddleware:
    """Answers 429 for ``POST /v1/predict`` while admission has no room, whoever asks: who has no key learns that the
    service is busy, and nothing else."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != _PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        problem = self._service.no_room()
        if problem is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        with suppress(Problem), self._service.watching.outcome(request):
            raise problem
        await respond(request, problem)(scope, receive, send)


class Door:
    """The same at the connection itself."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._settings = service.settings
        self._let_in = 0
        self._written: tuple[Any, tuple[bytes, int, bytes, bytes]] | None = None

    def turn_away(self, data: bytes, client: tuple[str, int] | None, last: bool = False) -> bytes | None:
        """The whole answer to ``data``, all that a connection at rest has received; None where that is not one whole
        plain request to predict, or where there is room for it. ``last``: it says that the connection is closed."""
        if not data.startswith(_START) or self._service.watching.tracing.on:  # a span wants what the usual way knows
            return None
        started, named = time.perf_counter(), self._read(data)
        if named is None:
            return None
        problem = self._service.no_room(self._let_in)
        if problem is None:
            self._let_one_in()
            return None
        identity = identify(named.get(b"x-request-id", b"").decode("ascii"))
        answer = self._write(problem, identity, last)
        self._service.metrics.turned_away(problem.reason)
        log_access(
            identity,
            "POST",
            _PATH,
            problem.status,
            1000 * (time.perf_counter() - started),
            outcome=problem.reason,
            client=client[0] if client and self._settings.log_client_address else None,
        )
        return answer

    def _let_one_in(self) -> None:
        """Many may arrive in one turn of the event loop, and take their places in the next: until then they count."""
        if not self._let_in:
            asyncio.get_running_loop().call_soon(self._all_are_in)
        self._let_in += 1

    def _all_are_in(self) -> None:
        self._let_in = 0

    def _write(self, problem: Problem, identity: str, last: bool) -> bytes:
        """The same answer is due many times in a second, but for the id."""
        now = int(time.time())
        key = (now, last, problem.detail, *problem.headers.items())
        if self._written is None or self._written[0] != key:
            self._written = key, _write(problem, now, last)
        before, length, middle, after = self._written[1]
        called = identity.encode("ascii")
        return b"%b%d%b%b%b%b%b" % (before, length + len(called), _NAMED, called, middle, called, after)

    def _read(self, data: bytes) -> dict[bytes, bytes] | None:
        """The headers that matter here, of one whole plain request; None where ``data`` is not that."""
        match, limits = _PLAIN.match(data), self._settings
        if match is None or match.end() > limits.max_header_bytes or match[1].count(b"\r\n") > limits.max_headers:
            return None
        found = [(name.lower(), value.strip()) for name, value in _HEADER.findall(match[1])]
        named = dict(found)
        if len(found) != len(named) or not _NEEDED <= set(named) <= _READ:
            return None
        if named.get(b"connection", b"keep-alive").lower() != b"keep-alive":
            return None
        length = named[b"content-length"]
        whole = length.isdigit() and len(length) < 16 and len(data) == match.end() + int(length)
        return named if whole else None


def _write(problem: Problem, now: int, last: bool) -> tuple[bytes, int, bytes, bytes]:
    """The answer in parts, around its length and twice its request's id; the number is the length without that."""
    body = json.dumps(document(problem.status, problem.detail, _PATH, "\0"), ensure_ascii=False, separators=(",", ":"))
    before, after = body.encode().split(rb"\u0000")
    headers = {"date": formatdate(now, usegmt=True), "content-type": MEDIA_TYPE, **NOSNIFF, **problem.headers}
    headers |= {"connection": "close"} if last else {}
    lines = [f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()] + ["content-length: "]
    return "\r\n".join(lines).encode("ascii"), len(before) + len(after), b"\r\n\r\n" + before, after
