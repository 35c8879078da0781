"""How many bytes of bodies all requests together may hold."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import Problem


class BodyMemoryMiddleware:
    """Counts the bytes of a body as they come, until its request is answered; whose would be too many is refused.

    A place in the queue is no bound by itself: 64 requests of 32 MiB are 2 GiB, and slow clients hold them for long.
    Raises Problem 429 from ``receive``, inside the route that reads: for every protocol, and counted like its others.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_bytes
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        mine = 0

        async def counted() -> Message:
            nonlocal mine
            message = await receive()
            size = len(message.get("body", b""))
            if size and self.held + size > self._max_bytes:
                detail = f"other requests hold {self.held} of {self._max_bytes} bytes; send this one again"
                raise Problem(429, detail, headers={"Retry-After": "1"}, reason="memory")
            mine += size
            self.held += size
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            self.held -= mine
