"""The FastAPI application."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request

from mithridate import __version__
from mithridate.defenses import Prediction
from mithridate.errors import BudgetExceededError, InputError, MithridateError
from service import problems
from service.access import Access
from service.admin import add_admin
from service.admission import Admission, Ticket
from service.batching import Answer, EngineStoppedError
from service.body_memory import BodyMemoryMiddleware
from service.bundles import Bundles
from service.collectors import watch_lag
from service.decode_pool import DecodePool
from service.docs_page import add_docs
from service.door import DoorMiddleware
from service.engines import AnyEngine
from service.keys import Caller, Scope
from service.lab import LabOptions, add_lab, choose_lab, cost_name, metric_name
from service.loading import Loaded, Named
from service.middleware import RequestMiddleware
from service.oip import add_open_inference
from service.page import add_page
from service.policy import needs_explain, shown
from service.problems import Problem, ShedReason, request_id, to_problem
from service.record import Record
from service.reports import count_entries, report_images
from service.routes import add_routes
from service.schemas import (
    BatchReport,
    BundleRef,
    ImagePrediction,
    PredictOptions,
    PredictResponse,
    Timings,
)
from service.settings import Settings
from service.uploads import Upload, decode_upload, read_upload
from service.wanted import Wanted, late, left, while_wanted
from service.watching import Watching
from service.web import WebApp

logger = logging.getLogger("mithridate.service")

_MANY_ENTRIES = 1000
"""Classes and neighbours that are reported in about ten milliseconds."""


class Service:
    """What the routes share: settings, engine, metrics, and whether the service takes requests."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.access = Access(settings)
        self.admission = Admission(settings)
        self.bundles = Bundles(settings)
        self.watching = Watching(
            settings, loaded=lambda: self.engine.loaded, device_memory=lambda: self.bundles.device_memory
        )
        self.metrics = self.watching.metrics
        self.decoders = DecodePool(max_pixels=settings.max_decoding_pixels)
        self.draining = False
        self.failure: str | None = None
        """Why there is nothing to serve, and never will be."""
        self.broken = False
        """Whether that is the service's own fault, and not what it was given to serve."""
        self._ending = False
        self.on_failure: Callable[[], None] = lambda: None
        """Called when there is nothing to serve: the bundle cannot be loaded, or the engine has died."""
        self.on_settled: Callable[[], None] = lambda: None
        """Called when the bundle has been loaded, and when another has taken its place and it is closed."""
        self._reloading: asyncio.Future[None] | None = None
        self.bundles.on_batch = self.metrics.ran
        self.bundles.on_live = self._set_prices
        self.bundles.on_death = self._die
        self.bundles.on_retired = lambda: self.on_settled()
        self.metrics.in_flight.set_function(lambda: self.admission.in_flight)
        self.metrics.ready.set_function(lambda: float(self.ready))
        self.metrics.waiting.set_function(lambda: self.engine.waiting)
        self.metrics.waits.waiting = lambda: self.engine.waiting
        self.metrics.backlog.set_function(lambda: self.admission.queued_seconds)

    @property
    def engine(self) -> AnyEngine:
        """What new requests are answered by."""
        return self.bundles.engine

    @property
    def ready(self) -> bool:
        """Whether whoever balances the load should send requests here."""
        return self.answering and not self.draining

    @property
    def answering(self) -> bool:
        """Whether it answers requests to predict, as it does to the end of a drain."""
        return self.engine.loaded is not None and self.failure is None

    def no_room(self, coming: int = 0) -> Problem | None:
        """What a request to predict that comes now is refused with, whatever it wants, with ``coming`` others on their
        way; None where there is room."""
        return self.admission.no_room(coming) if self.answering else None

    async def load(self) -> None:
        """Loads the bundle; afterwards the service is ready, or ``failure`` says why it never will be."""
        try:
            await self.bundles.load()
            self.on_settled()
            logger.info("ready")
        except MithridateError as error:
            self.failure, self.broken = str(error), not isinstance(error, InputError)
        except Exception as error:  # whatever it is: without a bundle there is no service
            logger.exception("loading failed")
            self.failure, self.broken = f"loading failed: {type(error).__name__}: {error}", True
        if self.failure:
            self.on_failure()

    def reload(self) -> None:
        """Puts live what the configured path leads to by now, in the background; the log says what came of it.
        Not any more while draining: what is loaded then would only keep the process from ending."""
        if self.draining:
            return
        self._reloading = asyncio.ensure_future(self.bundles.reload())

    def _set_prices(self, loaded: Loaded[Any]) -> None:
        self.admission.default = loaded.default
        self.admission.lanes = len(self.settings.used_devices)
        self.admission.costs.seed(loaded.seconds)

    def _die(self, error: BaseException) -> None:
        """The engine has ended by itself; one that is a thread says so from there. Better no service than one that
        hangs."""
        self.failure, self.broken = f"the engine has stopped: {type(error).__name__}: {error}", True
        self.on_failure()

    def drain(self) -> None:
        """No longer ready: whoever balances the load should send new requests elsewhere."""
        self.draining = True

    async def close(self) -> None:
        """Ends the engines and the threads."""
        self._ending = True
        await self.bundles.end()
        await asyncio.to_thread(self.decoders.shutdown)
        await asyncio.to_thread(self.watching.close)

    def require_loaded(self, engine: AnyEngine | None = None) -> Loaded[Any]:
        """What is served, or what ``engine`` serves. Raises Problem 503 while there is nothing."""
        loaded = (engine or self.engine).loaded
        if loaded is None:
            detail, reason = self._absence()
            raise Problem(503, detail, headers={"Retry-After": "1"}, reason=reason)
        return loaded

    def _absence(self) -> tuple[str, ShedReason]:
        """Why nothing is loaded, for a client. What exactly is wrong names files: serve() tells it to the operator."""
        if self.bundles.current is not None and not self._ending:  # there was an engine, and nobody has ended it
            return "the engine has stopped", "engine-stopped"
        if self.failure:
            return "the bundle cannot be served", "not-ready"
        return ("draining", "draining") if self.draining else ("still loading the bundle", "not-ready")

    def require_ready(self) -> Loaded[Any]:
        """What is served, to whoever may go on asking. Raises Problem 503 while there is nothing, and when draining."""
        loaded = self.require_loaded()
        if self.draining:
            raise Problem(503, "draining")
        return loaded

    def authorize(self, request: Request, *scopes: Scope) -> Caller:
        """Who asks, who has all of ``scopes``. Raises Problem 401 without a key that is known, 403 without a scope."""
        return self.access.authorize(request, *scopes)

    async def predict(self, request: Request, options: PredictOptions) -> PredictResponse:
        """Reads one request of the native API and answers it."""
        return await self.answer(request, lambda: read_upload(request, options, self.settings))

    async def answer(self, request: Request, read: Callable[[], Awaitable[Upload]]) -> PredictResponse:
        """What every protocol answers with: admits the request, lets ``read`` take its body, decodes, and runs the
        defence. Raises Problem."""
        with self.watching.outcome(request) as record, self.bundles.use() as engine:
            # All of it from one bundle, also where another goes live meanwhile.
            return await self._answer_from(engine, request, read, record)

    async def _answer_from(
        self, engine: AnyEngine, request: Request, read: Callable[[], Awaitable[Upload]], record: Record
    ) -> PredictResponse:
        started = time.perf_counter()
        caller = self.authorize(request, "predict")
        loaded = self.require_loaded(engine)
        # A place before anything of the request is read: whom there is no room for must cost next to nothing.
        ticket = self.admission.enter(caller)
        try:
            with self.admission.reading(ticket):
                upload = await read()
            options = upload.options
            defence = self._choose(loaded, request, options)
            record.defense, manifest = metric_name(defence), loaded.bundle.manifest
            deadline_ms = min(options.deadline_ms or math.inf, self.settings.deadline_ms)
            deadline = time.monotonic() + deadline_ms / 1000 - (time.perf_counter() - started)
            name, seconds_left = cost_name(defence), deadline - time.monotonic()
            self.admission.price(ticket, name, len(upload.files), seconds_left=seconds_left)
            async with while_wanted(request, deadline=deadline, on_leaving=engine.forget_ended) as wanted:
                decoding = time.perf_counter()
                with wanted.stopped_at_once():
                    pixels = await decode_upload(upload.files, manifest, self.settings, self.decoders)
                decoded = time.perf_counter()
                with self.metrics.waits.asking():
                    answer = await self._ask(engine, defence, pixels, wanted, ticket)
            upload.answered(loaded, answer.prediction)
            seconds = {"queue": answer.queue_seconds, "decode": decoded - decoding, **answer.prediction.seconds}
            timings = {phase: 1000 * seconds.get(phase, 0.0) for phase in Timings.model_fields}
            predictions = await self._report(loaded, answer.prediction, options, caller)
            response = PredictResponse(
                id=request_id(request),
                bundle=BundleRef(name=manifest.name, digest=loaded.bundle.digest),
                defense=defence.name,
                predictions=predictions,
                batch=BatchReport(requests=answer.batch.requests, images=answer.batch.images),
                timings_ms=Timings(**{**timings, "total": 1000 * (time.perf_counter() - started)}),
            )
            taken = response.timings_ms.model_dump()
            self.watching.answered(request, loaded.bundle, answer, decoding=decoding, timings_ms=taken)
            return response
        finally:
            self.admission.leave(ticket)

    async def _report(
        self, loaded: Loaded[Any], prediction: Prediction, options: PredictOptions, caller: Caller
    ) -> list[ImagePrediction]:
        """What the caller is shown; where that is much, written beside the event loop."""

        def write() -> list[ImagePrediction]:
            reports = report_images(loaded.bundle.manifest, loaded.resources.exemplars, prediction, options)
            return shown(reports, caller, confidence_decimals=self.settings.confidence_decimals)

        return await asyncio.to_thread(write) if count_entries(prediction, options) > _MANY_ENTRIES else write()

    def _choose(self, loaded: Loaded[Any], request: Request, options: PredictOptions) -> Named:
        if needs_explain(options):
            self.authorize(request, "explain")
        try:
            lab = choose_lab(loaded, options) if isinstance(options, LabOptions) else None
            defence: Named = lab or loaded.defence(options.defense)
        except MithridateError as error:
            raise to_problem(error) from error
        if defence.name != loaded.default:
            self.authorize(request, "choose-defense")
        return defence

    async def _ask(self, engine: AnyEngine, defence: Named, pixels: Any, wanted: Wanted, ticket: Ticket) -> Answer:
        """Runs the engine; a client that leaves, or a deadline that passes, stops it between two steps."""
        try:
            self.admission.ask(ticket)
            answer = await engine.predict(defence, pixels, deadline=wanted.deadline, cancelled=wanted.cancelled)
            took = sum(answer.prediction.seconds.values())
            self.admission.settle(ticket, took, images_together=answer.batch.images)
            return answer
        except BudgetExceededError as error:
            raise (late if error.reason == "deadline" else left)() from error
        except EngineStoppedError as error:
            said = "the service stopped before there was an answer"
            reason: ShedReason = "draining" if self._ending else "engine-stopped"
            raise Problem(503, said, headers={"Retry-After": "1"}, reason=reason) from error
        except MithridateError as error:
            raise to_problem(error) from error


def create_app(settings: Settings) -> FastAPI:
    """The application. It loads in the background: /livez answers at once, /readyz once it can predict."""
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.load())
        lag = asyncio.create_task(watch_lag(service.metrics.loop_lag.observe))
        try:
            yield
        finally:
            service.drain()
            loading.cancel()
            lag.cancel()
            await asyncio.wait([loading, lag])
            await service.close()

    app = WebApp(
        title="Mithridate",
        summary="Image classification behind run-time adversarial defences",
        version=__version__,
        lifespan=lifespan,
        openapi_url="/openapi.json" if settings.docs else None,
    )
    app.state.service = service
    problems.install(app)
    app.add_middleware(BodyMemoryMiddleware, max_bytes=settings.max_buffered_bytes)
    app.add_middleware(DoorMiddleware, service=service)
    app.add_middleware(
        RequestMiddleware, tracing=service.watching.tracing, log_client_address=settings.log_client_address
    )
    add_routes(app, service)
    add_admin(app, service)
    add_open_inference(app, service)
    add_lab(app, service)
    add_page(app, service)
    if settings.docs:
        add_docs(app)
    app.add_heads()
    return app
