"""Errors over HTTP: ``application/problem+json`` (RFC 9457), with the request's id and never a traceback.

Under ``/v2`` they have the form of the Open Inference Protocol.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Match

from mithridate import errors

logger = logging.getLogger("mithridate.service")

MEDIA_TYPE = "application/problem+json"

NOSNIFF = {"X-Content-Type-Options": "nosniff"}
"""On every answer: nothing of it is what a browser might take it for instead."""

ShedReason = Literal["queue-full", "cost", "allowance", "memory", "not-ready", "draining", "engine-stopped", "deadline"]


class Problem(Exception):
    """An answer that is an error: HTTP ``status``, one sentence of ``detail``.

    ``reason``: why a request that was well-formed is not answered, for the metrics; it goes to no client.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        reason: ShedReason | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})
        self.reason = reason


STATUS_OF: tuple[tuple[type[errors.MithridateError], int], ...] = (
    (errors.ImageTypeError, 415),
    (errors.ImageTooLargeError, 413),
    (errors.ImageMalformedError, 400),
    (errors.ImageUnusableError, 422),
    (errors.OptionError, 422),
    (errors.BudgetExceededError, 504),
)
"""How the library's errors are told to a client; any other is 500 and tells nothing."""


def to_problem(error: errors.MithridateError, *, prefix: str = "") -> Problem:
    """The problem that a library error is for a client."""
    for kind, status in STATUS_OF:
        if isinstance(error, kind):
            return Problem(status, f"{prefix}{error}")
    logger.error("unexpected %s: %s", type(error).__name__, error)
    return Problem(500, "the server failed to answer")


def install(app: FastAPI) -> None:
    """Makes every error of ``app`` a problem document."""

    async def on_problem(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Problem)
        return respond(request, error)

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = _methods(request)
        return _response(request, error.status_code, str(error.detail), headers)

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first: dict[str, Any] = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return _response(request, 422, f"{where}: {first['msg']}; seen: {str(first.get('input'))[:80]!r}", {})

    async def on_anything(request: Request, error: Exception) -> JSONResponse:
        logger.error("request %s failed", request_id(request), exc_info=error)
        # This answer passes by the middleware that puts these on all others.
        headers = {**NOSNIFF, "X-Request-ID": request_id(request)}
        return _response(request, 500, "the server failed to answer", headers)

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(Exception, on_anything)


def respond(request: Request, problem: Problem) -> JSONResponse:
    """The answer that ``problem`` is."""
    return _response(request, problem.status, problem.detail, problem.headers)


def document(status: int, detail: str, instance: str, identity: str) -> dict[str, Any]:
    """What a problem's answer says."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": instance,
        "request_id": identity,
    }


def _methods(request: Request) -> str:
    """What is taken at this address: a router names the methods of the first of its routes alone."""
    found = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in found for method in getattr(route, "methods", None) or ()}))


def request_id(request: Request) -> str:
    """The id that the middleware gave this request."""
    return str(request.scope.get("state", {}).get("request_id", ""))


def _response(request: Request, status: int, detail: str, headers: Mapping[str, str]) -> JSONResponse:
    if request.url.path == "/v2" or request.url.path.startswith("/v2/"):
        # The Open Inference Protocol has a form of its own, and 400 for whatever is wrong with a tensor.
        status = 400 if status in (415, 422) else status
        return JSONResponse({"error": detail}, status_code=status, headers=dict(headers))
    content = document(status, detail, request.url.path, request_id(request))
    return JSONResponse(content, status_code=status, headers=dict(headers), media_type=MEDIA_TYPE)
