"""What OpenAPI says beside the types: an example of every body form, and of every error that can be answered."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from service.examples import DIGIT
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

_BINARY = {"type": "string", "format": "binary", "description": "A JPEG, PNG or WebP file"}


def _raw(media_type: str, address: str) -> dict[str, Any]:
    suffix = media_type.partition("/")[2].replace("octet-stream", "jpg")
    curl = f"curl --data-binary @x.{suffix} -H 'Content-Type: {media_type}' '{address}'"
    return {"schema": _BINARY, "examples": {"file": {"summary": "The file itself", "description": f"`{curl}`"}}}


def _form(parts: str, address: str, **limits: int) -> dict[str, Any]:
    return {
        "schema": {
            "type": "object",
            "properties": {"images": {"type": "array", "items": _BINARY, "minItems": 1, **limits}},
            "required": ["images"],
            "additionalProperties": False,
        },
        "examples": {
            "files": {
                "summary": "One part named images for each file",
                "description": f"`curl {parts} '{address}'`",
            }
        },
    }


def _body(content: dict[str, Any]) -> dict[str, Any]:
    said = "Of a file its first bytes decide what it is: any other image/* is taken as well"
    return {"requestBody": {"required": True, "description": said, "content": content}}


_JSON = {
    "schema": PredictBody.model_json_schema(),
    "examples": {
        "one image": {"value": {"images": [DIGIT]}},
        "two images and options": {"value": {"images": [DIGIT, DIGIT], "defense": "rmc", "top_k": 3, "explain": True}},
    },
}
_PREDICT, _LAB = "localhost:8000/v1/predict", "localhost:8000/v1/lab/attack"
PREDICT_BODY = _body(
    {
        **{media_type: _raw(media_type, f"{_PREDICT}?top_k=3") for media_type in RAW_TYPES},
        "multipart/form-data": _form("-F images=@x.png -F images=@y.jpg", f"{_PREDICT}?defense=rmc"),
        "application/json": _JSON,
    }
)
LAB_BODY = _body(
    {
        **{media_type: _raw(media_type, f"{_LAB}?epsilon=16/255") for media_type in RAW_TYPES},
        "multipart/form-data": _form("-F images=@x.png", f"{_LAB}?attack=adaptive&defense=rmc", maxItems=1),
    }
)


def responses(*statuses: int, path: str, example: Any) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of the route at ``path``: ``statuses``, what any address may answer, and an example of 200."""
    found: dict[int | str, dict[str, Any]] = {
        status: _error(status, path) for status in sorted({*statuses, *CONNECTION_ERRORS})
    }
    if isinstance(example, str):
        found[200] = {"content": {"text/plain": {"schema": {"type": "string"}, "example": example}}}
    else:
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
