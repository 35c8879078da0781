"""h11's parser, stricter: what it reads can be read in one way, and what is large or in crumbs is refused.

Follows RFC 9112 where h11 is lenient or leaves it to others: two framings of one body (6.1), other versions of the
protocol (2.3), targets with scheme and authority (3.2.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import h11

_CRUMBS, _CRUMB_BYTES = 4096, 64
"""A body in more pieces than this must have at least so many bytes a piece."""

_VERSIONS = (b"1.1", b"1.0")
_FRAMINGS = (b"content-length", b"transfer-encoding")
_CLOSE = (b"connection", b"close")

_ABSOLUTE = re.compile(rb"https?://", re.IGNORECASE)
_PARTS = re.compile(
    rb"https?://(?P<authority>(?:\[[0-9A-F:.]+\]|[A-Z0-9._~-]+)(?::[0-9]*)?)(?P<rest>(?:[/?].*)?)", re.IGNORECASE
)
"""Nobody may be named before the host: what stands before an @ is how one name is made to look like another."""


class Parser(h11.Connection):
    """``max_headers`` and ``max_header_bytes`` hold for each request; h11 bounds only what is incomplete, and a flood
    may arrive in one piece. While ``last()`` is true each answer says that it is the last one on its connection."""

    def __init__(self, *, max_headers: int, max_header_bytes: int, last: Callable[[], bool]) -> None:
        super().__init__(h11.SERVER, max_header_bytes)
        self._max_headers = max_headers
        self._max_header_bytes = max_header_bytes
        self._last = last
        self._pieces = self._bytes = 0

    def next_event(self) -> Any:
        """As h11's, which uvicorn calls. Raises h11.RemoteProtocolError with the status to answer with."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = self._bytes = 0
            return self._check(event)
        if isinstance(event, h11.Data):
            self._pieces += 1
            self._bytes += len(event.data)
            if self._pieces > _CRUMBS and self._bytes < _CRUMB_BYTES * self._pieces:
                raise h11.RemoteProtocolError("body in crumbs")
        return event

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """As h11's, through which all that is sent goes."""
        if isinstance(event, h11.Response) and self._last() and _CLOSE not in event.headers:
            event = h11.Response(status_code=event.status_code, headers=[*event.headers, _CLOSE], reason=event.reason)
        return super().send_with_data_passthrough(event)

    def _check(self, request: h11.Request) -> h11.Request:
        headers = list(request.headers)
        size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in headers)
        if size > self._max_header_bytes or len(headers) > self._max_headers:
            raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
        if request.http_version not in _VERSIONS:
            seen = request.http_version.decode("ascii")
            raise h11.RemoteProtocolError(f"HTTP/{seen}; allowed: HTTP/1.1, HTTP/1.0")
        if len({name for name, _ in headers if name in _FRAMINGS}) > 1:
            raise h11.RemoteProtocolError("Content-Length beside Transfer-Encoding; allowed: one of them")
        return _from_origin(request, headers) if _ABSOLUTE.match(request.target) else request


def _from_origin(request: h11.Request, headers: list[tuple[bytes, bytes]]) -> h11.Request:
    """The same request without scheme and authority; the latter takes the place of ``Host``, whatever that said, so
    that whoever looks at names finds the one that counts."""
    parts = _PARTS.fullmatch(request.target)
    if parts is None:
        raise h11.RemoteProtocolError("the target's authority; allowed: a name or an address, and a port")
    rest = parts["rest"]
    return h11.Request(
        method=request.method,
        target=rest if rest.startswith(b"/") else b"/" + rest,
        headers=[*(header for header in headers if header[0] != b"host"), (b"host", parts["authority"])],
        http_version=request.http_version,
    )
