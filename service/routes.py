"""The routes of the native API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import FastAPI, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from mithridate.evaluation.card import Card
from service import examples
from service.openapi import KEY_ERRORS, PREDICT_BODY, PREDICT_ERRORS, responses
from service.problems import Problem
from service.reports import report_bundle
from service.schemas import BundleResponse, DefenseInfo, DefensesResponse, PredictOptions, PredictResponse

if TYPE_CHECKING:
    from service.app import Service


def add_routes(app: FastAPI, service: Service) -> None:
    """Adds them."""
    _add_predict(app, service)
    _add_descriptions(app, service)
    _add_health(app, service)


def _add_predict(app: FastAPI, service: Service) -> None:
    answers = responses(*PREDICT_ERRORS, path="/v1/predict", example=examples.PREDICT)

    @app.post(
        "/v1/predict",
        responses=answers,
        openapi_extra=PREDICT_BODY,
        tags=["predict"],
        response_model=PredictResponse,
        dependencies=service.access.dependencies,
    )
    async def predict(request: Request, options: Annotated[PredictOptions, Query()]) -> Response:
        """Classifies images sent as a raw body, as multipart parts named `images`, or as JSON with base64.

        While there is no room for another request the answer is 429, before anything of it is looked at, its key too.
        """
        answer = await service.predict(request, options)
        # Written here: the framework would check it against its own schema once more.
        return Response(answer.model_dump_json(by_alias=True), media_type="application/json")


def _add_descriptions(app: FastAPI, service: Service) -> None:
    keys = service.access.dependencies

    @app.get(
        "/v1/bundle",
        tags=["describe"],
        responses=responses(*KEY_ERRORS, path="/v1/bundle", example=examples.BUNDLE),
        dependencies=keys,
    )
    async def bundle(request: Request) -> BundleResponse:
        """What is served."""
        service.authorize(request, "predict")
        loaded = service.require_loaded()
        return report_bundle(loaded.bundle.manifest, loaded.bundle.digest)

    @app.get(
        "/v1/defenses",
        tags=["describe"],
        responses=responses(*KEY_ERRORS, path="/v1/defenses", example=examples.DEFENSES),
        dependencies=keys,
    )
    async def defenses(request: Request) -> DefensesResponse:
        """Which defences a request may name."""
        service.authorize(request, "predict")
        loaded = service.require_loaded()
        listed = [
            DefenseInfo(name=name, description=text, cost=loaded.costs[name])
            for name, text in loaded.descriptions.items()
        ]
        return DefensesResponse(default=loaded.default, defenses=listed)

    @app.get(
        "/v1/card",
        tags=["describe"],
        responses=responses(*KEY_ERRORS, 404, path="/v1/card", example=examples.CARD),
        dependencies=keys,
    )
    async def card(request: Request) -> Card:
        """What the bundle's defences were found to be worth when it was evaluated."""
        service.authorize(request, "predict")
        found = service.require_loaded().card
        if found is None:
            raise Problem(404, "this bundle has no card: it was not evaluated")
        return found.model_copy(update={"command": None})  # it names files: those are for the operator


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/livez", tags=["health"], responses=responses(path="/livez", example={"status": "alive"}))
    async def livez() -> dict[str, str]:
        """The process runs."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["health"], responses=responses(path="/readyz", example={"status": "ready"}))
    async def readyz() -> dict[str, str]:
        """The bundle is verified, one warm adaptation has run, the engine lives, and the service is not draining."""
        service.require_ready()
        return {"status": "ready"}

    @app.get(
        "/metrics",
        tags=["health"],
        responses=responses(*KEY_ERRORS, path="/metrics", example=examples.METRICS),
        response_class=Response,
        dependencies=service.access.dependencies,
    )
    async def metrics(request: Request) -> Response:
        """Prometheus exposition."""
        service.authorize(request, "metrics")
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)
