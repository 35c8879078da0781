"""A defence as text: ``rmc``, ``webnn:neighbors=32``, ``rmc:scope=all,neighbors=512``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from mithridate.errors import OptionError

Config = TypeVar("Config")


def split_text(text: str) -> tuple[str, dict[str, str]]:
    """``name:key=value,...`` to its name and options. Raises OptionError for another form."""
    name, colon, tail = text.strip().partition(":")
    options: dict[str, str] = {}
    for part in tail.split(",") if colon else []:
        key, equals, value = part.partition("=")
        if not (key and equals and value) or key in options:
            raise OptionError(f"cannot read {part!r} in {text!r}; write options once each, as name:key=value,key=value")
        options[key] = value
    return name, options


def fill(config: type[Config], options: dict[str, str], *, of: str, fixed: Iterable[str] = ()) -> Config:
    """Makes the dataclass ``config`` from text. Raises OptionError for unknown keys and unreadable values."""
    hints = get_type_hints(config)
    known = [field.name for field in fields(config) if field.name not in set(fixed)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known:
            raise OptionError(unknown(f"option of {of}", key, known))
        try:
            values[key] = hints[key](text)
        except ValueError as error:
            raise OptionError(f"{of}: {key}={text!r} is not {hints[key].__name__}") from error
    return config(**values)


def canonical(name: str, config: object, *, prefix: dict[str, str] | None = None) -> str:
    """The text that leads back to ``config``: only what differs from the defaults, in the order of the fields."""
    default = type(config)()
    changed = {
        field.name: getattr(config, field.name)
        for field in fields(config)  # type: ignore[arg-type]
        if getattr(config, field.name) != getattr(default, field.name)
    }
    shown = {**(prefix or {}), **changed}
    return name + (":" + ",".join(f"{key}={value}" for key, value in shown.items()) if shown else "")


def unknown(kind: str, seen: str, allowed: Iterable[str]) -> str:
    """The message for a name that is not in a list."""
    names = sorted(allowed)
    near = difflib.get_close_matches(seen, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {kind} {seen!r}{hint}; allowed: {', '.join(names)}"


def require(of: str, key: str, value: float, low: float, high: float) -> None:
    """Raises OptionError where ``value`` is not in ``low`` .. ``high``."""
    if not low <= value <= high:
        raise OptionError(f"{of}: {key}={str(value)[:20]} is out of range; allowed: {low:g} to {high:g}")
