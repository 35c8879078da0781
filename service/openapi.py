"""What OpenAPI says beside the types: an example of every body form, and of every error that can be answered."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from service.problems import MEDIA_TYPE
from service.schemas import PredictBody, ProblemDocument
from service.uploads import RAW_TYPES

_ERRORS: dict[int, tuple[str, str]] = {
    400: (
        "Malformed: the body, the image in it, or the request itself",
        "PNG image is truncated: 93 bytes seen, 105 needed",
    ),
    401: (
        "A key is needed; send it as a bearer token",
        "a key is needed that this service knows; send it as Authorization: Bearer KEY",
    ),
    403: ("The key lacks a scope", "this key may not: it lacks the scope choose-defense"),
    404: ("There is none", "this bundle has no card: it was not evaluated"),
    405: ("Another method; Allow names those that are taken", "Method Not Allowed"),
    408: ("Headers or body came too slowly; the connection may be closed", "the body did not arrive within 30 s"),
    409: ("Another bundle is being loaded, or there is none to go back to", "there is no bundle before this one"),
    413: ("Too many bytes, pixels or images", "PNG image of 30000x30000 px: at most 16,384 px a side are allowed"),
    415: (
        "Not an image type that is taken, or not a content type that is taken",
        "image starts with b'GIF89a\\x08\\x00': allowed are JPEG, PNG and WebP files",
    ),
    422: (
        "Well-formed, but not usable: another size, an animation, an unknown option",
        "image is 16x9 px, this model takes exactly 8x8 px: resize it first",
    ),
    429: ("Too many requests, or too many bytes of them, at once; see Retry-After", "64 requests are waiting already"),
    431: ("More headers, or longer ones, than are taken", "at most 100 headers of 16384 bytes in all are taken"),
    500: ("The server failed; the log has the reason under the request's id", "the server failed to answer"),
    503: ("Not ready, stopping, or all connections are in use; see Retry-After", "still loading the bundle"),
    504: ("No answer within the deadline", "the deadline passed before there was an answer"),
}
_RETRY = {
    "Retry-After": {"description": "Seconds after which to try again", "schema": {"type": "integer", "minimum": 1}}
}
_ALLOW = {"Allow": {"description": "The methods that are taken", "schema": {"type": "string"}, "required": True}}
_CHALLENGE = {"WWW-Authenticate": {"description": "How to send a key", "schema": {"type": "string"}}}
_HEADERS: dict[int, dict[str, Any]] = {401: _CHALLENGE, 405: _ALLOW, 429: _RETRY, 503: _RETRY}

CONNECTION_ERRORS = (400, 405, 408, 431, 500, 503)
"""What any address may answer, whatever its route does: the connection and the router come first."""
KEY_ERRORS = (401, 403)
"""What a route that asks for a key may answer, where the service has any."""
PREDICT_ERRORS = (*KEY_ERRORS, 413, 415, 422, 429, 504)

_DIGIT = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAP0lEQVR4nAXBAQ2AMAwAsIYg4BLugDnhEibhTpCAFSygAAmXMFrISjDqBn19ZkNWRF12"
    "p3F4EatqNRA12dA9/Iy5EakHpvaFAAAAAElFTkSuQmCC"
)
"""A four, from scikit-learn's digits: a PNG of 8x8 px."""


def _raw(media_type: str) -> dict[str, Any]:
    suffix = media_type.partition("/")[2].replace("octet-stream", "jpg")
    curl = f"curl --data-binary @x.{suffix} -H 'Content-Type: {media_type}' localhost:8000/v1/predict?top_k=3"
    return {"schema": _BINARY, "examples": {"file": {"summary": "The file itself", "description": f"`{curl}`"}}}


_BINARY = {"type": "string", "format": "binary", "description": "A JPEG, PNG or WebP file"}
_FORM = {
    "schema": {
        "type": "object",
        "properties": {"images": {"type": "array", "items": _BINARY, "minItems": 1}},
        "required": ["images"],
        "additionalProperties": False,
    },
    "examples": {
        "files": {
            "summary": "One part named images for each file",
            "description": "`curl -F images=@x.png -F images=@y.jpg localhost:8000/v1/predict?defense=rmc`",
        }
    },
}
_JSON = {
    "schema": PredictBody.model_json_schema(),
    "examples": {
        "one image": {"value": {"images": [_DIGIT]}},
        "two images and options": {
            "value": {"images": [_DIGIT, _DIGIT], "defense": "rmc", "top_k": 3, "explain": True}
        },
    },
}
PREDICT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            **{media_type: _raw(media_type) for media_type in RAW_TYPES},
            "multipart/form-data": _FORM,
            "application/json": _JSON,
        },
    }
}

_PROBABLE, _OTHER = (
    {"label": label, "class_index": int(label), "confidence": p} for label, p in (("4", 0.98), ("1", 0.71))
)
PREDICT_ANSWER: dict[str, Any] = {
    "id": "8c8f4a6f2f0b4b4d9d1f7f3f0c3f6f0e",
    "bundle": {"name": "digits-small-cnn", "digest": f"sha256:{64 * '0'}"},
    "defense": "rmc",
    "predictions": [
        {
            **_PROBABLE,
            "top": [_PROBABLE],
            "undefended": _OTHER,
            "suspicious": True,
            "abstained": False,
            "adaptation": {
                "steps": 40,
                "stop_reason": "converged",
                "answered_from": "adapted",
                "held_out_loss": {"before": 0.61, "after": 0.08},
                "neighbors": 256,
                "neighbor_labels": {"4": 211, "1": 45},
                "adversarial_fraction": 0.93,
            },
            "neighbors": None,
        }
    ],
    "batch": {"requests": 1, "images": 1},
    "timings_ms": {
        "queue": 0.1,
        "decode": 0.4,
        "embed": 1.2,
        "search": 0.3,
        "adapt": 2.0,
        "predict": 0.2,
        "total": 4.4,
    },
}


def responses(*statuses: int, path: str, example: Any = None) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of the route at ``path``: ``statuses``, what any address may answer, and an example of 200."""
    found: dict[int | str, dict[str, Any]] = {
        status: _error(status, path) for status in sorted({*statuses, *CONNECTION_ERRORS})
    }
    if path == "/metrics":
        found[200] = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    if example is not None:
        found[200] = {"content": {"application/json": {"example": example}}}
    return found


def _error(status: int, path: str) -> dict[str, Any]:
    description, detail = _ERRORS[status]
    document = ProblemDocument(
        type="about:blank",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=path,
        request_id="8c8f4a6f2f0b4b4d9d1f7f3f0c3f6f0e",
    )
    content = {"schema": ProblemDocument.model_json_schema(), "example": document.model_dump()}
    headers = {"headers": _HEADERS[status]} if status in _HEADERS else {}
    return {"description": description, "content": {MEDIA_TYPE: content}, **headers}
