"""Where a request to predict is turned away while there is no room: before routes, options and keys are looked at.

Under several times the load that can be answered most requests end here, and what each of them costs is taken from the
rest: on the way through the framework it was four times as much.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.problems import Problem, respond

if TYPE_CHECKING:
    from service.app import Service

_PATH = "/v1/predict"


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
        problem = self._service.admission.no_room() if self._service.ready else None
        if problem is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        with suppress(Problem), self._service.watching.outcome(request):
            raise problem
        await respond(request, problem)(scope, receive, send)
