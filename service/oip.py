"""The Open Inference Protocol, version 2, over HTTP: what KServe, Triton's clients and others speak.

Follows its REST specification (github.com/kserve/open-inference-protocol), with the extensions ``binary_tensor_data``
and ``classification`` of Triton. The model's name is the bundle's, its version the beginning of the bundle's digest.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from starlette.convertors import PathConvertor, register_url_convertor

from mithridate import __version__
from mithridate.bundle import Manifest
from service.loading import Loaded
from service.oip_examples import (
    INFER_ANSWERS,
    INFER_BODY,
    INFER_ERRORS,
    LIVE,
    MODEL,
    MODEL_READY,
    READY,
    SERVER,
    answers,
)
from service.oip_request import INPUT, Inference, json_length, parse_infer
from service.oip_response import OUTPUTS, SCORES, classes_needed, describe_outputs, encode_answer, wanted_outputs
from service.oip_schemas import (
    EXTENSIONS,
    ModelMetadata,
    ModelReady,
    RequestedOutput,
    ServerLive,
    ServerMetadata,
    ServerReady,
    TensorMetadata,
)
from service.problems import Problem
from service.schemas import PredictOptions
from service.uploads import Upload, read_body

if TYPE_CHECKING:
    from service.app import Service


class _ModelName(PathConvertor):
    """A name may have slashes, but an address that ends in /infer is none of a model: only POST is taken there."""

    regex = "(?!.*/infer$).*"


register_url_convertor("model", _ModelName())


def short_version(digest: str) -> str:
    """What the protocol calls a bundle's version: twelve hexadecimal digits of its digest."""
    return digest.removeprefix("sha256:")[:12]


def add_open_inference(app: FastAPI, service: Service) -> None:
    """Adds the routes under ``/v2``."""
    _add_server(app, service)
    _add_infer(app, service)
    _add_model(app, service)


def _add_server(app: FastAPI, service: Service) -> None:
    @app.get("/v2", tags=["open inference protocol"], responses=answers(SERVER))
    async def server_metadata() -> ServerMetadata:
        """What the server is, and which extensions of the protocol it has."""
        return ServerMetadata(name="mithridate", version=__version__, extensions=list(EXTENSIONS))

    @app.get("/v2/health/live", tags=["open inference protocol"], responses=answers(LIVE))
    async def server_live() -> ServerLive:
        """The process runs."""
        return ServerLive(live=True)

    @app.get("/v2/health/ready", tags=["open inference protocol"], responses=answers(READY, 503))
    async def server_ready() -> ServerReady:
        """As `/readyz`: the model answers, and the service is not draining."""
        service.require_ready()
        return ServerReady(live=True, ready=True)


def _add_infer(app: FastAPI, service: Service) -> None:
    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        with service.watching.outcome(request):
            return await _infer(service, request, name, version)

    @app.post(
        "/v2/models/{name:path}/versions/{version}/infer",
        tags=["open inference protocol"],
        response_class=Response,
        responses={**INFER_ANSWERS, **INFER_ERRORS},
        openapi_extra=INFER_BODY,
        dependencies=service.access.dependencies,
    )
    async def infer_version(request: Request, name: str, version: str) -> Response:
        """Classifies images with this version of the model."""
        return await infer(request, name, version)

    @app.post(
        "/v2/models/{name:path}/infer",
        tags=["open inference protocol"],
        response_class=Response,
        responses={**INFER_ANSWERS, **INFER_ERRORS},
        openapi_extra=INFER_BODY,
        dependencies=service.access.dependencies,
    )
    async def infer_model(request: Request, name: str) -> Response:
        """Classifies images: a tensor `images` of UINT8 or FP32 pixels, or of BYTES, files in JPEG, PNG or WebP."""
        return await infer(request, name)


