"""What the OpenAPI document says of the Open Inference Protocol's routes: bodies, answers and errors, with examples."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from mithridate import __version__
from service.oip_schemas import EXTENSIONS, ErrorDocument, InferRequest, InferResponse
from service.openapi import CONNECTION_ERRORS

# A four, as scikit-learn's digits have it: these requests can be sent to the service of `mithridate demo --serve`.
_PIXELS = [
    *([0, 0, 0, 96, 255, 96, 0, 0], [0, 0, 80, 255, 159, 0, 0, 0]),
    *([0, 32, 239, 223, 0, 112, 16, 0], [0, 96, 255, 48, 48, 255, 143, 0]),
    *([0, 175, 255, 128, 175, 255, 96, 0], [0, 48, 239, 255, 255, 239, 16, 0]),
    *([0, 0, 0, 48, 255, 112, 0, 0], [0, 0, 0, 80, 255, 48, 0, 0]),
]
_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAP0lEQVR42gXBAQ2AMAwAsIYg4BLugDnhEibhTpCAFSygAAmXMFrISjDqBn19ZkNWRF12"
    "p3F4EatqNRA12dA9/Iy5EamBCyrYAAAAAElFTkSuQmCC"
)
_SHAPE = [1, 1, 8, 8]
_UINT8: dict[str, Any] = {
    "id": "42",
    "parameters": {"defense": "rmc"},
    "inputs": [{"name": "images", "datatype": "UINT8", "shape": _SHAPE, "data": [[_PIXELS]]}],
    "outputs": [{"name": "label"}, {"name": "confidence"}],
}
_FP32: dict[str, Any] = {
    "inputs": [
        {
            "name": "images",
            "datatype": "FP32",
            "shape": _SHAPE,
            "data": [round(level / 255, 4) for row in _PIXELS for level in row],
        }
    ],
    "outputs": [{"name": "scores", "parameters": {"classification": 3}}],
}
_BYTES: dict[str, Any] = {"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": [_PNG]}]}
_ANSWER: dict[str, Any] = {
    "model_name": "digits-small-cnn",
    "model_version": "3f0c9a51d27e",
    "id": "42",
    "parameters": {"defense": "rmc", "bundle_digest": "sha256:3f0c9a51d27e...", "total_ms": 4.4},
    "outputs": [
        {"name": "label", "shape": [1], "datatype": "BYTES", "data": ["4"]},
        {"name": "confidence", "shape": [1], "datatype": "FP32", "data": [0.98]},
    ],
}
_BINARY = {
    "type": "string",
    "format": "binary",
    "description": "The JSON, as long as the header Inference-Header-Content-Length says, and the tensors behind it",
}

_CURL = """```
json='{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1, 8, 8],
  "parameters": {"binary_data_size": 64}}]}'
(printf %s "$json"; cat pixels.raw) | curl --data-binary @- -H 'Content-Type: application/octet-stream' \
  -H "Inference-Header-Content-Length: ${#json}" localhost:8000/v2/models/digits-small-cnn/infer
```"""
_INDEX = {"name": "class_index", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": 8}}
_BINARY_ANSWER = json.dumps({**_ANSWER, "outputs": [_INDEX]}) + "\4" + 7 * "\0"

SERVER = {"name": "mithridate", "version": __version__, "extensions": list(EXTENSIONS)}
LIVE = {"live": True}
READY = {"live": True, "ready": True}
MODEL_READY = {"name": "digits-small-cnn", "ready": True}
_OUTPUTS = {
    "class_index": ("INT64", [-1]),
    "label": ("BYTES", [-1]),
    "confidence": ("FP32", [-1]),
    "suspicious": ("BOOL", [-1]),
    "abstained": ("BOOL", [-1]),
    "scores": ("FP32", [-1, 10]),
}
MODEL = {
    "name": "digits-small-cnn",
    "versions": ["3f0c9a51d27e"],
    "platform": "mithridate",
    "inputs": [
        {
            "name": "images",
            "datatype": "UINT8",
            "shape": [-1, 1, 8, 8],
            "parameters": {
                "also_accepted": "FP32 [-1, 1, 8, 8] in [0, 1]; "
                "BYTES [-1], files in JPEG, PNG or WebP, in JSON as base64"
            },
        }
    ],
    "outputs": [
        {"name": name, "datatype": datatype, "shape": shape, "parameters": None}
        for name, (datatype, shape) in _OUTPUTS.items()
    ],
}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """With the definitions where they are referred to: beside its own routes' FastAPI takes no others."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, list):
            return [inline(each) for each in part]
        if not isinstance(part, dict):
            return part
        name = str(part.get("$ref", "")).removeprefix("#/$defs/")
        rest = {key: inline(value) for key, value in part.items() if key != "$ref"}
        return {**inline(definitions[name]), **rest} if name else rest

    found: dict[str, Any] = inline(schema)
    return found


