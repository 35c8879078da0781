"""``mithridate predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options as shared
from cli.output import percent, print_json, print_table

if TYPE_CHECKING:
    from service.schemas import ImagePrediction


def predict(
    bundle: Annotated[Path, typer.Argument(help="The bundle")],
    images: Annotated[list[Path], typer.Argument(help="PNG, JPEG or WebP files")],
    defense: Annotated[
        str, typer.Option(help="none, rmc, rmc:scope=all, webnn, deepnn; options after a colon")
    ] = "rmc",
    top_k: Annotated[int, typer.Option(min=1, help="Classes to list for each image")] = 1,
    explain: Annotated[bool, typer.Option("--explain", help="List the neighbours (with --json)")] = False,
    arch: shared.ArchOption = None,
    device: shared.DeviceOption = "cpu",
    threads: shared.ThreadsOption = None,
    seed: shared.SeedOption = 0,
    as_json: shared.JsonOption = False,
) -> None:
    """Classify images as the service would, without a service."""
    import numpy as np
    import torch

    from mithridate.bundle import Bundle
    from mithridate.defenses import Budget, Resources, build_defence, parse_defence
    from mithridate.errors import ImageError, ImageUnusableError
    from mithridate.images import decode_image, fit_image
    from mithridate.types import to_images
    from service.reports import report_images
    from service.schemas import PredictOptions

    shared.use_threads(threads)
    shared.allow_local_code(arch)
    parse_defence(defense)  # before the work of opening anything
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    pixels = []
    for path in images:
        try:
            image = decode_image(path.read_bytes(), channels=manifest.image_shape[0])
            pixels.append(fit_image(image, shape=manifest.image_shape, resize=manifest.resize))
        except ImageError as error:
            raise type(error)(f"{path}: {error}") from error
        except OSError as error:
            raise ImageUnusableError(f"{path} cannot be read: {error.strerror or error}") from error
    resources = Resources.load(opened, device=shared.check_device(device), allow_factory=arch)
    chosen = build_defence(defense, resources)
    generator = torch.Generator().manual_seed(seed)
    prediction = chosen.predict(to_images(torch.from_numpy(np.stack(pixels))), generator=generator, budget=Budget())
    reports = report_images(manifest, resources.exemplars, prediction, PredictOptions(top_k=top_k, explain=explain))
    if as_json:
        print_json(
            {
                "bundle": {"name": manifest.name, "digest": opened.digest},
                "defense": chosen.name,
                "predictions": [
                    {"image": str(path), **report.model_dump(mode="json", by_alias=True)}
                    for path, report in zip(images, reports, strict=True)
                ],
            }
        )
        return
    rows = [[path.name, *_describe(report)] for path, report in zip(images, reports, strict=True)]
    print_table(
        f"{chosen.name} on {manifest.name}", ["image", "answer", "undefended", "suspicious", "adaptation steps"], rows
    )


def _describe(report: ImagePrediction) -> list[str]:
    """The cells of one image: answer, what the base model says, whether they differ, what adaptation did."""
    answer = ", ".join(f"{scored.label} ({percent(scored.confidence)})" for scored in report.top)
    steps = "-"
    if report.adaptation:
        steps = f"{report.adaptation.steps} ({report.adaptation.stop_reason})"
        if report.adaptation.answered_from == "base":
            steps += ", base weights"
    base = report.undefended
    return [
        f"abstained: {answer}" if report.abstained else answer,
        f"{base.label} ({percent(base.confidence)})" if base else "-",
        "yes" if report.suspicious else "no",
        steps,
    ]
