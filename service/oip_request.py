"""A request of the Open Inference Protocol: from its body to images and options."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from mithridate.bundle import Manifest
from service.oip_schemas import InferParameters, InferRequest, InputParameters, OutputParameters, RequestInput
from service.problems import Problem
from service.settings import Settings
from service.uploads import check_count, count_elements, media_type_of

INPUT = "images"
DATATYPES = ("UINT8", "FP32", "BYTES")
MAX_JSON_ELEMENTS = 400_000
"""Elements of all lists in the JSON, and the lists themselves. Reading more would keep other requests waiting; binary
data does not."""

_PARAMETERS: dict[str, type[BaseModel]] = {
    "parameters": InferParameters,
    "inputs": InputParameters,
    "outputs": OutputParameters,
}


@dataclass(frozen=True, kw_only=True)
class Inference:
    """What was asked, and the images it came with: files, or uint8 ``[C, H, W]``."""

    asked: InferRequest
    images: Sequence[bytes | NDArray[np.uint8]]


def json_length(request: Request) -> int | None:
    """Bytes of JSON before the binary data, None where all is JSON. Raises Problem where a header is not usable."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise Problem(415, f"content encoding {encoding[:80]!r} is not taken; send the body as it is")
    media_type = media_type_of(request)
    if media_type not in ("", "application/json", "application/octet-stream"):
        raise Problem(
            415, f"content type {media_type[:80]!r} is not taken; allowed: application/json, application/octet-stream"
        )
    stated = request.headers.get("inference-header-content-length")
    if stated is None:
        return None
    if not (stated.isascii() and stated.isdigit() and len(stated) < 19):
        raise Problem(400, f"Inference-Header-Content-Length is {stated[:80]!r}; allowed: the number of bytes of JSON")
    return int(stated)


def parse_infer(body: bytes, length: int | None, manifest: Manifest, settings: Settings) -> Inference:
    """Reads a body whose first ``length`` bytes are JSON (all where None). Raises Problem; call it in a thread."""
    if length is not None and length > len(body):
        raise Problem(400, f"Inference-Header-Content-Length is {length}, but the body has {len(body)} bytes")
    asked = _parse_json(body[:length])
    tensor = _only_input(asked.inputs)
    binary = memoryview(body)[len(body) if length is None else length :]
    size = tensor.parameters.binary_data_size
    if len(binary) != (size or 0):
        raise Problem(400, f"{len(binary)} bytes of binary data follow the JSON; binary_data_size is {size or 0}")
    if (size is None) == (tensor.data is None):
        raise Problem(400, f"input {INPUT}: give either data or the parameter binary_data_size")
    if tensor.datatype == "BYTES":
        images: Sequence[bytes | NDArray[np.uint8]] = _files(tensor, None if size is None else binary, settings)
    else:
        images = _pixels(tensor, None if size is None else binary, asked.parameters.layout, manifest, settings)
    return Inference(asked=asked, images=images)


