"""What the service and its engine processes say to each other: frames of a JSON header and the bytes of arrays.

A frame is the length of its header and of its body, big-endian, then both. The header is the message with a reference
where an array stands; the body is all arrays, one after the other. Nothing is pickled: whatever a frame holds, reading
it gives numbers, text, and the three kinds of ``_KINDS``.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.defenses import Adaptation, Neighborhood, Prediction

Message = dict[str, Any]
Buffer = bytes | bytearray | memoryview

PREFIX = struct.Struct(">IQ")
"""Bytes of header and of body."""

_MOST = 2**34
"""More bytes than that in a frame: no, the two sides are out of step."""

_KINDS: Mapping[str, type] = {kind.__name__: kind for kind in (Prediction, Adaptation, Neighborhood)}
_ARRAY, _TENSOR, _KIND, _PAIRS = "$array", "$tensor", "$kind", "$pairs"


class WireError(Exception):
    """Bytes that are no frame, or something that has no place in one."""


def encode(message: Mapping[str, Any]) -> list[Buffer]:
    """The parts of the frame, in order. Raises WireError for what cannot be sent."""
    arrays: list[NDArray[Any]] = []
    header = json.dumps(_pack(message, arrays), separators=(",", ":")).encode()
    body: list[Buffer] = [array.reshape(-1).view(np.uint8).data for array in arrays if array.nbytes]
    return [PREFIX.pack(len(header), sum(map(len, body))) + header, *body]


def sizes(prefix: Buffer) -> tuple[int, int]:
    """Bytes of header and of body. Raises WireError where no frame is that large."""
    header, body = PREFIX.unpack(prefix)
    if header + body > _MOST:
        raise WireError(f"a frame of {header} + {body} bytes")
    return header, body


def decode(header: Buffer, body: bytearray) -> Message:
    """The message. Its arrays are views of ``body``. Raises WireError where the two do not fit."""
    try:
        found = _unpack(json.loads(bytes(header)), _Body(body))
    except (ValueError, TypeError, KeyError) as error:
        raise WireError(f"not a frame: {error}") from error
    if not isinstance(found, dict):
        raise WireError(f"not a message: {type(found).__name__}")
    return found


def _pack(value: Any, arrays: list[NDArray[Any]]) -> Any:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:  # numpy has no such numbers
            value = value.float()
        return {_TENSOR: _pack_array(value.numpy(), arrays)}
    if isinstance(value, np.ndarray):
        return {_ARRAY: _pack_array(value, arrays)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _pack(part, arrays) for key, part in value.items()}
        return {_PAIRS: [[_pack(key, arrays), _pack(part, arrays)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(part, arrays) for part in value]
    if is_dataclass(value) and _KINDS.get(type(value).__name__) is type(value):
        # Field by field: what is added to a prediction is sent as well.
        parts = {field.name: _pack(getattr(value, field.name), arrays) for field in fields(value)}
        return {_KIND: type(value).__name__, **parts}
    raise WireError(f"{type(value).__name__} cannot be sent")


def _pack_array(array: NDArray[Any], arrays: list[NDArray[Any]]) -> list[Any]:
    if array.dtype.hasobject:
        raise WireError("an array of objects cannot be sent")
    arrays.append(np.ascontiguousarray(array))
    return [array.dtype.str, list(array.shape)]


class _Body:
    """Hands out the arrays in the order in which the header names them, which is that of ``encode``."""

    def __init__(self, data: bytearray) -> None:
        self._data = data
        self._at = 0

    def array(self, described: list[Any]) -> NDArray[Any]:
        dtype, shape = np.dtype(described[0]), tuple(described[1])
        if dtype.hasobject or any(type(side) is not int or side < 0 for side in shape):
            raise ValueError(f"array of {dtype} {shape}")
        count = math.prod(shape)
        # Copied where it would not lie at a multiple of its items' size: torch wants that.
        found = np.frombuffer(self._data, dtype, count, self._at) if count else np.empty(shape, dtype)
        self._at += found.nbytes
        return (found if found.flags.aligned else found.copy()).reshape(shape)


def _unpack(value: Any, body: _Body) -> Any:
    if isinstance(value, list):
        return tuple(_unpack(part, body) for part in value)
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return torch.from_numpy(body.array(value[_TENSOR]))
    if _ARRAY in value:
        return body.array(value[_ARRAY])
    if _PAIRS in value:
        return {_unpack(key, body): _unpack(part, body) for key, part in value[_PAIRS]}
    parts = {key: _unpack(part, body) for key, part in value.items() if key != _KIND}
    return _KINDS[value[_KIND]](**parts) if _KIND in value else parts
