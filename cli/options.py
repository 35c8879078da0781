"""Options that several commands share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mithridate.datasets import LabelledImages, Split
    from mithridate.types import Epsilon

DatasetOption = Annotated[
    str,
    typer.Option(
        help="digits, mnist, fashion-mnist, cifar10, cifar100, folder:DIR, parquet:GLOB or npz:FILE; "
        "a split and a count may follow, as in cifar10[test,:1000]"
    ),
]
DataRootOption = Annotated[Path | None, typer.Option(help="Where the files of named data sets are (default: data)")]
DownloadOption = Annotated[bool, typer.Option("--download", help="Fetch a named data set that is not there")]
ImageSizeOption = Annotated[int | None, typer.Option(help="Resize and crop every image to this many pixels square")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads for torch and FAISS (default: all cores)")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
ArchOption = Annotated[
    str | None,
    typer.Option(help="small-cnn, resnet20/32/56, a torchvision classifier, or package.module:factory"),
]
EpsilonOption = Annotated[
    str | None,
    typer.Option(help="L-infinity radius as k/255 (default: 32/255 for digits, 25/255 for MNISTs, else 8/255)"),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**62 - 1, help="Same seed, same machine: same result")]
ApiKeyOption = Annotated[
    str | None, typer.Option(help="The environment variable that holds the service's API key", metavar="NAME")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON")]

_CUSTOMARY_EPSILON = {"digits": "32/255", "mnist": "25/255", "fashion-mnist": "25/255"}


def customary_epsilon(dataset: str, given: str | None) -> Epsilon:
    """What was given, or what is customary for the data: small grey images take more than photographs."""
    from mithridate.datasets import parse_spec
    from mithridate.types import Epsilon

    return Epsilon.parse(given or _CUSTOMARY_EPSILON.get(parse_spec(dataset).source, "8/255"))


def use_threads(count: int | None) -> None:
    """Sets torch and FAISS to ``count`` threads, or as many as this process has cores."""
    from mithridate.devices import use_threads

    use_threads(count)


def check_device(name: str) -> str:
    """``name`` where torch can use it. Raises OptionError."""
    from mithridate.devices import resolve_device

    return str(resolve_device(name))


def api_key(variable: str | None) -> str | None:
    """The key in the environment variable of that name. Never an option's value: others see a command line."""
    if variable is None:
        return None
    from mithridate.errors import OptionError

    key = os.environ.get(variable)
    if not key:
        # Not quoted: whoever gives the key itself here should not find it in a log.
        raise OptionError(
            "--api-key-env names no environment variable that is set; give the variable's name, not the key"
        )
    return key


def allow_local_code(arch: str | None) -> None:
    """A user's factory may lie in the current directory, as with ``python -m``."""
    from mithridate.models import is_factory

    if arch and is_factory(arch):
        sys.path.insert(0, str(Path.cwd()))


def load_data(
    spec: str,
    *,
    data_root: Path | None,
    download: bool,
    image_size: int | None,
    split: Split = "train",
) -> LabelledImages:
    """The data set; ``split`` counts where the specification names none."""
    from mithridate.datasets import load_dataset

    return load_dataset(
        spec,
        data_root=data_root,
        download=download,
        default_split=split,
        image_size=image_size,
    )


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers with commas between them. Raises OptionError."""
    if text is None:
        return None
    from mithridate.errors import OptionError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"{option} {text!r} is not numbers with commas between them, as in 0.5,0.5,0.5") from error
