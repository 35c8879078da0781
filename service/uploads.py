"""From a request's body to pixels: three forms, one decoder."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from mithridate.bundle import Manifest
from mithridate.defenses import Prediction
from mithridate.errors import ImageError
from mithridate.images import ImageLimits, OpenImage, fit_image, open_image
from service.decode_pool import DecodePool
from service.loading import Loaded
from service.multipart import read_parts
from service.problems import Problem, to_problem
from service.schemas import PredictBody, PredictOptions
from service.settings import Settings

RAW_TYPES = ("image/png", "image/jpeg", "image/webp", "application/octet-stream")
_RATE_GRACE_S = 5.0
"""How long a body may come at any rate; then its bytes so far, over the time since, must reach ``min_body_rate``."""
_JOB_PIXELS = 1_048_576
_SHORT_BYTES = 65_536
_MAX_JSON_EXTRAS = 4096
"""Lists, objects and commas in JSON beside one for each image: of its options, and of what is to be told wrong."""
_Result = TypeVar("_Result")
_ALLOWED = "allowed: image/*, application/octet-stream, multipart/form-data, application/json"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Images and the options that came with them. An image is an encoded file, or pixels: uint8 ``[C, H, W]``."""

    files: Sequence[bytes | NDArray[np.uint8]]
    options: PredictOptions
    answered: Callable[[Loaded[Any], Prediction], None] = lambda loaded, prediction: None
    """Told what the engine answered, and from which bundle, before that is reported; another may be live by then."""


def media_type_of(request: Request) -> str:
    """What the body is said to be, in lower case and without parameters; empty where nothing is said."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_upload(request: Request, options: PredictOptions, settings: Settings) -> Upload:
    """Reads the body in whichever form it has. Raises Problem for what cannot be used."""
    media_type = media_type_of(request)
    named = (*RAW_TYPES, "multipart/form-data", "application/json")
    # Of an image its own first bytes say which kind it is.
    if media_type not in named and not media_type.startswith("image/"):
        raise Problem(415, f"content type {media_type[:80] or '(none)'!r} is not taken; {_ALLOWED}")
    body = await read_body(request, settings)
    if not body:
        raise Problem(400, "the body is empty; send an image")
    if media_type == "application/json":
        return await _aside(body, partial(_from_json, body, request, settings))
    files: Sequence[bytes] = [body]
    if media_type == "multipart/form-data":
        files = await _aside(body, partial(_from_multipart, request, body, settings))
    return Upload(files=files, options=options)


async def _aside(body: bytes, read: Callable[[], _Result]) -> _Result:
    """What ``read`` makes of the body; in a thread where that takes longer than the way there: the event loop has
    others to serve."""
    return read() if len(body) <= _SHORT_BYTES else await asyncio.to_thread(read)


async def decode_upload(
    files: Sequence[bytes | NDArray[np.uint8]], manifest: Manifest, settings: Settings, pool: DecodePool
) -> NDArray[np.uint8]:
    """uint8 ``[N, C, H, W]`` in the bundle's shape, decoded in ``pool``. Raises Problem, before pixels are decoded
    where the files' headers tell."""
    opened = await pool.run(0, partial(_open, files, manifest, settings))
    decoded: list[NDArray[np.uint8]] = []
    # One job of a request after the other: whoever sends many images leaves room for those who send one.
    for first, group in _groups(opened):
        decoded += await pool.run(sum(image.pixels for image in group), partial(_decode, group, first, len(files)))
    return np.stack(decoded)


class _Raw:
    """An image that came as its pixels, uint8 ``[C, H, W]``."""

    def __init__(self, image: NDArray[np.uint8], manifest: Manifest) -> None:
        self.pixels = image.shape[1] * image.shape[2]
        self._image, self._manifest = image, manifest

    def decode(self) -> NDArray[np.uint8]:
        """As it came, or fitted as a file of its size would be."""
        return fit_image(self._image, shape=self._manifest.image_shape, resize=self._manifest.resize)


_Opened = OpenImage | _Raw


def _open(files: Sequence[bytes | NDArray[np.uint8]], manifest: Manifest, settings: Settings) -> list[_Opened]:
    limits = ImageLimits(max_bytes=settings.max_body_bytes, max_pixels=settings.max_pixels)
    opened, pixels, allowed = list[_Opened](), 0, settings.max_request_pixels
    for number, data in enumerate(files):
        with _numbered(number, len(files)):
            opened.append(
                open_image(data, shape=manifest.image_shape, resize=manifest.resize, limits=limits)
                if isinstance(data, bytes)
                else _Raw(data, manifest)
            )
        pixels += opened[-1].pixels
        if pixels > allowed:
            raise Problem(413, f"the first {number + 1} images have {pixels:,} pixels; at most {allowed:,} are allowed")
    return opened


