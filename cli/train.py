"""``mithridate train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from cli import options as shared
from cli.output import Report, note, percent, print_json, print_table, progress

if TYPE_CHECKING:
    from mithridate.datasets import LabelledImages


def train(
    dataset: shared.DatasetOption,
    out: Annotated[Path, typer.Option(help="Where to write the weights (.safetensors)")],
    arch: Annotated[str | None, typer.Option(help="What to train (default: small-cnn); see --arch of build")] = None,
    adversarial: Annotated[str | None, typer.Option(help="n-fgsm or pgd: train on adversarial examples")] = None,
    prm: Annotated[
        str | None, typer.Option(help="v0 to v5: train a pixel robustness manipulator instead, for build --prm")
    ] = None,
    prm_size: Annotated[str | None, typer.Option(help="small or unet (default: small up to 64 pixels a side)")] = None,
    epsilon: shared.EpsilonOption = None,
    epochs: Annotated[
        int | None, typer.Option(help="Default: 4 to 40 (a PRM: to 100), by the size of the data")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of the one learning-rate cycle (default: 0.1; a PRM: 0.002)")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images in one step")] = 128,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the images left-right (not for digits)")] = False,
    evaluate_on: Annotated[
        str | None, typer.Option("--eval", help="Data set to measure on (default: the test split of named data sets)")
    ] = None,
    image_size: shared.ImageSizeOption = None,
    data_root: shared.DataRootOption = None,
    download: shared.DownloadOption = False,
    device: shared.DeviceOption = "cpu",
    threads: shared.ThreadsOption = None,
    seed: shared.SeedOption = 0,
    as_json: shared.JsonOption = False,
) -> None:
    """Train a classifier from scratch, plainly or on adversarial examples; or a PRM for one."""
    from mithridate.datasets import parse_spec
    from mithridate.errors import OptionError

    if out.exists():
        raise OptionError(f"{out} exists already; choose another name or remove it first")
    if not out.parent.is_dir():
        raise OptionError(f"there is no directory {out.parent} to write {out.name} in")
    shared.use_threads(threads)
    device = shared.check_device(device)
    common: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "flip": flip, "seed": seed}
    if learning_rate is not None:
        common["learning_rate"] = learning_rate
    if prm is not None:
        seen = {"--arch": arch, "--adversarial": adversarial, "--epsilon": epsilon}
        for option, value in seen.items():
            if value is not None:
                raise OptionError(f"{option} belongs to a classifier; leave it out beside --prm")
        job: _Job = _PRMJob({**common, "variant": prm, "size": prm_size}, device)
    else:
        if prm_size is not None:
            raise OptionError("--prm-size belongs to a PRM; name its variant too, as in --prm v0")
        radius = shared.customary_epsilon(dataset, epsilon)
        options = {**common, "arch": arch or "small-cnn", "adversarial": adversarial, "epsilon": radius}
        job = _ClassifierJob(options, device)
    data = shared.load_data(dataset, data_root=data_root, download=download, image_size=image_size)
    if evaluate_on is None and not parse_spec(dataset).argument:
        evaluate_on = f"{parse_spec(dataset).source}[test]"
    held_out = (
        shared.load_data(evaluate_on, data_root=data_root, download=download, image_size=image_size, split="test")
        if evaluate_on
        else None
    )
    if held_out is not None and (held_out.image_shape, held_out.classes) != (data.image_shape, data.classes):
        raise OptionError(f"{evaluate_on} has other image shapes or classes than {dataset}")
    with progress() as report:
        job.train(data, report)
    temporary = out.with_name(out.name + ".partial")
    try:
        job.save(temporary)
        temporary.replace(out)
    except Exception as error:  # safetensors has an exception type of its own for a full disk
        temporary.unlink(missing_ok=True)
        raise OptionError(f"cannot write {out}: {error}") from error
    measured = {"training": job.measure(data)}
    if held_out is not None:
        measured["held out"] = job.measure(held_out)
    else:
        note("no data to measure on but the training data; give --eval")
    if as_json:
        print_json({"out": str(out), **job.named, "images": len(data), job.measure_key: measured})
    else:
        rows = [[name, job.write(value)] for name, value in measured.items()]
        print_table(f"{job.title} trained on {dataset}, written to {out}", ["data", job.measure_name], rows)


class _Job(Protocol):
    """What is trained: how, and how good it has become."""

    title: str
    named: dict[str, str]
    measure_key: str
    measure_name: str

    def train(self, data: LabelledImages, report: Report) -> None: ...
    def save(self, path: Path) -> None: ...
    def measure(self, data: LabelledImages) -> float: ...
    def write(self, value: float) -> str: ...


class _ClassifierJob:
    measure_key = measure_name = "accuracy"

    def __init__(self, options: dict[str, Any], device: str) -> None:
        from index_builder.training import TrainingPlan

        shared.allow_local_code(options["arch"])
        self._plan, self._device = TrainingPlan(**options), device
        self.title = self._plan.arch
        self.named = {"arch": self._plan.arch}

    def train(self, data: LabelledImages, report: Report) -> None:
        from index_builder.training import train_classifier

        self._classifier = train_classifier(data, self._plan, device=self._device, progress=report)

    def save(self, path: Path) -> None:
        from mithridate.models import save_weights

        save_weights(self._classifier, path)

    def measure(self, data: LabelledImages) -> float:
        from index_builder.training import accuracy

        return accuracy(self._classifier, data)

    def write(self, value: float) -> str:
        return percent(value)


class _PRMJob:
    measure_key, measure_name = "reconstruction_error", "error of a pixel, rms"

    def __init__(self, options: dict[str, Any], device: str) -> None:
        from index_builder.prm_training import PRMPlan

        self._plan, self._device = PRMPlan(**options), device
        self.title = f"PRM {self._plan.variant}"
        self.named = {"prm": self._plan.variant}

    def train(self, data: LabelledImages, report: Report) -> None:
        from index_builder.prm_training import train_prm

        self._prm = train_prm(data, self._plan, device=self._device, progress=report)

    def save(self, path: Path) -> None:
        from mithridate.models import save_prm

        save_prm(self._prm, path)

    def measure(self, data: LabelledImages) -> float:
        from index_builder.prm_training import reconstruction_error

        return reconstruction_error(self._prm, data)

    def write(self, value: float) -> str:
        return f"{255 * value:.1f}/255"
