"""Where the page is, and the headers that keep it to itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from fastapi import FastAPI, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from mithridate.defenses import Prediction
from mithridate.images import encode_png
from service.lab import LabOptions, run_attack
from service.loading import Loaded
from service.page import views
from service.page.callers import shows_exemplars
from service.problems import Problem
from service.schemas import PredictOptions
from service.uploads import Upload, read_upload

if TYPE_CHECKING:
    from service.app import Service

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
_TOP = 5
_ONE_DEFENCE = Query(max_length=200)


def add_page(app: FastAPI, service: Service) -> None:
    """``/`` and what it needs, unless the settings say no."""
    if not service.settings.page:
        return
    page = Page(service)
    app.get("/", include_in_schema=False)(page.show)
    app.post("/", include_in_schema=False)(page.post)
    app.get("/page/about", include_in_schema=False)(page.about)
    app.post("/page/answer", include_in_schema=False)(page.answer)
    app.get("/page/exemplars/{exemplar}.png", include_in_schema=False)(page.exemplar)
    app.get("/page/static/{name}", include_in_schema=False)(page.static)
    if service.settings.lab:
        app.post("/page/lab", include_in_schema=False)(page.lab)


class Page:
    """The routes. The script asks for parts of the page, rendered here; without a script a form gets the whole."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._static = views.static_files()
        self._views = views.Views(self._static)
        self._visible = shows_exemplars(service.settings)

    async def show(self, request: Request) -> Response:
        """The page before anything was asked."""
        return await self._whole(request)

    async def post(self, request: Request, defense: Annotated[str | None, _ONE_DEFENCE] = None) -> Response:
        """The page with an answer, for browsers without a script."""
        try:
            return await self._whole(request, answer=await self._answer(request, defense))
        except Problem as problem:
            return await self._whole(request, problem=problem)

    async def about(self, request: Request) -> Response:
        """The parts that say what is served."""
        return _html(self._views.about(about=await self._describe(request)))

    async def answer(self, request: Request, defense: Annotated[str | None, _ONE_DEFENCE] = None) -> Response:
        """The answer alone."""
        return _html(await self._answer(request, defense))

    async def lab(self, request: Request, options: Annotated[LabOptions, Query()]) -> Response:
        """What ``POST /v1/lab/attack`` answers, rendered."""
        _refuse_other_sites(request)
        loaded, found = await run_attack(self._service, request, options)
        content = await run_in_threadpool(views.lab, loaded, found)
        return _html(self._views.lab(**content))

    async def exemplar(self, request: Request, exemplar: int) -> Response:
        """One training image as the bundle has it."""
        self._service.authorize(request, "explain")
        store = self._service.require_loaded().resources.exemplars
        if not self._visible or not 0 <= exemplar < len(store):
            raise Problem(404, "there is no such exemplar, or it is not to be seen")
        png = await run_in_threadpool(lambda: encode_png(store.pixels(torch.tensor([exemplar])).numpy()[0]))
        return Response(png, media_type="image/png", headers=HEADERS)

    async def static(self, name: str) -> Response:
        """Style and script; their addresses change with them."""
        file = self._static.get(name)
        if file is None:
            raise Problem(404, "there is no such file")
        headers = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
        return Response(file.content, media_type=file.media_type, headers=headers)

    async def _answer(self, request: Request, defense: str | None) -> str:
        with self._service.watching.outcome(request):
            return await self._ask(request, defense)

    async def _ask(self, request: Request, defense: str | None) -> str:
        _refuse_other_sites(request)
        explain = self._service.authorize(request, "predict").may("explain")
        options = PredictOptions(defense=defense, top_k=_TOP if explain else 1, explain=explain)
        answered: list[Loaded[Any]] = []
        read = self._one(request, options, lambda loaded, prediction: answered.append(loaded))
        response = await self._service.answer(request, read)
        visible = self._visible and explain
        content = await run_in_threadpool(views.answer, answered[0], response, visible=visible)
        return self._views.answer(**content)

    def _one(
        self, request: Request, options: PredictOptions, answered: Callable[[Loaded[Any], Prediction], None]
    ) -> Callable[[], Awaitable[Upload]]:
        async def read() -> Upload:
            upload = await read_upload(request, options, self._service.settings)
            if upload.options is not options or len(upload.files) != 1:
                raise Problem(422, f"the page takes one image at a time; seen: {len(upload.files)}")
            return replace(upload, answered=answered)

        return read

    async def _describe(self, request: Request) -> dict[str, Any]:
        """What is served, as far as the caller may know. Raises Problem."""
        caller, loaded = self._service.authorize(request, "predict"), self._service.require_loaded()
        visible = self._visible and caller.may("explain")
        return await run_in_threadpool(views.about, loaded, visible=visible, choice=caller.may("choose-defense"))

    async def _whole(self, request: Request, answer: str | None = None, problem: Problem | None = None) -> Response:
        status = problem.status if problem else 200
        content, lab = None, self._service.settings.lab
        missing: Problem | None = None
        try:
            content = await self._describe(request)
        except Problem as unavailable:
            missing = unavailable
            if problem is None and unavailable.status not in (
                401,
                403,
            ):  # where a key is missing, this is where it goes
                status = unavailable.status
        html = self._views.page(about=content, missing=missing, answer=answer, problem=problem, lab=lab)
        return _html(html, status=status, headers=problem.headers if problem else missing.headers if missing else {})


def _refuse_other_sites(request: Request) -> None:
    """A page of somebody else must not make a visitor's browser spend this service's time."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Problem(403, "this is only for the page itself; other sites use POST /v1/predict")


def _html(content: str, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(content, status, {**HEADERS, **(headers or {})}, media_type="text/html; charset=utf-8")
