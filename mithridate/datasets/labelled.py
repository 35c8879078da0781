"""The noun of this package: images with labels and class names, checked once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from mithridate.errors import DatasetError
from mithridate.images import UInt8Image

Labels: TypeAlias = npt.NDArray[np.int64]

MAX_UNNAMED_CLASSES: Final = 65_536


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImages:
    """Images uint8 ``[N, C, H, W]``, N at least 1, with labels int64 ``[N]`` in 0 .. len(classes) - 1.

    ``classes`` are the names by label, ``spec`` is where they come from. Raises ``DatasetError`` where an
    array is not as said.
    """

    images: UInt8Image
    labels: Labels
    classes: tuple[str, ...]
    spec: str

    def __post_init__(self) -> None:
        shape = list(self.images.shape)
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape[2:]:
            raise DatasetError(
                f"{self.spec}: images are {self.images.dtype} {shape}, allowed are uint8 [N, 1 | 3, H, W]"
            )
        if not shape[0]:
            raise DatasetError(f"{self.spec}: the selection is empty: no image of the data set lies in it")
        repeated = next((name for name in self.classes if self.classes.count(name) > 1), None)
        if repeated is not None:
            raise DatasetError(f"{self.spec}: two classes are called {repeated!r}; give each a name of its own")
        for name in self.classes:
            if not _is_text(name):
                raise DatasetError(f"{self.spec}: the class name {name!r} is not text in UTF-8; rename it")
        check_labels(self.labels, classes=self.classes, images=shape[0], where=self.spec)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def fingerprint(self) -> str:
        """``"sha256:..."`` of shape, class names, labels and pixels: equal if and only if those are."""
        header = json.dumps([self.images.shape, self.classes]).encode()
        digest = hashlib.sha256(len(header).to_bytes(8, "little") + header)
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        digest.update(np.ascontiguousarray(self.images).data)
        return f"sha256:{digest.hexdigest()}"


def check_labels(labels: Labels, *, classes: tuple[str, ...], images: int, where: str) -> None:
    """Raises ``DatasetError`` unless ``labels`` are int64 ``[images]`` in 0 .. len(classes) - 1."""
    if labels.dtype != np.int64 or labels.shape != (images,):
        seen = f"{labels.dtype} {list(labels.shape)}"
        raise DatasetError(f"{where}: labels are {seen}, allowed are int64 [{images}], one an image")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        first = int(wrong[0])
        message = f"image {first} has label {labels[first]}, allowed are 0 to {len(classes) - 1}"
        raise DatasetError(f"{where}: {message} ({len(wrong)} of {images} labels are out of range)")


def numbered_classes(highest: int, *, where: str) -> tuple[str, ...]:
    """``("0", "1", ... str(highest))`` for data without names; ``DatasetError`` where that is absurd."""
    if not 0 <= highest < MAX_UNNAMED_CLASSES:
        allowed = f"0 to {MAX_UNNAMED_CLASSES - 1} where the data names no classes"
        raise DatasetError(f"{where}: the highest label is {highest}, allowed are {allowed}")
    return tuple(str(label) for label in range(highest + 1))


def _is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8: a folder's may hold any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
