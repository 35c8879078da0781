"""What a source is asked, and the two kinds of answer: pixels in one array, or files yet to be decoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mithridate.datasets.labelled import Labels
from mithridate.datasets.spec import DatasetSpec, Split
from mithridate.images import UInt8Image


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to read; ``default_split`` counts where the source has splits and the specification names none."""

    spec: DatasetSpec
    default_split: Split
    data_root: Path
    download: bool

    @property
    def split(self) -> Split:
        return self.spec.split or self.default_split

    @property
    def path(self) -> str:
        """The argument of the specification, ``~`` expanded."""
        return os.path.expanduser(self.spec.argument or "")  # noqa: PTH111 - a glob is not a path


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """A whole split, of one size: uint8 ``[N, C, H, W]`` (any strides) and int64 ``[N]``."""

    images: UInt8Image
    labels: Labels
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image file, not decoded; ``name`` says where it is, for messages."""

    name: str
    data: bytes
    label: int


class Encoded(Protocol):
    """Image files of a selection; every iteration reads them anew, in the same order."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


def shuffle_key(name: str) -> bytes:
    """Sorting by this is a fixed shuffle: the same everywhere, and stable when other names come or go."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
