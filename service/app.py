"""The FastAPI application."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from mithridate import __version__
from mithridate.defenses import Defence
from mithridate.errors import BudgetExceededError, MithridateError
from mithridate.evaluation.card import Card
from service import problems
from service.batching import Answer, EngineStoppedError
from service.engine import Engine
from service.lab import LabOptions, add_lab, choose_lab, metric_name
from service.loading import Loaded
from service.metrics import Metrics
from service.middleware import RequestIdMiddleware
from service.page import add_page
from service.problems import Problem, request_id, to_problem
from service.reports import report_bundle, report_images
from service.schemas import (
    BatchReport,
    BundleRef,
    BundleResponse,
    DefenseInfo,
    DefensesResponse,
    PredictBody,
    PredictOptions,
    PredictResponse,
    ProblemDocument,
    Timings,
)
from service.settings import Settings
from service.uploads import RAW_TYPES, Upload, decode_upload, read_upload

logger = logging.getLogger("mithridate.service")

_DECODERS = 2
"""Threads that decode images. Pillow gives up the interpreter lock while it does."""


class Service:
    """What the routes share: settings, engine, metrics, and whether the service takes requests."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = Engine(settings)
        self.metrics = Metrics()
        self.decoders = ThreadPoolExecutor(max_workers=_DECODERS, thread_name_prefix="decode")
        self.draining = False
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        """Called when there is nothing to serve: the bundle cannot be loaded, or the engine has died."""
        self._in_flight = 0
        self.engine.on_batch = self.metrics.ran
        self.engine.on_death = self._die
        self.metrics.waiting.set_function(lambda: self.engine.waiting)

    async def load(self) -> None:
        """Loads the bundle; afterwards the service is ready, or ``failure`` says why it never will be."""
        try:
            await self.engine.load()
            self.metrics.ready.set(1)
            logger.info("ready")
        except MithridateError as error:
            self.failure = str(error)
        except Exception as error:  # whatever it is: without a bundle there is no service
            logger.exception("loading failed")
            self.failure = f"loading failed: {type(error).__name__}: {error}"
        if self.failure:
            self.on_failure()

    def _die(self, error: BaseException) -> None:
        """The engine has ended by itself, and says so from its thread. Better no service than one that hangs."""
        self.metrics.ready.set(0)
        self.failure = f"the engine has stopped: {type(error).__name__}: {error}"
        self.on_failure()

    def drain(self) -> None:
        """No longer ready: whoever balances the load should send new requests elsewhere."""
        self.draining = True
        self.metrics.ready.set(0)

    def close(self) -> None:
        """Ends the threads."""
        self.engine.close()
        self.decoders.shutdown(wait=True, cancel_futures=True)

    def require_loaded(self) -> Loaded:
        """What is served. Raises Problem 503 while there is nothing."""
        loaded = self.engine.loaded
        if loaded is None:
            # What exactly is wrong names files: it is for the operator, who gets it from serve().
            detail = "still loading the bundle"
            if self.failure or self.draining:
                detail = "the bundle cannot be served" if self.failure else "draining"
            raise Problem(503, detail, headers={"Retry-After": "1"})
        return loaded

    async def predict(self, request: Request, options: PredictOptions) -> PredictResponse:
        """Reads one request of the native API and answers it."""
        return await self.answer(request, lambda: read_upload(request, options, self.settings))

    async def answer(self, request: Request, read: Callable[[], Awaitable[Upload]]) -> PredictResponse:
        """What every protocol answers with: admits the request, lets ``read`` take its body, decodes, and runs the
        defence. Raises Problem."""
        started = time.perf_counter()
        loaded = self.require_loaded()
        self._admit()
        name = "unknown"
        try:
            upload = await read()
            options = upload.options
            defence = self._choose(loaded, options)
            name, manifest = metric_name(defence), loaded.bundle.manifest
            deadline_ms = min(options.deadline_ms or math.inf, self.settings.deadline_ms)
            deadline = time.monotonic() + deadline_ms / 1000 - (time.perf_counter() - started)
            decoding = time.perf_counter()
            pixels = await decode_upload(upload.files, manifest, self.settings, self.decoders)
            decoded = time.perf_counter()
            answer = await self._ask(request, defence, pixels, deadline)
            upload.answered(answer.prediction)
            seconds = {"queue": answer.queue_seconds, "decode": decoded - decoding, **answer.prediction.seconds}
            timings = {phase: 1000 * seconds.get(phase, 0.0) for phase in Timings.model_fields}
            response = PredictResponse(
                id=request_id(request),
                bundle=BundleRef(name=manifest.name, digest=loaded.bundle.digest),
                defense=defence.name,
                predictions=report_images(manifest, loaded.resources.exemplars, answer.prediction, options),
                batch=BatchReport(requests=answer.batch.requests, images=answer.batch.images),
                timings_ms=Timings(**{**timings, "total": 1000 * (time.perf_counter() - started)}),
            )
            self.metrics.answered(name, answer.prediction, response.timings_ms.model_dump())
            return response
        except Problem as problem:
            self.metrics.refused(problem.status, name)
            raise
        except Exception:
            self.metrics.refused(500, name)
            raise
        finally:
            self._in_flight -= 1
            self.metrics.in_flight.set(self._in_flight)

    def _admit(self) -> None:
        if self._in_flight >= self.settings.queue_size:
            wait = max(1, math.ceil(self._in_flight * self.engine.service_seconds))
            self.metrics.refused(429, "unknown")
            raise Problem(429, f"{self._in_flight} requests are waiting already", headers={"Retry-After": str(wait)})
        self._in_flight += 1
        self.metrics.in_flight.set(self._in_flight)

    @staticmethod
    def _choose(loaded: Loaded, options: PredictOptions) -> Defence:
        try:
            return choose_lab(loaded, options) if isinstance(options, LabOptions) else loaded.defence(options.defense)
        except MithridateError as error:
            raise to_problem(error) from error

    async def _ask(self, request: Request, defence: Defence, pixels: Any, deadline: float) -> Answer:
        """Runs the engine; a client that leaves, or a deadline that passes, stops it between two steps."""
        cancelled = threading.Event()
        watch = asyncio.create_task(self._watch(request, cancelled))
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):  # also while others have the engine
                return await self.engine.predict(defence, pixels, deadline=deadline, cancelled=cancelled)
        except TimeoutError as error:
            raise Problem(504, "the deadline passed before there was an answer") from error
        except BudgetExceededError as error:
            detail = "the deadline passed" if error.reason == "deadline" else "the client left"
            raise Problem(504, f"{detail} before there was an answer") from error
        except EngineStoppedError as error:
            raise Problem(503, "the service stopped before there was an answer") from error
        except MithridateError as error:
            raise to_problem(error) from error
        finally:
            cancelled.set()
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    async def _watch(self, request: Request, cancelled: threading.Event) -> None:
        """Sets ``cancelled`` once the client has gone; the body has been read, so nothing else can arrive."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        cancelled.set()
        self.engine.forget_ended()


def create_app(settings: Settings) -> FastAPI:
    """The application. It loads in the background: /livez answers at once, /readyz once it can predict."""
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.load())
        try:
            yield
        finally:
            service.drain()
            await loading
            await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = FastAPI(
        title="Mithridate",
        summary="Image classification behind run-time adversarial defences",
        version=__version__,
        lifespan=lifespan,
        docs_url="/docs" if settings.docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if settings.docs else None,
    )
    app.state.service = service
    problems.install(app)
    app.add_middleware(RequestIdMiddleware)
    _add_predict(app, service)
    _add_descriptions(app, service)
    _add_health(app, service)
    add_lab(app, service)
    add_page(app, service)
    return app


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"content": {problems.MEDIA_TYPE: {"schema": ProblemDocument.model_json_schema()}}, "description": text}
    for status, text in {
        400: "malformed body or image",
        404: "there is none",
        413: "too many bytes, pixels or images",
        415: "not an image type that is taken",
        422: "well-formed, but not usable",
        429: "too many requests at once; see Retry-After",
        503: "not ready",
        504: "no answer within the deadline",
    }.items()
}

_PREDICT_ERRORS = {status: error for status, error in _ERRORS.items() if status != 404}

_BINARY = {"type": "string", "format": "binary"}
_MULTIPART = {"type": "object", "properties": {"images": {"type": "array", "items": _BINARY}}, "required": ["images"]}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            **{media_type: {"schema": _BINARY} for media_type in RAW_TYPES},
            "multipart/form-data": {"schema": _MULTIPART},
            "application/json": {"schema": PredictBody.model_json_schema()},
        },
    }
}


def _add_predict(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/predict", responses=_PREDICT_ERRORS, openapi_extra=_BODY, tags=["predict"], response_model_by_alias=True
    )
    async def predict(request: Request, options: Annotated[PredictOptions, Query()]) -> PredictResponse:
        """Classifies images sent as a raw body, as multipart parts named `images`, or as JSON with base64."""
        return await service.predict(request, options)


def _add_descriptions(app: FastAPI, service: Service) -> None:
    @app.get("/v1/bundle", tags=["describe"])
    async def bundle() -> BundleResponse:
        """What is served."""
        loaded = service.require_loaded()
        return report_bundle(loaded.bundle.manifest, loaded.bundle.digest)

    @app.get("/v1/defenses", tags=["describe"])
    async def defenses() -> DefensesResponse:
        """Which defences a request may name."""
        loaded = service.require_loaded()
        listed = [
            DefenseInfo(name=name, description=text, cost=loaded.costs[name])
            for name, text in loaded.descriptions.items()
        ]
        return DefensesResponse(default=loaded.default, defenses=listed)

    @app.get("/v1/card", tags=["describe"], responses={status: _ERRORS[status] for status in (404, 503)})
    async def card() -> Card:
        """What the bundle's defences were found to be worth when it was evaluated."""
        found = service.require_loaded().card
        if found is None:
            raise Problem(404, "this bundle has no card: it was not evaluated")
        return found.model_copy(update={"command": None})  # it names files: those are for the operator


def _add_health(app: FastAPI, service: Service) -> None:
    @app.head("/livez", include_in_schema=False)
    @app.get("/livez", tags=["health"])
    async def livez() -> dict[str, str]:
        """The process runs."""
        return {"status": "alive"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["health"], responses={503: _ERRORS[503]})
    async def readyz() -> dict[str, str]:
        """The bundle is verified, one warm adaptation has run, the engine lives, and the service is not draining."""
        service.require_loaded()
        if service.draining:
            raise Problem(503, "draining")
        return {"status": "ready"}

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus exposition."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)
