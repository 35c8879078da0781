"""Sources with a name: scikit-learn's digits, the two MNISTs and the two CIFARs in torchvision's layout."""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mithridate.datasets.sources import Arrays, Request, shuffle_key
from mithridate.errors import DatasetError
from mithridate.images import UInt8Image

DIGIT_NAMES: Final = tuple("0123456789")
FASHION_NAMES: Final = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def open_digits(request: Request) -> Arrays:
    """``digits``: 1,797 grey images of 8x8, scikit-learn's copy of the UCI test set; always there.

    Levels 0..16 become round(v * 255 / 16). A fifth of each class is the test split. Split and order come
    from a hash of the image's number, so they are the same everywhere and any prefix mixes the classes.
    """
    table = _read_digits()  # a row an image: 64 levels, then the class
    labels = table[:, -1].astype(np.int64)
    images = np.rint(table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    order = np.array(sorted(range(len(labels)), key=lambda number: shuffle_key(f"digits/{number}")))
    in_test = np.zeros(len(labels), dtype=bool)
    for label in range(len(DIGIT_NAMES)):
        members = order[labels[order] == label]
        in_test[members[: round(len(members) / 5)]] = True
    kept = order[in_test[order] == (request.split == "test")]
    return Arrays(images=images[kept], labels=labels[kept], classes=DIGIT_NAMES)


def _read_digits() -> npt.NDArray[np.float64]:
    """The file behind ``sklearn.datasets.load_digits``, without importing scikit-learn, which takes seconds."""
    found = find_spec("sklearn")
    if found is not None and found.origin is not None:
        file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            with gzip.open(file, "rt", encoding="ascii") as rows:
                return np.loadtxt(rows, delimiter=",")
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return np.column_stack([data.data, data.target])


def open_mnist(request: Request) -> Arrays:
    """``mnist``: 60,000 and 10,000 grey images of 28x28, from ``MNIST/raw`` under the data root."""
    return _open_idx(request, "MNIST", DIGIT_NAMES)


def open_fashion_mnist(request: Request) -> Arrays:
    """``fashion-mnist``: as ``mnist``, from ``FashionMNIST/raw``."""
    return _open_idx(request, "FashionMNIST", FASHION_NAMES)


def open_cifar10(request: Request) -> Arrays:
    """``cifar10``: 50,000 and 10,000 colour images of 32x32, from ``cifar-10-batches-py``."""
    return _open_cifar(request, "CIFAR10", "cifar-10-batches-py")


def open_cifar100(request: Request) -> Arrays:
    """``cifar100``: as ``cifar10``, from ``cifar-100-python``, with the 100 fine labels."""
    return _open_cifar(request, "CIFAR100", "cifar-100-python")


def _open_idx(request: Request, name: str, classes: tuple[str, ...]) -> Arrays:
    """Reads the original files, gzipped or not; torchvision, which wants unpacked ones, only downloads."""
    stem = "train" if request.split == "train" else "t10k"
    folder = request.data_root / name / "raw"
    names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
    if request.download and not all(_find(folder, file) for file in names):
        _call_torchvision(request, name, folder)
    images, labels = (_read_idx(request, folder, file) for file in names)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        seen = f"images {list(images.shape)} and labels {list(labels.shape)}"
        raise DatasetError(f"{request.spec}: {folder} holds {seen}, allowed are [N, H, W] and [N]")
    return Arrays(images=images[:, np.newaxis], labels=labels.astype(np.int64), classes=classes)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(request: Request, folder: Path, name: str) -> UInt8Image:
    """An IDX file of bytes, as the MNIST page says: 0, 0, 8, number of dimensions; big-endian sizes; data."""
    path = _find(folder, name)
    if path is None:
        raise _missing(request, folder, f"no {name} or {name}.gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise DatasetError(f"{request.spec}: {path} cannot be read: {error}") from error
    dimensions = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(data[at : at + 4]) for at in range(4, start, 4))
    if not dimensions or len(data) - start != np.prod(shape, dtype=np.int64):
        raise DatasetError(f"{request.spec}: {path} is not an IDX file of bytes, or truncated ({len(data):,} bytes)")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _open_cifar(request: Request, name: str, folder_name: str) -> Arrays:
    """torchvision compares the MD5 of every file with its own list before it unpickles one."""
    folder = request.data_root / folder_name
    if not request.download and not folder.is_dir():
        raise _missing(request, folder, "no such directory")
    dataset = _call_torchvision(request, name, folder)
    images: npt.NDArray[np.uint8] = dataset.data  # [N, H, W, C]
    labels = np.asarray(dataset.targets, dtype=np.int64)
    return Arrays(images=images.transpose(0, 3, 1, 2), labels=labels, classes=tuple(dataset.classes))


def _call_torchvision(request: Request, name: str, folder: Path) -> Any:
    try:
        import torchvision

        opener: Callable[..., Any] = getattr(torchvision.datasets, name)
        with warnings.catch_warnings():  # NumPy 2.4.0 to 2.4.4 warn of the dtypes that CIFAR was pickled with
            warnings.simplefilter("ignore")
            return opener(request.data_root, train=request.split == "train", download=request.download)
    except Exception as error:  # its own types, urllib's, and whatever else a download brings
        raise _missing(request, folder, f"torchvision says: {error}") from error


def _missing(request: Request, folder: Path, why: str) -> DatasetError:
    holder = folder.relative_to(request.data_root).parts[0]
    remedy = f"give --data-root a directory that holds {holder}" + ("" if request.download else ", or --download")
    return DatasetError(f"{request.spec}: looked in {folder.absolute()}: {why}; {remedy}")
