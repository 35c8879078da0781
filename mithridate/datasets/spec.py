"""The one-line specification of a data set: ``NAME[:ARGUMENT]`` and an optional selection in brackets."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from mithridate.errors import DatasetError

Split: TypeAlias = Literal["train", "test"]

SELECTION_HELP: Final = "[train], [test], [:COUNT], [START:STOP] or [SPLIT,START:STOP]"
_SELECTION: Final = re.compile(
    r"""\[\s*(?: (?P<split>train|test)
              |  (?: (?P<split_first>train|test) \s*,\s* )? (?P<start>\d{0,18}) \s*:\s* (?P<stop>\d{0,18})
        )\s*\]\Z""",
    re.VERBOSE | re.ASCII,
)
_ARGUMENTS: Final[dict[str, str | None]] = {
    "digits": None,
    "mnist": None,
    "fashion-mnist": None,
    "cifar10": None,
    "cifar100": None,
    "folder": "DIR",
    "parquet": "GLOB",
    "npz": "FILE",
}


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A parsed specification; ``str()`` writes it back.

    ``start`` and ``stop`` select as a Python slice does: non-negative, ``None`` for an open end, ends beyond
    the data are cut. They count within the split.
    """

    source: str
    argument: str | None = None
    split: Split | None = None
    start: int | None = None
    stop: int | None = None

    @property
    def window(self) -> slice:
        """What of the split is kept."""
        return slice(self.start, self.stop)

    def __str__(self) -> str:
        name = self.source if self.argument is None else f"{self.source}:{self.argument}"
        window = "" if self.start is None and self.stop is None else f"{_digits(self.start)}:{_digits(self.stop)}"
        selection = ",".join(part for part in (self.split, window) if part)
        if selection:
            return f"{name}[{selection}]"
        return f"{name}[:]" if _SELECTION.search(name) else name  # a path that ends as a selection does


def parse_spec(text: str) -> DatasetSpec:
    """Parse ``NAME``, ``NAME:ARGUMENT``, each with an optional selection at the very end.

    >>> parse_spec("cifar10[test,:1000]")
    DatasetSpec(source='cifar10', argument=None, split='test', start=None, stop=1000)

    Only a last bracket group that reads as a selection is one: ``parquet:train-[0-9]*[:8000]`` is a glob with
    a selection, ``parquet:train-[0-9]`` a glob without. Raises ``DatasetError`` for anything else.
    """
    body, split, start, stop = text.strip(), None, None, None
    match = _SELECTION.search(body)
    if match is not None:
        body = body[: match.start()].rstrip()
        split = match["split"] or match["split_first"]
        start, stop = (int(match[end]) if match[end] else None for end in ("start", "stop"))
    source, colon, argument = body.partition(":")
    if source not in _ARGUMENTS:
        raise DatasetError(_unknown(source))
    placeholder = _ARGUMENTS[source]
    if placeholder is None and colon:
        raise DatasetError(f"data set {text!r}: {source} takes no ':{argument}'; a selection is {SELECTION_HELP}")
    if placeholder is not None and not argument:
        raise DatasetError(f"data set {text!r}: write {source}:{placeholder}")
    return DatasetSpec(source=source, argument=argument or None, split=_split(split), start=start, stop=stop)


def selection_hint(path: str) -> str:
    """What to add to "no such file" when the path may have been meant to end in a selection."""
    return f" (if its end was meant as a selection: {SELECTION_HELP})" if path.endswith("]") else ""


def _split(name: str | None) -> Split | None:
    return next((split for split in get_args(Split) if split == name), None)


def _digits(number: int | None) -> str:
    return "" if number is None else str(number)


def _unknown(source: str) -> str:
    name, bracket, selection = source.partition("[")
    if name in _ARGUMENTS and bracket:
        return f"data set {source!r}: '[{selection}' is not a selection; allowed are {SELECTION_HELP}"
    near = difflib.get_close_matches(name.lower().replace("_", "-"), _ARGUMENTS, n=1)
    suggestion = f" (did you mean {near[0]!r}?)" if near else ""
    allowed = ", ".join(name if argument is None else f"{name}:{argument}" for name, argument in _ARGUMENTS.items())
    return f"unknown data set {source!r}{suggestion}: allowed are {allowed}"