def _add_model(app: FastAPI, service: Service) -> None:
    def ready(name: str, version: str | None = None) -> ModelReady:
        _require_model(service.require_ready(), name, version, tell=False)
        return ModelReady(name=name, ready=True)

    def metadata(request: Request, name: str, version: str | None = None) -> ModelMetadata:
        service.authorize(request, "predict")
        loaded = _require_model(service.require_loaded(), name, version)
        return _describe(loaded)

    known: dict[str, Any] = {
        "tags": ["open inference protocol"],
        "responses": answers(MODEL_READY, 404, 503),
    }
    described = {
        **known,
        "responses": answers(MODEL, 401, 403, 404, 503),
        "dependencies": service.access.dependencies,
    }

    @app.get("/v2/models/{name:path}/versions/{version}/ready", **known)
    async def version_ready(name: str, version: str) -> ModelReady:
        """This version of the model answers."""
        return ready(name, version)

    @app.get("/v2/models/{name:path}/ready", **known)
    async def model_ready(name: str) -> ModelReady:
        """The model answers."""
        return ready(name)

    @app.get("/v2/models/{name:path}/versions/{version}", **described)
    async def version_metadata(request: Request, name: str, version: str) -> ModelMetadata:
        """Inputs and outputs of this version of the model."""
        return metadata(request, name, version)

    @app.get("/v2/models/{name:model}", **described)
    async def model_metadata(request: Request, name: str) -> ModelMetadata:
        """Inputs and outputs of the model."""
        return metadata(request, name)


def _require_model(loaded: Loaded[Any], name: str, version: str | None, *, tell: bool = True) -> Loaded[Any]:
    """``tell``: whether an error says what is served, which is for callers with a key."""
    served = loaded.bundle.manifest.name
    if name != served:
        raise Problem(404, f"there is no model {name[:80]!r} here" + (f"; served: {served}" if tell else ""))
    _require_version(loaded.bundle.digest, name, version, tell=tell)
    return loaded


def _require_version(digest: str, name: str, version: str | None, *, tell: bool = True) -> None:
    served = short_version(digest)
    if version not in (None, served):
        said = f"model {name} has no version {str(version)[:80]!r} here"
        raise Problem(404, said + (f"; served: {served}" if tell else ""))


def _describe(loaded: Loaded[Any]) -> ModelMetadata:
    manifest = loaded.bundle.manifest
    return ModelMetadata(
        name=manifest.name,
        versions=[short_version(loaded.bundle.digest)],
        platform="mithridate",
        inputs=[_describe_input(manifest)],
        outputs=describe_outputs(manifest),
    )


def _describe_input(manifest: Manifest) -> TensorMetadata:
    channels, height, width = manifest.image_shape
    shape = [-1, channels, *((height, width) if manifest.resize == "exact" else (-1, -1))]
    also = f"FP32 {shape} in [0, 1]; BYTES [-1], files in JPEG, PNG or WebP, in JSON as base64"
    return TensorMetadata(name=INPUT, datatype="UINT8", shape=shape, parameters={"also_accepted": also})


async def _infer(service: Service, request: Request, name: str, version: str | None) -> Response:
    """Answers one request to infer, through the same admission, decoder and queue as the native API."""
    caller = service.authorize(request, "predict")
    loaded = _require_model(service.require_loaded(), name, version)
    offered = [output for output in OUTPUTS if output != SCORES or caller.may("explain")]
    found: list[tuple[Inference, list[RequestedOutput]]] = []

    async def read() -> Upload:
        length = json_length(request)
        body = await read_body(request, service.settings)
        # Numbers in JSON take a while to read, and so does writing many; the event loop has others to serve.
        parsed = await asyncio.to_thread(parse_infer, body, length, loaded.bundle.manifest, service.settings)
        wanted = wanted_outputs(parsed.asked, offered)
        found.append((parsed, wanted))
        parameters = parsed.asked.parameters
        options = PredictOptions(defense=parameters.defense, deadline_ms=parameters.allowed_ms)
        return Upload(files=parsed.images, options=options.model_copy(update={"top_k": classes_needed(wanted)}))

    answer = await service.answer(request, read)
    _require_version(answer.bundle.digest, name, version)  # a new bundle may have gone live meanwhile
    parsed, wanted = found[0]
    return await asyncio.to_thread(encode_answer, answer, parsed.asked, wanted, short_version(answer.bundle.digest))
