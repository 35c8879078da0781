"""``mithridate bench``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli import options as shared
from cli.output import note, percent, print_json, print_table, progress

if TYPE_CHECKING:
    from mithridate.bundle import Bundle
    from mithridate.defenses import Resources
    from mithridate.tuning import Trial

_REPEATS = 5


def bench(
    bundle: Annotated[Path, typer.Argument(help="The bundle")],
    defense: Annotated[
        list[str] | None, typer.Option(help="What to time or where to start tuning; repeat to time several")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Find the settings of rmc and write them into the bundle")
    ] = False,
    images: Annotated[int, typer.Option(min=10, help="Training images to tune on, kept out of the neighbours")] = 200,
    against: Annotated[
        Literal["static", "adaptive"], typer.Option(help="Tune against stored attacks, or also attack each candidate")
    ] = "static",
    abstain: Annotated[
        float, typer.Option(min=0, max=0.99, help="Let the tuned defence turn away this share of clean images")
    ] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tune, but write nothing")] = False,
    arch: shared.ArchOption = None,
    device: shared.DeviceOption = "cpu",
    threads: shared.ThreadsOption = None,
    seed: shared.SeedOption = 0,
    as_json: shared.JsonOption = False,
) -> None:
    """Time a bundle's defences against its plain forward pass; with --tune, find the best settings of rmc."""
    from mithridate.bundle import Bundle
    from mithridate.defenses import Resources, parse_defence
    from mithridate.errors import OptionError

    shared.use_threads(threads)
    shared.allow_local_code(arch)
    for text in defense or []:
        parse_defence(text)
    if tune and len(defense or []) > 1:
        raise OptionError("--tune starts from one --defense; seen: " + ", ".join(defense or []))
    opened = Bundle.open(bundle)
    resources = Resources.load(opened, device=shared.check_device(device), allow_factory=arch)
    if tune:
        _tune(opened, resources, (defense or ["rmc"])[0], images, against, abstain, dry_run, seed, as_json)
    else:
        _time(opened, resources, defense, as_json)


def _tune(
    opened: Bundle,
    resources: Resources,
    start: str,
    images: int,
    against: Literal["static", "adaptive"],
    abstain: float,
    dry_run: bool,
    seed: int,
    as_json: bool,
) -> None:
    from mithridate.evaluation.tuner import TuningPlan, tune
    from mithridate.tuning import write_tuning
    from mithridate.types import Epsilon

    radius = next((copy.epsilon for copy in opened.manifest.copies if copy.epsilon), None)
    plan = TuningPlan(
        start=start,
        images=images,
        against=against,
        epsilon=Epsilon.parse(radius) if radius else Epsilon(8),
        abstain=abstain,
        seed=seed,
    )
    with progress() as report:
        tuning = tune(resources, plan, bundle=opened.digest, progress=report)
    if not dry_run:
        write_tuning(opened.path, tuning)
    if as_json:
        print_json(tuning.model_dump(mode="json"))
        return
    ranked = sorted(tuning.trials, key=lambda trial: (-trial.score, trial.milliseconds))[:8]
    print_table(
        f"{len(tuning.trials)} settings on {images} training images kept out of the neighbours, {against} attack",
        ["defence", "clean", "attacked", "ms an image"],
        [_trial_row(trial) for trial in [tuning.base, *ranked]],
    )
    if tuning.chosen.attacked <= tuning.base.attacked:
        note(f"no setting holds out longer than the base model against this attack ({against})")
    note(f"{'would mean' if dry_run else 'now means'} from now on: rmc = {tuning.defense}")


def _trial_row(trial: Trial) -> list[str]:
    from mithridate.evaluation import wilson_interval

    cells = [trial.defense]
    for right, of in ((trial.clean, trial.images), (trial.attacked, trial.attacked_images)):
        low, high = wilson_interval(right, of)
        cells.append(f"{percent(right / of)} [{100 * low:.0f}, {100 * high:.0f}]")
    return [*cells, f"{trial.milliseconds:.2f}"]


def _time(opened: Bundle, resources: Resources, defense: list[str] | None, as_json: bool) -> None:
    """On the bundle's own exemplars; the base model is measured beside each, since machines are shared and noisy."""
    import torch

    from mithridate.defenses import DEFAULT_DEFENCES, Budget, Defence, build_defence
    from mithridate.types import to_images

    exemplars = resources.exemplars
    ids = torch.arange(0, len(exemplars), max(1, len(exemplars) // 64))[:64]
    everything = to_images(exemplars.pixels(ids))
    base = build_defence("none", resources)
    texts = defense or [text for text in DEFAULT_DEFENCES if text != "rmc" or resources.classifier.has_head]

    def once(defence: Defence, count: int) -> float:
        started = time.perf_counter()
        defence.predict(everything[:count], generator=torch.Generator().manual_seed(0), budget=Budget())
        return 1000 * (time.perf_counter() - started) / count

    rows, report = [], []
    for text in texts:
        defence = build_defence(text, resources)
        entry: dict[str, object] = {"defense": defence.name}
        for count in sorted({1, len(everything)}):
            once(defence, count)
            pairs = sorted((once(defence, count), once(base, count)) for _ in range(_REPEATS))
            milliseconds = pairs[_REPEATS // 2][0]
            ratio = sorted(mine / plain for mine, plain in pairs)[_REPEATS // 2]
            entry[f"batch_{count}"] = {"ms_per_image": milliseconds, "ratio_to_forward": ratio}
            rows.append([defence.name, str(count), f"{milliseconds:.2f}", f"{ratio:.2f}"])
        report.append(entry)
    if as_json:
        print_json({"bundle": opened.digest, "defenses": report})
        return
    print_table(f"{opened.manifest.name}", ["defence", "batch", "ms an image", "times the forward pass"], rows)