def _parse_json(text: bytes) -> InferRequest:
    if count_elements(text) >= MAX_JSON_ELEMENTS:
        raise Problem(
            413, f"more than {MAX_JSON_ELEMENTS} elements in JSON; send fewer images, or the tensor as binary data"
        )
    try:
        fields = from_json(text)
    except ValueError as error:
        raise Problem(400, f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Problem(400, f"the JSON must be an object; seen: {type(fields).__name__}")
    try:
        return InferRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        raise Problem(400, f"{where}: {first['msg']}{_allowed(first['loc'], first['type'])}") from error


def _allowed(where: tuple[int | str, ...], kind: str) -> str:
    """What would have been taken instead of an unknown parameter."""
    if kind != "extra_forbidden":
        return ""
    return f"; allowed: {', '.join(_PARAMETERS[str(where[0])].model_fields)}"


def _only_input(inputs: Sequence[RequestInput]) -> RequestInput:
    for tensor in inputs:
        if tensor.name != INPUT:
            raise Problem(400, f"input {tensor.name[:80]!r} is not one of this model's; allowed: {INPUT}")
        if tensor.datatype not in DATATYPES:
            raise Problem(
                400, f"input {INPUT}: datatype {tensor.datatype[:80]!r} is not taken; allowed: {', '.join(DATATYPES)}"
            )
    if len(inputs) > 1:
        raise Problem(400, f"input {INPUT} is there {len(inputs)} times; send all images in one tensor")
    return inputs[0]


def _files(tensor: RequestInput, binary: memoryview | None, settings: Settings) -> list[bytes]:
    """The image files of a BYTES tensor."""
    shape = tensor.shape
    if len(shape) not in (1, 2) or shape[1:] not in ([], [1]) or shape[0] < 1:
        raise Problem(400, f"input {INPUT}: BYTES has the shape {shape}; allowed: [N] with N of at least 1")
    check_count(shape[0], settings)
    files = _from_base64(tensor.data) if binary is None else _from_binary(binary)
    if len(files) != shape[0]:
        raise Problem(400, f"input {INPUT}: {len(files)} files, but the shape {shape}")
    return files


def _from_base64(data: Any) -> list[bytes]:
    flat, _ = _flatten(data)
    files = []
    for number, text in enumerate(flat):
        if not isinstance(text, str):
            raise Problem(400, f"input {INPUT}, file {number}: BYTES in JSON are strings of base64")
        try:
            files.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise Problem(400, f"input {INPUT}, file {number}: not base64 ({error})") from error
    return files


def _from_binary(binary: memoryview) -> list[bytes]:
    """Each element: four bytes of length, little-endian, and so many bytes."""
    files: list[bytes] = []
    at = 0
    while at < len(binary):
        end = at + 4 + int.from_bytes(binary[at : at + 4], "little")
        if at + 4 > len(binary) or end > len(binary):
            raise Problem(400, f"input {INPUT}, file {len(files)}: its binary data is cut off")
        files.append(bytes(binary[at + 4 : end]))
        at = end
    return files


def _pixels(
    tensor: RequestInput, binary: memoryview | None, layout: str, manifest: Manifest, settings: Settings
) -> list[NDArray[np.uint8]]:
    """The images of a UINT8 or FP32 tensor, each uint8 ``[C, H, W]``."""
    channels = manifest.image_shape[0]
    shape, axis = tensor.shape, layout.index("C")
    if len(shape) != 4 or min(shape) < 1 or shape[axis] != channels:
        wanted = "[" + ", ".join(str(channels) if name == "C" else name for name in layout) + "]"
        raise Problem(400, f"input {INPUT}: the shape is {shape}; allowed: {wanted}, no axis empty")
    check_count(shape[0], settings)
    height, width = shape[2:] if layout == "NCHW" else shape[1:3]
    if height * width > settings.max_pixels:
        raise Problem(413, f"input {INPUT}: {width}x{height} px; at most {settings.max_pixels} pixels are taken")
    values = _from_list(tensor) if binary is None else _from_buffer(tensor, binary)
    images = _quantise(values, tensor.datatype).reshape(shape)
    if layout == "NHWC":
        images = images.transpose(0, 3, 1, 2)
    return [np.ascontiguousarray(image) for image in images]


def _from_buffer(tensor: RequestInput, binary: memoryview) -> NDArray[Any]:
    dtype = np.dtype("u1" if tensor.datatype == "UINT8" else "<f4")
    wanted = math.prod(tensor.shape) * dtype.itemsize
    if len(binary) != wanted:
        seen = f"{tensor.datatype} {tensor.shape} has {wanted} bytes"
        raise Problem(400, f"input {INPUT}: {seen}, binary_data_size is {len(binary)}")
    return np.frombuffer(binary, dtype)


def _from_list(tensor: RequestInput) -> NDArray[np.float64]:
    flat, shape = _flatten(tensor.data)
    if shape not in (tensor.shape, [math.prod(tensor.shape)]):
        raise Problem(400, f"input {INPUT}: the data has the shape {shape}, but {tensor.shape} is stated")
    if not set(map(type, flat)) <= {int, float}:
        raise Problem(400, f"input {INPUT}: {tensor.datatype} data must be numbers")
    try:
        return np.array(flat, np.float64)
    except OverflowError as error:
        raise Problem(400, f"input {INPUT}: a number is too large for {tensor.datatype}") from error


def _flatten(data: Any) -> tuple[list[Any], list[int]]:
    """A nested list as a flat one, and the shape it had. By hand: numpy would take strings for numbers, and gigabytes
    for a long string among them."""
    if not isinstance(data, list):
        raise Problem(400, f"input {INPUT}: data must be a list; seen: {type(data).__name__}")
    shape = [len(data)]
    while data and set(map(type, data)) == {list}:
        lengths = set(map(len, data))
        if len(lengths) > 1:
            raise Problem(400, f"input {INPUT}: the lists in data have different lengths")
        shape += lengths
        data = list(chain.from_iterable(data))
    return data, shape[:8]


def _quantise(values: NDArray[Any], datatype: str) -> NDArray[np.uint8]:
    """To uint8, which is what an image is on the wire; FP32 is rounded to the nearest level as everywhere else."""
    if values.dtype == np.uint8:
        return values
    high = 255 if datatype == "UINT8" else 1
    wrong = ~((values >= 0) & (values <= high))  # NaN too
    if wrong.any():
        raise Problem(
            400, f"input {INPUT}: {datatype} must be within [0, {high}]; seen: {float(values[wrong][0]):g}; clip it"
        )
    if datatype == "FP32":
        values = np.rint(values.astype(np.float32) * np.float32(255))
    levels: NDArray[np.uint8] = values.astype(np.uint8)
    if (levels != values).any():
        raise Problem(400, f"input {INPUT}: UINT8 must be whole numbers; seen: {float(values[levels != values][0]):g}")
    return levels