def _groups(images: Sequence[_Opened]) -> Iterator[tuple[int, list[_Opened]]]:
    """(number of the first, images) of parts worth a job each: for a small image the way to a thread costs more."""
    first = 0
    for end in range(1, len(images) + 1):
        if end == len(images) or sum(image.pixels for image in images[first : end + 1]) > _JOB_PIXELS:
            yield first, list(images[first:end])
            first = end


def _decode(images: Sequence[_Opened], first: int, count: int) -> list[NDArray[np.uint8]]:
    decoded = []
    for number, image in enumerate(images, first):
        with _numbered(number, count):
            decoded.append(image.decode())
    return decoded


@contextmanager
def _numbered(number: int, count: int) -> Iterator[None]:
    """A library error as a problem that says which image it was, where there are several."""
    try:
        yield
    except ImageError as error:
        raise to_problem(error, prefix=f"image {number}: " if count > 1 else "") from error


async def read_body(request: Request, settings: Settings, *, max_bytes: int | None = None) -> bytes:
    """The body, never more of it than ``max_bytes`` (else the settings') allow. 413 before it is all here, 408 for one
    that does not come."""
    most = settings.max_body_bytes if max_bytes is None else min(max_bytes, settings.max_body_bytes)
    too_large = Problem(413, f"the body is larger than {most} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise too_large
    chunks, size, rate = [], 0, settings.min_body_rate
    loop = asyncio.get_running_loop()
    started = loop.time()
    latest = started + settings.body_timeout_s
    try:
        async with asyncio.timeout_at(min(latest, started + _RATE_GRACE_S if rate else latest)) as limit:
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    raise too_large
                chunks.append(chunk)
                if rate:
                    limit.reschedule(min(latest, started + _RATE_GRACE_S + size / rate))
    except TimeoutError as error:
        if loop.time() < latest:
            raise Problem(408, f"the body came too slowly: {size} bytes, at under {rate:g} bytes a second") from error
        raise Problem(408, f"the body did not arrive within {settings.body_timeout_s:g} s") from error
    except ClientDisconnect as error:
        raise Problem(400, "the client left before its request was complete") from error
    return b"".join(chunks)


def parse_json(body: bytes) -> Any:
    """What it says. Raises Problem 400 where it is not JSON."""
    try:
        return from_json(body)
    except ValueError as error:
        raise Problem(400, f"body: Invalid JSON: {error}") from error


def _from_json(body: bytes, request: Request, settings: Settings) -> Upload:
    if request.query_params:
        raise Problem(422, "with a JSON body, options are JSON fields; seen: query parameters")
    # Before it is parsed: each of them takes time and forty times its own bytes. Base64 has none.
    if count_elements(body) > settings.max_images + _MAX_JSON_EXTRAS:
        raise Problem(
            413, f"too many lists, objects and elements in JSON; send at most {settings.max_images} images and options"
        )
    fields = parse_json(body)
    # Before pydantic, which collects one error for every wrong element: minutes for a body of a few megabytes.
    if not isinstance(fields, dict):
        raise Problem(422, f"body: Input should be an object; seen: {type(fields).__name__}")
    unknown = next((name for name in fields if name not in PredictBody.model_fields), None)
    if unknown is not None:
        raise Problem(422, f"{unknown[:80]}: Extra inputs are not permitted")
    if isinstance(fields.get("images"), list):
        check_count(len(fields["images"]), settings)
    try:
        parsed = PredictBody.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise Problem(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    files = []
    for number, text in enumerate(parsed.images):
        try:
            files.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise Problem(400, f"images.{number}: not base64 ({error})") from error
    options = PredictOptions(**parsed.model_dump(exclude={"images"}))
    return Upload(files=files, options=options)


def _from_multipart(request: Request, body: bytes, settings: Settings) -> list[bytes]:
    try:
        parts = read_parts(body, request.headers["content-type"], max_parts=settings.max_images)
    except ValueError as error:
        raise Problem(400, f"not readable as multipart/form-data: {error}") from error
    for part in parts:
        if part.name != "images" or part.filename is None:
            allowed = "allowed: files named 'images'; options are in the query"
            raise Problem(422, f"part {part.name[:80]!r} is not taken; {allowed}")
    if not parts:
        raise Problem(400, "no part named 'images'; send at least one file of that name")
    check_count(len(parts), settings)
    return [part.content for part in parts]


def count_elements(text: bytes) -> int:
    """At least as many as the lists and objects in this JSON, and what is in them, beyond the first of each."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def check_count(count: int, settings: Settings) -> None:
    """Raises Problem 413 for more images than a request may have."""
    if count > settings.max_images:
        raise Problem(413, f"more than {settings.max_images} images in one request; send fewer")