INFER_BODY: dict[str, Any] = {
    "parameters": [
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "required": False,
            "schema": {"type": "integer", "minimum": 0},
            "description": "Bytes of JSON at the beginning of a body with binary data",
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": _schema(InferRequest),
                "examples": {
                    "pixels": {"summary": "UINT8 pixels", "value": _UINT8},
                    "floats": {"summary": "FP32 in [0, 1], the best three classes wanted", "value": _FP32},
                    "files": {"summary": "An image file in base64", "value": _BYTES},
                },
            },
            "application/octet-stream": {
                "schema": _BINARY,
                "examples": {"pixels": {"summary": "64 bytes of pixels behind the JSON", "description": _CURL}},
            },
        },
    },
}

INFER_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The outputs; JSON, with binary data behind it where that was wanted",
        "headers": {
            "Inference-Header-Content-Length": {
                "schema": {"type": "integer"},
                "description": "Bytes of JSON, where binary data follows",
            }
        },
        "content": {
            "application/json": {"schema": _schema(InferResponse), "example": _ANSWER},
            "application/octet-stream": {
                "schema": _BINARY,
                "examples": {"class": {"summary": "Eight bytes behind the JSON", "value": _BINARY_ANSWER}},
            },
        },
    }
}

_ERRORS = {
    400: ("malformed or unusable", "input images: the shape is [1, 8, 8]; allowed: [N, 1, H, W], no axis empty"),
    401: ("a key is needed; send it as a bearer token", "a key is needed that this service knows"),
    403: ("the key lacks a scope", "this key may not: it lacks the scope explain"),
    404: ("no such model or version", "there is no model 'mnist' here; served: digits-small-cnn"),
    405: ("another method", "Method Not Allowed"),
    408: ("the body did not arrive in time", "the body did not arrive within 30 s"),
    413: ("too many bytes, pixels or images", "more than 64 images in one request; send fewer"),
    431: ("more headers, or longer ones, than are taken", "at most 100 headers of 16384 bytes in all are taken"),
    429: ("too many requests at once; see Retry-After", "64 requests are waiting already"),
    500: ("the server failed; the log has the reason", "the server failed to answer"),
    503: ("not ready", "still loading the bundle"),
    504: ("no answer within the deadline", "the deadline passed before there was an answer"),
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses for these statuses, and those that any route may have, in the protocol's own form."""
    return {
        status: {
            "description": _ERRORS[status][0],
            "content": {
                "application/json": {
                    "schema": _schema(ErrorDocument),
                    "example": {"error": _ERRORS[status][1]},
                }
            },
        }
        for status in sorted({*statuses, *CONNECTION_ERRORS})
    }


def answers(example: dict[str, Any], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same, and an example of 200."""
    return {200: {"content": {"application/json": {"example": example}}}, **errors(*statuses)}


INFER_ERRORS = errors(*_ERRORS)
