"""h11's parser, held to limits: what is large or in crumbs is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import h11

_CRUMBS, _CRUMB_BYTES = 4096, 64
"""A body in more pieces than this must have at least so many bytes a piece."""

_CLOSE = (b"connection", b"close")


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
        return request
