"""``mithridate train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from cli import options as shared
from cli.output import note, percent, print_json, print_table, progress


def train(
    dataset: shared.DatasetOption,
    out: Annotated[Path, typer.Option(help="Where to write the weights (.safetensors)")],
    arch: Annotated[str, typer.Option(help="What to train; see --arch of build")] = "small-cnn",
    adversarial: Annotated[str | None, typer.Option(help="n-fgsm or pgd: train on adversarial examples")] = None,
    epsilon: shared.EpsilonOption = None,
    epochs: Annotated[int | None, typer.Option(help="Default: 4 to 40, by the size of the data")] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak of the one learning-rate cycle")] = 0.1,
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
    """Train a classifier from scratch, plainly or on adversarial examples."""
    from index_builder.training import TrainingPlan, accuracy, train_classifier
    from mithridate.datasets import parse_spec
    from mithridate.errors import OptionError
    from mithridate.models import save_weights

    if out.exists():
        raise OptionError(f"{out} exists already; choose another name or remove it first")
    if not out.parent.is_dir():
        raise OptionError(f"there is no directory {out.parent} to write {out.name} in")
    shared.use_threads(threads)
    shared.allow_local_code(arch)
    device = shared.check_device(device)
    plan = TrainingPlan(
        arch=arch,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        flip=flip,
        adversarial=cast(Any, adversarial),
        epsilon=shared.customary_epsilon(dataset, epsilon),
        seed=seed,
    )
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
        classifier = train_classifier(data, plan, device=device, progress=report)
    temporary = out.with_name(out.name + ".partial")
    try:
        save_weights(classifier, temporary)
        temporary.replace(out)
    except Exception as error:  # safetensors has an exception type of its own for a full disk
        temporary.unlink(missing_ok=True)
        raise OptionError(f"cannot write {out}: {error}") from error
    shares = {"training": accuracy(classifier, data)}
    if held_out is not None:
        shares["held out"] = accuracy(classifier, held_out)
    else:
        note("no data to measure on but the training data; give --eval")
    result = {"out": str(out), "arch": arch, "images": len(data), "accuracy": shares}
    if as_json:
        print_json(result)
    else:
        rows = [[name, percent(share)] for name, share in shares.items()]
        print_table(f"{arch} trained on {dataset}, written to {out}", ["data", "accuracy"], rows)
