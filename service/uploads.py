"""From a request's body to pixels: three forms, one decoder."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from mithridate.bundle import Manifest
from mithridate.defenses import Prediction
from mithridate.errors import ImageError
from mithridate.images import ImageLimits, decode_image, fit_image
from service.problems import Problem, to_problem
from service.schemas import PredictBody, PredictOptions
from service.settings import Settings

RAW_TYPES = ("image/png", "image/jpeg", "image/webp", "application/octet-stream")
_ALLOWED = "allowed: image/png, image/jpeg, image/webp, multipart/form-data, application/json"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Encoded images and the options that came with them."""

    files: Sequence[bytes]
    options: PredictOptions
    answered: Callable[[Prediction], None] = lambda prediction: None
    """Told what the engine answered, before that is reported."""


async def read_upload(request: Request, options: PredictOptions, settings: Settings) -> Upload:
    """Reads the body in whichever form it has. Raises Problem for what cannot be used."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in (*RAW_TYPES, "multipart/form-data", "application/json"):
        raise Problem(415, f"content type {media_type or '(none)'!r} is not taken; {_ALLOWED}")
    body = await _read_body(request, settings)
    if not body:
        raise Problem(400, "the body is empty; send an image")
    if media_type == "application/json":
        return _from_json(body, request, settings)
    files = await _from_multipart(request, body, settings) if media_type == "multipart/form-data" else [body]
    return Upload(files=files, options=options)


async def decode_upload(
    files: Sequence[bytes], manifest: Manifest, settings: Settings, executor: Executor
) -> NDArray[np.uint8]:
    """uint8 ``[N, C, H, W]`` in the bundle's shape; decoding runs in ``executor``. Raises Problem."""
    limits = ImageLimits(max_bytes=settings.max_body_bytes, max_pixels=settings.max_pixels)

    def decode(number: int, data: bytes) -> NDArray[np.uint8]:
        try:
            image = decode_image(data, channels=manifest.image_shape[0], limits=limits)
            return fit_image(image, shape=manifest.image_shape, resize=manifest.resize)
        except ImageError as error:
            raise to_problem(error, prefix=f"image {number}: " if len(files) > 1 else "") from error

    loop = asyncio.get_running_loop()
    jobs = [loop.run_in_executor(executor, decode, number, data) for number, data in enumerate(files)]
    return np.stack(await asyncio.gather(*jobs))


async def _read_body(request: Request, settings: Settings) -> bytes:
    """The body, never more of it than allowed. 413 before it is all here, 408 for one that does not come."""
    too_large = Problem(413, f"the body is larger than {settings.max_body_bytes} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > settings.max_body_bytes:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > settings.max_body_bytes:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError as error:
        raise Problem(408, f"the body did not arrive within {settings.body_timeout_s:g} s") from error
    except ClientDisconnect as error:
        raise Problem(400, "the client left before its request was complete") from error
    return b"".join(chunks)


def _from_json(body: bytes, request: Request, settings: Settings) -> Upload:
    if request.query_params:
        raise Problem(422, "with a JSON body, options are JSON fields; seen: query parameters")
    try:
        fields = from_json(body)
    except ValueError as error:
        raise Problem(400, f"body: Invalid JSON: {error}") from error
    # Before pydantic, which collects one error for every wrong element: minutes for a body of a few megabytes.
    if not isinstance(fields, dict):
        raise Problem(422, f"body: Input should be an object; seen: {type(fields).__name__}")
    for name in fields.keys() - PredictBody.model_fields.keys():
        raise Problem(422, f"{name[:80]}: Extra inputs are not permitted")
    if isinstance(fields.get("images"), list):
        _check_count(len(fields["images"]), settings)
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


async def _from_multipart(request: Request, body: bytes, settings: Settings) -> list[bytes]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    _, parameters = parse_options_header(request.headers["content-type"])
    boundary = parameters.get(b"boundary")
    if boundary and b"--" + boundary + b"--" not in body:  # the parser leaves out a part that is cut off
        raise Problem(400, "not readable as multipart/form-data: it ends before its last boundary")
    parser = MultiPartParser(
        request.headers, stream(), max_files=settings.max_images + 1, max_fields=8, max_part_size=64 * 1024
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        message = getattr(error, "message", str(error))
        if "Too many files" in message:
            _check_count(settings.max_images + 1, settings)
        raise Problem(400, f"not readable as multipart/form-data: {message}") from error
    try:
        files = []
        for name, part in form.multi_items():
            if name != "images" or not isinstance(part, UploadFile):
                raise Problem(
                    422, f"part {name!r} is not taken; allowed: files named 'images'; options are in the query"
                )
            files.append(await part.read())
    finally:
        await form.close()
    if not files:
        raise Problem(400, "no part named 'images'; send at least one file of that name")
    _check_count(len(files), settings)
    return files


def _check_count(count: int, settings: Settings) -> None:
    if count > settings.max_images:
        raise Problem(413, f"more than {settings.max_images} images in one request; send fewer")
