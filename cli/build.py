"""``mithridate build``."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from cli import options as shared
from cli.output import note, percent, print_json, print_table, progress, size


def build(
    dataset: shared.DatasetOption,
    out: Annotated[Path, typer.Option(help="The bundle: a directory that does not exist yet")],
    model: Annotated[Path | None, typer.Option(help="Weights (.safetensors); without, small-cnn is trained")] = None,
    arch: shared.ArchOption = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="Copies to make: pgdN or fgsm, or pgdN@rmc to attack a defence that has the copies before; repeat "
            "(default: pgd10 pgd30 pgd100)"
        ),
    ] = None,
    epsilon: shared.EpsilonOption = None,
    index: Annotated[str, typer.Option(help="auto (exact), or a FAISS factory string")] = "auto",
    metric: Annotated[str, typer.Option(help="What nearest means: l2, cosine or ip (inner product)")] = "l2",
    embedding_layer: Annotated[
        str, typer.Option(help="Layer to search with; auto is what feeds the last linear layer")
    ] = "auto",
    tail_layer: Annotated[
        str | None,
        typer.Option(
            help="Store activations for rmc:scope=tail at this layer; auto is the last that leaves something to train "
            "besides the last linear layer (default: none)"
        ),
    ] = None,
    prm: Annotated[
        list[Path] | None, typer.Option(help="A PRM to store, from mithridate train --prm, for the defence prm; repeat")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="Normalisation, as 0.485,0.456,0.406 (default: as trained)")] = None,
    std: Annotated[str | None, typer.Option(help="Normalisation, as 0.229,0.224,0.225 (default: as trained)")] = None,
    name: Annotated[str | None, typer.Option(help="What answers will call it (default: data set and arch)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted build")] = False,
    image_size: shared.ImageSizeOption = None,
    data_root: shared.DataRootOption = None,
    download: shared.DownloadOption = False,
    shard_size: Annotated[int, typer.Option(min=1, help="Images that are attacked and stored together")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are attacked at a time")] = 64,
    device: shared.DeviceOption = "cpu",
    threads: shared.ThreadsOption = None,
    seed: shared.SeedOption = 0,
    as_json: shared.JsonOption = False,
) -> None:
    """Attack a training set and file all of it, clean and adversarial, in a bundle."""
    from index_builder.build import PUBLISHED_ATTACKS, BuildPlan, build_bundle, finished_bundle

    shared.use_threads(threads)
    shared.allow_local_code(arch)
    radius = shared.customary_epsilon(dataset, epsilon)
    data = shared.load_data(dataset, data_root=data_root, download=download, image_size=image_size)
    plan = BuildPlan(
        data=data,
        out=out,
        model=model,
        arch=arch,
        mean=shared.numbers("--mean", mean),
        std=shared.numbers("--std", std),
        embedding_layer=embedding_layer,
        tail_layer=tail_layer,
        prm=tuple(prm or ()),
        attacks=tuple(attack or PUBLISHED_ATTACKS),
        epsilon=radius,
        index=index,
        metric=cast(Any, metric),
        name=name,
        resize="exact" if image_size is None else "center-crop",
        seed=seed,
        shard_size=shard_size,
        batch_size=min(batch_size, shard_size),
        device=shared.check_device(device),
    )
    if resume and finished_bundle(plan) is not None:
        note(f"{out} is finished already; nothing to resume")
        if as_json:
            print_json({"path": str(out), "finished_before": True})
        return
    training = plan.resolved_training()
    if training is not None:
        note(f"no --model given: training {training.arch} on {dataset} first")
    with progress() as report:
        summary = build_bundle(plan, resume=resume, progress=report)
    if as_json:
        print_json({**asdict(summary), "path": str(summary.path)})
        return
    rows = [[f"base accuracy, {copy}", percent(share)] for copy, share in summary.accuracy.items()]
    print_table(
        f"bundle {summary.path}",
        ["", "value"],
        [
            ["images", str(summary.images)],
            ["exemplars", f"{summary.exemplars} ({1 + len(plan.attacks)} copies, epsilon {radius})"],
            ["embedding", f"{summary.embedding_dim} numbers, {metric}"],
            *_activation(summary.activation, summary.exemplars),
            *rows,
            ["seconds", f"{summary.seconds:.1f}"],
            ["size", size(summary.bytes)],
            ["digest", summary.digest[:23] + "..."],
        ],
    )


def _activation(shape: tuple[int, ...] | None, exemplars: int) -> list[list[str]]:
    if shape is None:
        return []
    return [["activation", f"{'x'.join(map(str, shape))} float16, {size(2 * math.prod(shape) * exemplars)} in all"]]
