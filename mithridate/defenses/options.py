"""A defence as text: ``rmc``, ``webnn:neighbors=32``, ``rmc:scope=all,neighbors=512``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mithridate.errors import OptionError

Config = TypeVar("Config")

_SHOWN = 200


def split_text(text: str) -> tuple[str, dict[str, str]]:
    """``name:key=value,...`` to its name and options. Raises OptionError for another form."""
    name, colon, tail = text.strip().partition(":")
    options: dict[str, str] = {}
    for part in tail.split(",") if colon else []:
        key, equals, value = part.partition("=")
        if not (key and equals and value) or key in options:
            raise OptionError(
                f"cannot read {shortened(part)} in {shortened(text)}; write options once each, as "
                "name:key=value,key=value"
            )
        options[key] = value
    return name, options


def fill(config: Config, options: Mapping[str, str], *, of: str) -> Config:
    """``config``, a dataclass, with what ``options`` say; dataclasses inside it are filled by the same flat keys.

    Raises OptionError for unknown keys and unreadable values.
    """
    known = flatten(config)
    for key in options:
        if key not in known:
            raise OptionError(unknown(f"option of {of}", key, known))
    return _fill(config, options, of)


def _fill(config: Config, options: Mapping[str, str], of: str) -> Config:
    hints = get_type_hints(type(config))
    values: dict[str, Any] = {}
    for field in fields(config):  # type: ignore[arg-type]
        current = getattr(config, field.name)
        key = field.name.rstrip("_")
        if is_dataclass(current):
            values[field.name] = _fill(current, options, of)
        elif key in options:
            values[field.name] = _read(hints[field.name], options[key], f"{of}: {key}")
    return replace(config, **values)  # type: ignore[type-var]


def flatten(config: object) -> dict[str, Any]:
    """Every option of ``config`` and of the dataclasses inside it, by key, in the order of the fields. The
    key is the field's name without the underscore that keeps it from being Python's own (``lambda_``).
    """
    flat: dict[str, Any] = {}
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        flat.update(flatten(value) if is_dataclass(value) else {field.name.rstrip("_"): value})
    return flat


def canonical(name: str, config: object, default: object, *, prefix: Mapping[str, str] | None = None) -> str:
    """The text that leads back to ``config``: only what differs from ``default``, in the order of the fields."""
    usual = flatten(default)
    changed = {key: write(value) for key, value in flatten(config).items() if value != usual[key]}
    shown = {**(prefix or {}), **changed}
    return name + (":" + ",".join(f"{key}={value}" for key, value in shown.items()) if shown else "")


def write(value: Any) -> str:
    """An option's value as text that ``fill`` reads."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read(kind: Any, text: str, what: str) -> Any:
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        if text not in choices:
            raise OptionError(f"{what}={text!r} is not known; allowed: {', '.join(choices)}")
        return text
    words = [word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)]
    if text in words:
        return text
    if type(None) in choices and text == "none":
        return None
    if choices:  # of a union: what is neither a word nor None
        kind = next(choice for choice in choices if choice is not type(None) and get_origin(choice) is not Literal)
    if kind is bool:
        if text not in ("true", "false"):
            raise OptionError(f"{what}={text!r} is not true or false")
        return text == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise OptionError(f"{what}={text!r} is not {' or '.join([kind.__name__, *words])}") from error


def unknown(kind: str, seen: str, allowed: Iterable[str]) -> str:
    """The message for a name that is not in a list."""
    names = sorted(allowed)
    near = difflib.get_close_matches(seen, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {kind} {shortened(seen)}{hint}; allowed: {', '.join(names)}"


def shortened(text: str) -> str:
    """What somebody wrote, for a message: in quotes, and not all of it where it is long."""
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}..."


def require(of: str, key: str, value: float, low: float, high: float) -> None:
    """Raises OptionError where ``value`` is not in ``low`` .. ``high``."""
    if not low <= value <= high:
        raise OptionError(f"{of}: {key}={str(value)[:20]} is out of range; allowed: {low:g} to {high:g}")
