"""``/admin/bundle``: which bundle is live, putting another one live, and going back."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mithridate.errors import InputError, MithridateError, OptionError
from service import problems
from service.access import is_loopback
from service.bundles import Bundles, Served, SwapBusyError
from service.examples import LIVE_BUNDLES
from service.openapi import KEY_ERRORS, responses
from service.problems import Problem
from service.schemas import BundleRef
from service.uploads import media_type_of, parse_json, read_body

if TYPE_CHECKING:
    from service.app import Service

logger = logging.getLogger("mithridate.service")

_ROLLBACK = "/admin/bundle/rollback"
_MAX_BODY_BYTES = 8192
"""Of a request that names a bundle: a path of 4096 characters, and what is around it."""


class SwapBody(BaseModel):
    """Which bundle is to go live."""

    model_config = ConfigDict(extra="forbid")

    path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="a directory inside the configured root, relative to it", examples=["digits-2"]
    )


_CONTENT = {"schema": SwapBody.model_json_schema(), "example": {"path": "digits-2"}}
_BODY = {"requestBody": {"required": True, "content": {"application/json": _CONTENT}}}


class LiveBundles(BaseModel):
    """What answers, what did before, and what is on its way."""

    current: BundleRef | None
    previous: BundleRef | None = Field(description="what POST /admin/bundle/rollback goes back to")
    loading: str | None = Field(description="what is being verified and loaded, as it was named")


def add_admin(app: FastAPI, service: Service) -> None:
    """Adds the routes."""
    bundles, keys = service.bundles, service.access.dependencies

    def refused(path: str, *more: int) -> dict[int | str, dict[str, Any]]:
        return responses(*KEY_ERRORS, 409, 422, *more, path=path, example=LIVE_BUNDLES)

    @app.get(
        "/admin/bundle",
        tags=["admin"],
        responses=responses(*KEY_ERRORS, path="/admin/bundle", example=LIVE_BUNDLES),
        dependencies=keys,
    )
    async def show(request: Request) -> LiveBundles:
        """Which bundle is live, and which one was before it."""
        _allow(service, request)
        return _report(bundles)

    @app.post(
        "/admin/bundle",
        tags=["admin"],
        responses=refused("/admin/bundle", 413, 415, 429),
        openapi_extra=_BODY,
        dependencies=keys,
    )
    async def swap(request: Request) -> LiveBundles:
        """Verifies and loads a bundle beside the one that serves, then lets it answer instead: no request is dropped,
        none is answered by both. The answer comes when it is live."""
        _allow(service, request)
        service.require_ready()
        body = await _read(request, service)
        path = _inside(_root(service), body.path)
        return await _change(bundles, bundles.swap(path, named=body.path), hide={path: body.path})

    @app.post(_ROLLBACK, tags=["admin"], responses=refused(_ROLLBACK), dependencies=keys)
    async def roll_back(request: Request) -> LiveBundles:
        """Puts the bundle before this one live again, if its digest is still what it was."""
        _allow(service, request)
        service.require_ready()
        previous = bundles.previous
        return await _change(bundles, bundles.roll_back(), hide={previous.path: previous.name} if previous else {})


async def _read(request: Request, service: Service) -> SwapBody:
    """What is asked for, read only once it is known who asks. Raises Problem."""
    media_type = media_type_of(request)
    if media_type != "application/json":
        raise Problem(415, f"content type {media_type[:80] or '(none)'!r} is not taken; allowed: application/json")
    fields = parse_json(await read_body(request, service.settings, max_bytes=_MAX_BODY_BYTES))
    try:
        return SwapBody.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:80] for part in ("body", *first["loc"]))
        seen = "" if first["type"] == "missing" else f"; seen: {json.dumps(first['input'])[:80]}"
        raise Problem(422, f"{where}: {first['msg']}{seen}") from error


async def _change(bundles: Bundles, change: Awaitable[Served], *, hide: dict[Path, str]) -> LiveBundles:
    """Waits for it. Errors name the bundle as the request did: where it lies is for the operator's log."""
    try:
        await change
    except SwapBusyError as error:
        raise Problem(409, str(error)) from error
    except MithridateError as error:
        logger.warning("the bundle stays what it was: %s", error)
        said = " ".join(str(error).split())
        for path, name in hide.items():
            said = said.replace(str(path), name)
        raise Problem(422 if isinstance(error, InputError) else 503, f"the bundle stays what it was: {said}") from error
    except Exception as error:  # a model that torch cannot build, an engine process that was killed
        logger.exception("the bundle stays what it was")
        raise Problem(503, "the bundle stays what it was: the new one's engine failed; see the log") from error
    return _report(bundles)


def _report(bundles: Bundles) -> LiveBundles:
    def refer(served: Served | None) -> BundleRef | None:
        return None if served is None else BundleRef(name=served.name, digest=served.digest)

    return LiveBundles(current=refer(bundles.current), previous=refer(bundles.previous), loading=bundles.loading)


def _allow(service: Service, request: Request) -> None:
    """Who has the scope. Without keys that is whoever asks from this machine, and by a name that says so: no web page
    can send that without being asked about it."""
    _root(service)
    caller = service.authorize(request, "admin")
    if caller.key_id is None and not is_loopback(request.url.hostname or ""):
        raise Problem(403, "bundles are changed from the service's own machine, by no web page")


def _root(service: Service) -> Path:
    root = service.settings.bundle_root
    if root is None:
        raise Problem(403, "no bundle can be put live here: the setting bundle_root names no directory")
    return root


def _inside(root: Path, named: str) -> Path:
    """The directory that ``named`` leads to, links followed. Raises Problem 422 where that is not one in ``root``."""
    outside = OptionError(f"{named[:200]!r} is no bundle inside the configured root; name one relative to it")
    try:
        base = root.resolve(strict=True)
        found = (base / named).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # missing, a null byte, links in a circle
        raise problems.to_problem(outside) from error
    if Path(named).is_absolute() or base not in found.parents or not found.is_dir():
        raise problems.to_problem(outside)
    return found
