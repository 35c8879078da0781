"""From a specification to arrays: the one entry point, and what all sources share (decode, resize, grey)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Final, get_args

import numpy as np

from mithridate.datasets.builtin import (
    open_cifar10,
    open_cifar100,
    open_digits,
    open_fashion_mnist,
    open_mnist,
)
from mithridate.datasets.folder import open_folder
from mithridate.datasets.labelled import LabelledImages
from mithridate.datasets.npz import open_npz
from mithridate.datasets.parquet import open_parquet
from mithridate.datasets.sources import Arrays, Encoded, Item, Request
from mithridate.datasets.spec import Split, parse_spec
from mithridate.errors import DatasetError, ImageError
from mithridate.images import ImageLimits, UInt8Image, decode_image, fit_image, read_header, to_channels

FILE_LIMITS: Final = ImageLimits(max_bytes=256 * 1024 * 1024, max_pixels=178_956_970, max_side=65_535)
"""Wider than a service's: the files are the user's own. More pixels than this Pillow refuses by itself."""

_OPENERS: Final[dict[str, Callable[[Request], Arrays | Encoded]]] = {
    "digits": open_digits,
    "mnist": open_mnist,
    "fashion-mnist": open_fashion_mnist,
    "cifar10": open_cifar10,
    "cifar100": open_cifar100,
    "folder": open_folder,
    "parquet": open_parquet,
    "npz": open_npz,
}


def load_dataset(
    spec: str,
    *,
    data_root: Path | None = None,
    download: bool = False,
    default_split: Split = "train",
    image_size: int | None = None,
    channels: int | None = None,
) -> LabelledImages:
    """The images that ``spec`` selects, always in the same order; see ``parse_spec`` for how it is written.

    ``data_root`` holds the files of ``mnist`` ... ``cifar100`` in torchvision's layout (default: ``data`` in
    the current directory); ``download`` fetches what is missing there. ``default_split`` counts where the
    source has splits and ``spec`` names none. ``image_size`` makes all images square, as ``fit_image`` with
    ``"center-crop"`` does; without it they must have one size. ``channels`` is 1 or 3; default: 1 if every
    image is stored as grey.

    Takes about twice the memory of the result. Raises ``DatasetError``, whatever is wrong.
    """
    if image_size is not None and image_size < 1:
        raise DatasetError(f"{spec}: image size is {image_size}, allowed are 1 and more")
    if channels not in (None, 1, 3):
        raise DatasetError(f"{spec}: channels is {channels}, allowed are 1 and 3")
    if default_split not in get_args(Split):
        raise DatasetError(f"{spec}: default split is {default_split!r}, allowed are 'train' and 'test'")
    parsed = parse_spec(spec)
    root = Path("data") if data_root is None else Path(data_root).expanduser()
    request = Request(spec=parsed, default_split=default_split, data_root=root, download=download)
    try:
        source = _OPENERS[parsed.source](request)
        if isinstance(source, Arrays):
            return _from_arrays(source, request, image_size, channels)
        return _from_files(source, request, image_size, channels)
    except DatasetError:
        raise
    except Exception as error:  # a reader's own type: pyarrow, zlib, the file system, out of memory ...
        raise DatasetError(f"{spec}: cannot be read: {type(error).__name__}: {error}") from error


def _from_arrays(source: Arrays, request: Request, image_size: int | None, channels: int | None) -> LabelledImages:
    where = str(request.spec)
    images = source.images[request.spec.window]
    channels = channels or images.shape[1]
    size = (image_size, image_size) if image_size else images.shape[2:]
    shape = (channels, *size)
    if shape == images.shape[1:]:
        result = np.array(images, order="C")
    else:
        result = np.empty((len(images), *shape), np.uint8)
        first = request.spec.start or 0
        for number, image in enumerate(images):
            grey_or_color = to_channels(image, channels)
            result[number] = _fit(grey_or_color, image_size, f"{where}: image {first + number}")
    labels = np.array(source.labels[request.spec.window])
    return LabelledImages(images=result, labels=labels, classes=source.classes, spec=where)


def _from_files(source: Encoded, request: Request, image_size: int | None, channels: int | None) -> LabelledImages:
    where = str(request.spec)
    if not len(source):
        raise DatasetError(f"{where}: the selection is empty: no image of the data set lies in it")
    channels = channels or (1 if all(_is_grey(item, where) for item in source) else 3)
    decoded = ((item, _decode(item, channels, image_size, where)) for item in source)
    first_item, first = next(decoded)
    images = np.empty((len(source), *first.shape), np.uint8)
    labels = np.full(len(source), -1, np.int64)  # refused at the end where a source held fewer than it said
    for number, (item, image) in enumerate(itertools.chain([(first_item, first)], decoded)):
        if image.shape != first.shape:
            seen = f"{first_item.name} is {_size(first)}, {item.name} is {_size(image)}"
            raise DatasetError(f"{where}: images differ in size: {seen}; bring them to one with --image-size")
        if not 0 <= item.label < len(source.classes):
            allowed = f"0 to {len(source.classes) - 1}"
            raise DatasetError(f"{where}: {item.name} has label {item.label}, allowed are {allowed}")
        images[number], labels[number] = image, item.label
    return LabelledImages(images=images, labels=labels, classes=source.classes, spec=where)


def _is_grey(item: Item, where: str) -> bool:
    try:
        return read_header(item.data, limits=FILE_LIMITS).grey
    except ImageError as error:
        raise DatasetError(f"{where}: {item.name}: {error}") from error


def _decode(item: Item, channels: int, image_size: int | None, where: str) -> UInt8Image:
    try:
        image = decode_image(item.data, channels=channels, limits=FILE_LIMITS)
    except ImageError as error:
        raise DatasetError(f"{where}: {item.name}: {error}") from error
    return _fit(image, image_size, f"{where}: {item.name}")


def _fit(image: UInt8Image, image_size: int | None, where: str) -> UInt8Image:
    if image_size is None:
        return image
    try:
        return fit_image(image, shape=(len(image), image_size, image_size), resize="center-crop")
    except ImageError as error:
        raise DatasetError(f"{where}: {error} (--image-size {image_size})") from error


def _size(image: UInt8Image) -> str:
    return f"{image.shape[2]}x{image.shape[1]} px"
