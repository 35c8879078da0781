"""How much work an image may be: a ceiling on what an operator offers, so that a slip of the pen is not served."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass

from mithridate.defenses import Defence
from mithridate.errors import OptionError
from service.settings import Settings

_SETTINGS = {"neighbors": "max_neighbors", "steps": "max_steps", "epochs": "max_steps", "passes": "max_passes"}
_SHARED = "resources"
"""The part of a defence that is the bundle's and says nothing about its options."""


def check_ceilings(defences: Iterable[Defence], settings: Settings) -> None:
    """Raises OptionError for the first defence that does more for an image than the settings allow."""
    for defence in defences:
        for option, value in _options(defence):
            setting = _SETTINGS.get(option)
            most = getattr(settings, setting) if setting else None
            if most is not None and isinstance(value, int) and value > most:
                raise OptionError(
                    f"{defence.name} has {option}={value}, more than {setting}={most}; give it fewer {option}, "
                    f"leave it out of what is offered, or raise {setting}"
                )


def _options(part: object) -> Iterator[tuple[str, object]]:
    """Every field of a defence and of the parts it is made of."""
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if field.name != _SHARED and is_dataclass(value) and not isinstance(value, type):
            yield from _options(value)
        else:
            yield field.name, value
