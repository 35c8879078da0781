"""``evaluation.json`` and back: what a report is made from again, years later."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mithridate.errors import InputError
from mithridate.evaluation import findings
from mithridate.evaluation.findings import SCHEMA, Evaluation

_ADAPTER = TypeAdapter(Evaluation)

_NUMBERS = frozenset(
    name
    for kind in vars(findings).values()
    if hasattr(kind, "__dataclass_fields__")
    for name, hint in get_type_hints(kind).items()
    if hint in (float, tuple[float, float], dict[int, float])
)
"""Fields that are a number and never None: what JSON cannot say of them (NaN) is null there."""


def to_json_text(evaluation: Evaluation) -> str:
    """The file's content. JSON has no NaN: null stands for it."""
    return json.dumps(_without_nan(evaluation.to_json()), allow_nan=False, ensure_ascii=False) + "\n"


def read_evaluation(path: Path) -> Evaluation:
    """Of a file that ``write_report`` has written. Raises InputError, in one line, for whatever is wrong with it."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    try:
        return evaluation_from_json(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def evaluation_from_json(content: Any) -> Evaluation:
    """The other way from ``Evaluation.to_json``. Raises InputError for another schema, or what does not fit this one.

    >>> evaluation_from_json({"schema": 2})
    Traceback (most recent call last):
        ...
    mithridate.errors.InputError: an evaluation of schema 2; this Mithridate reads 1
    """
    if not isinstance(content, dict):
        raise InputError(f"not an evaluation: {type(content).__name__} instead of an object")
    version = content.get("schema")
    if version != SCHEMA or type(version) is not int:
        raise InputError(f"an evaluation of schema {version!r}; this Mithridate reads {SCHEMA}")
    try:
        return _ADAPTER.validate_python(
            {name: value if name == "service" else _with_nan(value) for name, value in content.items()}
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"not a valid evaluation: {where}: {first['msg']}") from error


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return value


def _with_nan(value: Any, *, is_number: bool = False) -> Any:
    if value is None:
        return math.nan if is_number else None
    if isinstance(value, dict):
        return {key: _with_nan(inner, is_number=is_number or key in _NUMBERS) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_nan(inner, is_number=is_number) for inner in value]
    return value
