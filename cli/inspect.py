"""``mithridate inspect``: what a bundle's model listens to."""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options as shared
from cli.output import note, percent, print_json, print_table, progress

if TYPE_CHECKING:
    from mithridate.bundle import Bundle
    from mithridate.evaluation.pixel_report import PixelReport

inspect = typer.Typer(rich_markup_mode=None)


@inspect.callback()
def main() -> None:
    """Look into a bundle's model."""


@inspect.command()
def pixels(
    bundle: Annotated[Path, typer.Argument(help="The bundle")],
    dataset: shared.DatasetOption,
    out: Annotated[Path, typer.Option(help="Where to write: a directory that does not exist yet, or is empty")],
    module: Annotated[int, typer.Option(min=0, help="Which PRM of the bundle")] = 0,
    lambdas: Annotated[
        str | None, typer.Option(help="As 0,0.5,1 (default: 0 to 0.9 in tenths, 0.95, 0.99, 0.999, 1)")
    ] = None,
    shares: Annotated[
        str | None, typer.Option(help="Percent of the pixels that may be changed (default: 0,5,10,25,50,75,100)")
    ] = None,
    attack: Annotated[str, typer.Option(help="pgdN or fgsm")] = "pgd20",
    epsilon: shared.EpsilonOption = None,
    attacked: Annotated[int | None, typer.Option(min=1, help="Attack only so many images (default: all)")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time")] = 64,
    arch: shared.ArchOption = None,
    image_size: shared.ImageSizeOption = None,
    data_root: shared.DataRootOption = None,
    download: shared.DownloadOption = False,
    device: shared.DeviceOption = "cpu",
    threads: shared.ThreadsOption = None,
    seed: shared.SeedOption = 0,
    as_json: shared.JsonOption = False,
) -> None:
    """Measure and draw which pixels the model listens to, what a PRM does to that, and what an attacker gets from them.

    Without a PRM in the bundle: only the first of the three.
    """
    import torch

    from mithridate.attacks import parse_pgd
    from mithridate.bundle import Bundle
    from mithridate.defenses import Resources
    from mithridate.errors import OptionError
    from mithridate.evaluation.pixel_figures import require_matplotlib
    from mithridate.evaluation.pixel_report import LAMBDAS, SHARES, PixelPlan, measure_pixels

    _check_free(out)
    require_matplotlib()
    shared.use_threads(threads)
    shared.allow_local_code(arch)
    plan = PixelPlan(
        attack=parse_pgd(attack, epsilon=shared.customary_epsilon(dataset, epsilon)),
        module=module,
        lambdas=shared.numbers("--lambdas", lambdas) or LAMBDAS,
        shares=_shares(shares) or SHARES,
        attacked=attacked,
        batch_size=batch_size,
        seed=seed,
    )
    opened = Bundle.open(bundle)
    data = shared.load_data(dataset, data_root=data_root, download=download, image_size=image_size, split="test")
    opened.check_fits(data)
    resources = Resources.load(opened, device=shared.check_device(device), allow_factory=arch)
    if not resources.prms and (module or lambdas or shares or attacked):
        raise OptionError(f"{bundle} has no PRM, which --module, --lambdas, --shares and --attacked are about")
    content: dict[str, Any] = {}
    try:
        with _written_at_once(out) as partial:
            with progress() as report:
                found = measure_pixels(
                    resources, torch.from_numpy(data.images), torch.from_numpy(data.labels), plan, progress=report
                )
            content = _content(found, opened, data.spec)
            _write(content, found, partial, opened)
    finally:  # also where it could not be written: what took minutes to measure is said
        if content:
            print_json(content) if as_json else _print(content)
    if not resources.prms:
        note("the bundle has no PRM (build --prm FILE): only the base model's gradient was measured")
    note(f"pictures and pixels.json: {out}")


def _shares(text: str | None) -> tuple[float, ...]:
    from mithridate.errors import OptionError

    percents = shared.numbers("--shares", text) or ()
    for value in percents:
        if not 0 <= value <= 100:
            raise OptionError(f"--shares {value:g} is out of range; allowed: 0 to 100 percent")
    return tuple(value / 100 for value in percents)


def _check_free(out: Path) -> None:
    from mithridate.errors import OptionError

    if out.resolve() == Path.cwd():
        raise OptionError(f"{out} is where you are, and would be replaced; name another directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OptionError(f"{out} exists already and is no empty directory; choose another name or remove it first")


@contextmanager
def _written_at_once(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` that becomes it at the end, and goes if there is no such end."""
    from mithridate.errors import OptionError

    target = out.resolve()
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OptionError(f"cannot write to {out}: {error.strerror}") from error
    try:
        yield partial
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _content(found: PixelReport, opened: Bundle, dataset: str) -> dict[str, Any]:
    """What ``pixels.json`` says."""
    from mithridate.evaluation.environment import environment
    from mithridate.evaluation.pixel_figures import names

    return {
        "command": shlex.join(["mithridate", *sys.argv[1:]]),
        "environment": environment(),
        "bundle": opened.digest,
        "dataset": dataset,
        "attack": found.plan.attack.name,
        "epsilon": str(found.plan.attack.epsilon),
        "pictures": list(names(found)),
        **found.summary(),
    }


def _write(content: dict[str, Any], found: PixelReport, directory: Path, opened: Bundle) -> None:
    from mithridate.evaluation.pixel_figures import draw

    (directory / "pixels.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(found, directory, title=opened.path.resolve().name)


def _print(content: dict[str, Any]) -> None:
    rows = [
        [
            row["defense"],
            _share(row),
            f"{row['mean_gradient']:.2e}",
            *(
                (f"{row[key]:.2e}" if row[key] is not None else "-")
                for key in ("on_lattice", "off_lattice")
                if key in row
            ),
            *([f"{row['iou']:.3f}"] if "iou" in row else []),
        ]
        for row in content["gradients"]
    ]
    header = ["model", "accuracy", "R", "R on the lattice", "R off it", "IoU"]
    print_table(f"{content['dataset']}, n = {content['images']}", header[: len(rows[0])], rows)
    if not content["masked"]:
        return
    cells = {(row["defense"], row["share"], row["pixels"]): row for row in content["masked"]}
    orders = list(dict.fromkeys(row["pixels"] for row in content["masked"]))
    masked = [
        [model, f"{100 * share:g} % ({cells[model, share, orders[0]]['count']})"]
        + [_share(cells[model, share, order]) for order in orders]
        for model, share in dict.fromkeys((model, share) for model, share, _ in cells)
    ]
    title = f"accuracy under {content['attack']} at {content['epsilon']}, n = {content['masked'][0]['images']}"
    print_table(title, ["model", "pixels changed", *(f"{order} of R" for order in orders)], masked)


def _share(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{percent(row['accuracy'])} [{100 * low:.0f}, {100 * high:.0f}]"
