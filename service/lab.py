"""The lab: one image is attacked on the spot, and base and defence answer for it before and after."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel, Field

from mithridate.defenses import Prediction
from mithridate.errors import OptionError
from mithridate.images import encode_png
from mithridate.types import Epsilon
from service import examples
from service.lab_defence import PREFIX, STEPS, AttackName, LabDefence
from service.loading import Loaded, Named
from service.metrics import LAB
from service.openapi import LAB_BODY, PREDICT_ERRORS, responses
from service.problems import Problem
from service.schemas import BundleRef, ImagePrediction, PredictOptions, PredictResponse, Scored, Timings
from service.uploads import Upload, read_upload

if TYPE_CHECKING:
    from service.app import Service

MAX_LEVELS = 64


class LabOptions(PredictOptions):
    """Query parameters of an attack."""

    attack: AttackName = Field(
        default="static",
        description=f"PGD of {STEPS} steps: static on the base model, adaptive through the defence's surrogate",
    )
    epsilon: Annotated[str, Field(max_length=16)] = Field(
        default="8/255", description=f"Largest change of a pixel, 1/255 to {MAX_LEVELS}/255"
    )
    label: Annotated[str, Field(max_length=200)] | None = Field(
        default=None, description="The image's true class; the base model's own answer unless given"
    )


class LabResponse(BaseModel):
    """What the attack made of an image, and what base (``undefended``) and defence say of both."""

    id: str
    bundle: BundleRef
    defense: str
    attack: AttackName
    steps: int
    epsilon: str
    label: Scored = Field(description="The class that the attack drives the image away from")
    largest_change: int = Field(description="Of any pixel, in 8-bit levels")
    clean: ImagePrediction
    adversarial: ImagePrediction
    adversarial_png: str = Field(description="base64; lossless: it is the very image that was answered")
    clean_png: str = Field(description="base64; the image as the model got it")
    attack_ms: float
    timings_ms: Timings


def choose_lab(loaded: Loaded[Any], options: LabOptions) -> LabDefence:
    """What a request asks for. Raises OptionError for what cannot be."""
    epsilon, classes = Epsilon.parse(options.epsilon), loaded.bundle.manifest.classes
    if not 1 <= epsilon.levels <= MAX_LEVELS:
        raise OptionError(f"epsilon {options.epsilon} is out of range; allowed: 1/255 to {MAX_LEVELS}/255")
    if options.label is not None and options.label not in classes:
        raise OptionError(f"label {options.label!r} is not a class of this bundle; see GET /v1/bundle")
    return LabDefence(
        inner=loaded.defence(options.defense),
        attack=options.attack,
        epsilon=epsilon,
        label=None if options.label is None else classes.index(options.label),
    )


def metric_name(defence: Named) -> str:
    """What metrics call a defence: all of the lab's are one."""
    return LAB if isinstance(defence, LabDefence) else defence.name


def cost_name(defence: Named) -> str:
    """What estimates of time go by: an attack on a quick defence says nothing of one through a slow one. There are
    twice as many as defences that are offered, for radius and label make no difference."""
    if isinstance(defence, LabDefence):
        return f"{PREFIX}{defence.attack}:{defence.inner.name}"
    return defence.name


async def run_attack(service: Service, request: Request, options: LabOptions) -> tuple[Loaded[Any], LabResponse]:
    """Reads one image and attacks it; also what it was answered from. Raises Problem."""
    with service.watching.outcome(request):
        return await _run_attack(service, request, options)


async def _run_attack(service: Service, request: Request, options: LabOptions) -> tuple[Loaded[Any], LabResponse]:
    service.authorize(request, "choose-defense", "explain")
    answers: list[tuple[Loaded[Any], Prediction]] = []

    def keep(loaded: Loaded[Any], prediction: Prediction) -> None:
        answers.append((loaded, prediction))

    async def read() -> Upload:
        upload = await read_upload(request, options, service.settings)
        if upload.options is not options or len(upload.files) != 1:
            raise Problem(422, "the lab takes one image, as a raw body or a multipart part; options are in the query")
        return Upload(files=[*upload.files, *upload.files], options=options, answered=keep)

    response = await service.answer(request, read)
    loaded, prediction = answers[0]
    return loaded, _report(loaded, response, prediction, options)


def _report(loaded: Loaded[Any], response: PredictResponse, prediction: Prediction, options: LabOptions) -> LabResponse:
    clean, adversarial = response.predictions
    assert prediction.pixels is not None  # LabDefence gives them
    assert clean.undefended is not None  # the caller may explain
    pixels = prediction.pixels.numpy()
    classes = loaded.bundle.manifest.classes
    index = clean.undefended.class_index if options.label is None else classes.index(options.label)
    return LabResponse(
        id=response.id,
        bundle=response.bundle,
        defense=response.defense.split(",", 3)[3],
        attack=options.attack,
        steps=STEPS,
        epsilon=options.epsilon,
        label=Scored(label=classes[index], class_index=index, confidence=float(prediction.base_scores[0, index])),
        largest_change=int(abs(pixels[1].astype(int) - pixels[0].astype(int)).max()),
        clean=clean,
        adversarial=adversarial,
        clean_png=base64.b64encode(encode_png(pixels[0])).decode(),
        adversarial_png=base64.b64encode(encode_png(pixels[1])).decode(),
        attack_ms=1000 * prediction.seconds["attack"],
        timings_ms=response.timings_ms,
    )


def add_lab(app: FastAPI, service: Service) -> None:
    """``POST /v1/lab/attack``, where the settings allow it."""
    if not service.settings.lab:
        return

    answers = responses(*PREDICT_ERRORS, path="/v1/lab/attack", example=examples.LAB)

    @app.post(
        "/v1/lab/attack",
        responses=answers,
        openapi_extra=LAB_BODY,
        tags=["lab"],
        dependencies=service.access.dependencies,
    )
    async def attack(request: Request, options: Annotated[LabOptions, Query()]) -> LabResponse:
        """Attacks one image (a raw body, or one multipart part named `images`) within `epsilon`, and answers for it as
        it was and as the attack left it."""
        return (await run_attack(service, request, options))[1]
