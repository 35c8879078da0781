"""``npz:FILE``: NumPy archives, as ``numpy.savez`` or Keras write them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from mithridate.datasets.labelled import Labels, check_labels, numbered_classes
from mithridate.datasets.sources import Arrays, Request
from mithridate.datasets.spec import selection_hint
from mithridate.errors import DatasetError
from mithridate.images import UInt8Image

_ALLOWED: Final = "'images' and 'labels', or 'x_train', 'y_train', 'x_test' and 'y_test'"


def open_npz(request: Request) -> Arrays:
    """``images`` and ``labels`` (no splits), or Keras's ``x_train``, ``y_train``, ``x_test``, ``y_test``.

    Images are uint8 ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` with C = 1 or 3; labels integer
    ``[N]`` or ``[N, 1]``; ``classes``, optional, names them by label. Nothing is unpickled. Each array is
    read once, whole.
    """
    path = Path(request.path)
    if not path.is_file():
        raise DatasetError(f"{request.spec}: no file {path.absolute()}{selection_hint(request.path)}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return _read(request, archive)
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        allowed = "an .npz archive of plain arrays; nothing is unpickled"
        raise DatasetError(f"{request.spec}: {path} is damaged or not {allowed}") from error


def _read(request: Request, archive: Any) -> Arrays:
    names = set(archive.files)
    if {"images", "labels"} <= names:
        if request.spec.split is not None:
            seen = "'images' and 'labels' without splits"
            raise DatasetError(f"{request.spec}: the file holds {seen}; leave [{request.spec.split}] out")
        images_name, labels_name = "images", "labels"
    else:
        images_name, labels_name = f"x_{request.split}", f"y_{request.split}"
        if not {images_name, labels_name} <= names:
            raise DatasetError(f"{request.spec}: the file holds {sorted(names)}; needed are {_ALLOWED}")
    labels = _labels(request, archive, labels_name)
    classes = _class_names(request, archive, labels, labels_name)
    images = _channels_first(request, archive[images_name], images_name)
    check_labels(labels, classes=classes, images=len(images), where=f"{request.spec}: {labels_name}")
    return Arrays(images=images, labels=labels, classes=classes)


def _class_names(request: Request, archive: Any, labels: Labels, labels_name: str) -> tuple[str, ...]:
    """``classes``, or the numbers up to the highest label of both splits, so that the splits agree."""
    if "classes" in archive.files:
        names = archive["classes"].ravel()
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    other = {"y_train": "y_test", "y_test": "y_train"}.get(labels_name, "")
    known = [labels, _labels(request, archive, other)] if other in archive.files else [labels]
    return numbered_classes(max((int(part.max()) for part in known if part.size), default=0), where=str(request.spec))


def _labels(request: Request, archive: Any, name: str) -> Labels:
    labels = archive[name]
    if labels.ndim == 2 and labels.shape[1] == 1:  # Keras's CIFAR
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        seen = f"{labels.dtype} {list(labels.shape)}"
        raise DatasetError(f"{request.spec}: {name} is {seen}, allowed are integers [N] or [N, 1]")
    converted: Labels = labels.astype(np.int64)
    return converted


def _channels_first(request: Request, images: Any, name: str) -> UInt8Image:
    """A ``[N, C, H, W]`` view of any of the allowed layouts."""
    shape = list(images.shape)
    last, first = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (3, 1))
    view: UInt8Image
    if images.dtype == np.uint8 and len(shape) == 3:
        view = images[:, np.newaxis]
    elif images.dtype == np.uint8 and last and not first:
        view = images.transpose(0, 3, 1, 2)
    elif images.dtype == np.uint8 and first and not last:
        view = images
    else:
        why = " (channels could be the second or the last axis)" if first and last else ""
        allowed = "uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3"
        raise DatasetError(f"{request.spec}: {name} is {images.dtype} {shape}{why}, allowed are {allowed}")
    return view
