"""What RMC costs and what it repairs, for every scope and preset, beside the literal reference.

    python -m benchmarks.rmc BUNDLE DATASET --epsilon 8/255 [--images 500] [--slow-images 20] [--only head/fast ...]

Each row is measured in a process of its own (peak memory), one after the other: milliseconds an image at batch 1 and
64, the ratio to the plain forward pass (measured in between, in the same process) and to the literal reference
(``benchmarks/reference_rmc.py``: calibration, state carried from image to image), and accuracy on clean images and
under static PGD with 95 % intervals. Rows that take more than a second an image are scored on the first
``--slow-images`` only; what was right on the first few is kept, to compare with the reference on the same images. The
bundle needs stored activations (``mithridate build --tail-layer auto``). ``--only`` measures some rows and keeps those
that were measured before, in the same setting.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from attack_client.transfer import Surrogate, craft
from benchmarks import results
from benchmarks.reference_rmc import Published, ReferenceRMC
from cli.options import load_data, use_threads
from cli.output import print_table
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Defence, Resources, build_defence
from mithridate.defenses.base import draw_seed
from mithridate.defenses.presets import PRESETS
from mithridate.evaluation import wilson_interval
from mithridate.types import Epsilon, to_images

_BATCH = 64
_SLOW = 1.0  # seconds an image
_SEEDED = 0
_PAIRED = 50  # images whose single answers are kept

CELLS = (
    "none",
    "webnn",
    "deepnn",
    "reference",
    *(f"{scope}/{preset}" for scope in ("head", "tail", "all") for preset in PRESETS),
    "head/adam",
    "same-epochs",
    "same-state",
)


def main(
    bundle: Path,
    dataset: str,
    epsilon: str = "8/255",
    attack: str = "pgd20",
    images: int = 500,
    slow_images: int = 20,
    reference_images: int = 10,
    only: Annotated[list[str] | None, typer.Option()] = None,
    name: str = "rmc",
    threads: int | None = None,
    cell: Annotated[str | None, typer.Option(hidden=True)] = None,
    crafted: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    use_threads(threads)
    data = load_data(f"{dataset}[:{images}]", data_root=None, download=False, image_size=None, split="test")
    if cell is not None:
        assert crafted is not None
        print(json.dumps(_cell(cell, bundle, data, np.load(crafted), slow_images, reference_images)))
        return
    opened = Bundle.open(bundle)
    surrogate = Surrogate(classifier=opened.classifier(), source=opened.digest)
    path = results.RESULTS / f"{name}.json"
    setting = {"bundle": opened.digest, "dataset": data.spec, "epsilon": epsilon, "attack": attack}
    before = _measured_before(path, setting) if only else {}
    wanted = [c for c in CELLS if not only or any(c == o or c.startswith(f"{o}/") for o in only)]
    pixels = craft(surrogate, data, attack=attack, epsilon=Epsilon.parse(epsilon), seed=_SEEDED).pixels
    file = Path("build") / f".{name}-attacked.npy"
    np.save(file, pixels)
    rows: dict[str, Any] = dict(before)
    for number, each in enumerate(wanted, 1):
        started = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.rmc", *sys.argv[1:], "--cell", each, "--crafted", str(file)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows[each] = {**json.loads(answer.splitlines()[-1]), "threads": torch.get_num_threads()}
        print(f"{number}/{len(wanted)} {each}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        rows = {key: rows[key] for key in CELLS if key in rows}
        results.write(name, {**setting, "rows": rows})
    file.unlink()
    _print(rows, f"{data.spec}, static {attack} at {epsilon}")
    _plot(rows, path.with_suffix(".png"), f"{opened.manifest.name}, static {attack} at {epsilon}")


def _measured_before(path: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """Rows of an earlier run. Refuses those of another bundle, data set or attack."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    for key, value in setting.items():
        if found[key] != value:
            raise typer.BadParameter(f"{path.name} is of {key}={found[key]}, this run of {value}; give another --name")
    rows: dict[str, Any] = found["rows"]
    return rows


def defence_text(cell: str) -> str:
    """``head/fast`` to ``rmc:scope=head,preset=fast``; other rows are defences already."""
    if cell == "head/adam":
        return "rmc:solver=adam"
    scope, slash, preset = cell.partition("/")
    return f"rmc:scope={scope},preset={preset}" if slash else cell


def _cell(
    cell: str, bundle: Path, data: LabelledImages, attacked: np.ndarray, slow_images: int, reference_images: int
) -> dict[str, Any]:
    resources = Resources.load(Bundle.open(bundle, verify=False))
    clean, poisoned = torch.from_numpy(data.images), torch.from_numpy(attacked)
    labels = torch.from_numpy(data.labels)
    match cell:
        case "same-epochs":
            return _same_epochs(resources, poisoned)
        case "same-state":
            return _same_state(resources, clean, poisoned, 5 * slow_images)
        case "reference":
            return _reference(resources, clean, poisoned, labels, reference_images)
    base = build_defence("none", resources)
    before = _peak()
    defence = build_defence(defence_text(cell), resources)
    plain, mine = _time_pair(base, defence, poisoned, 1)
    row: dict[str, Any] = {"defense": defence.name, "batch_1": {"ms": mine, "forward_ms": plain}}
    slow = mine > 1000 * _SLOW
    if not slow:
        plain, mine = _time_pair(base, defence, poisoned, _BATCH)
        row["batch_64"] = {"ms": mine, "forward_ms": plain}
        slow = mine > 1000 * _SLOW
    row["peak_mb"], row["above_start_mb"] = _peak(), _peak() - before
    count = min(slow_images, len(labels)) if slow else len(labels)
    row["clean"] = _accuracy(defence, clean[:count], labels[:count])
    row["attacked"] = _accuracy(defence, poisoned[:count], labels[:count])
    return row


def _time_pair(base: Defence, defence: Defence, pixels: torch.Tensor, count: int) -> tuple[float, float]:
    """Milliseconds an image of the plain forward pass and of the defence, in turns; medians."""
    images = to_images(pixels[:count])

    def once(which: Defence) -> float:
        started = time.perf_counter()
        which.predict(images, generator=torch.Generator().manual_seed(_SEEDED), budget=Budget())
        return 1000 * (time.perf_counter() - started) / count

    once(base)
    first = once(defence)
    repeats = max(1, min(15, int(3000 / max(1.0, first * count))))
    pairs = [(once(base), once(defence)) for _ in range(repeats)] if repeats > 1 else [(once(base), first)]
    plain, mine = (sorted(column)[len(pairs) // 2] for column in zip(*pairs, strict=True))
    return plain, mine


def _accuracy(defence: Defence, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    answers = [
        defence.predict(to_images(batch), generator=torch.Generator().manual_seed(_SEEDED), budget=Budget()).scores
        for batch in pixels.split(_BATCH)
    ]
    return _share(torch.cat(answers).argmax(1) == labels)


def _share(right: torch.Tensor) -> dict[str, Any]:
    interval = wilson_interval(int(right.sum()), len(right))
    first = "".join(str(int(flag)) for flag in right[:_PAIRED])
    return {"n": len(right), "accuracy": float(right.double().mean()), "interval": list(interval), "first": first}


def _reference(
    resources: Resources, clean: torch.Tensor, poisoned: torch.Tensor, labels: torch.Tensor, count: int
) -> dict[str, Any]:
    """The literal procedure on the first images, attacked ones and then, from a fresh start, clean ones."""
    row: dict[str, Any] = {"defense": "literal reference"}
    milliseconds, epochs = [], []
    for name, pixels in (("attacked", poisoned), ("clean", clean)):
        reference, generator = ReferenceRMC(resources), torch.Generator().manual_seed(_SEEDED)
        right = []
        for image, label in zip(to_images(pixels[:count]), labels[:count], strict=True):
            started = time.perf_counter()
            right.append(int(reference.predict(image, generator).argmax()) == int(label))
            milliseconds.append(1000 * (time.perf_counter() - started))
            epochs.append(reference.epochs)
        row[name] = _share(torch.tensor(right))
    base = build_defence("none", resources)
    plain, _ = _time_pair(base, base, poisoned, 1)
    row["batch_1"] = {"ms": float(np.mean(milliseconds)), "forward_ms": plain}
    row["epochs"], row["peak_mb"] = epochs, _peak()
    return row


def _same_epochs(resources: Resources, poisoned: torch.Tensor, epochs: int = 2) -> dict[str, Any]:
    """``all`` against the reference at the same K and the same number of epochs: seconds an image, medians of three."""
    settings = f"rmc:scope=all,preset=paper-cifar10,epochs={epochs},patience={epochs}"
    ours = {
        precision: build_defence(f"{settings},precision={precision}", resources) for precision in ("float32", "auto")
    }
    published = Published(epochs=epochs, patience=epochs)
    times: dict[str, list[float]] = {}

    def clock(name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        times.setdefault(name, []).append(time.perf_counter() - started)

    generator = torch.Generator().manual_seed(_SEEDED)
    for image in to_images(poisoned[:3]):
        whole, part = ReferenceRMC(resources, published), ReferenceRMC(resources, published, carry=False)
        clock("reference", lambda: whole.predict(image, generator))  # noqa: B023  (called at once)
        clock("reference without calibration", lambda: part.predict(image, generator))  # noqa: B023
        for precision, defence in ours.items():
            clock(
                f"all, {precision}",
                lambda: defence.predict(image[None], generator=generator, budget=Budget()),  # noqa: B023
            )
    return {"epochs": epochs, "seconds": {name: sorted(values)[1] for name, values in times.items()}}


def _same_state(resources: Resources, clean: torch.Tensor, poisoned: torch.Tensor, count: int) -> dict[str, Any]:
    """How often ``all`` with the reference's settings answers as the reference does from the same state.

    One epoch: at the published learning rate, and at one forty times as large, where the answer moves far from the base
    model's (how far, and how often the base model answers the same, is the control).
    """
    half = count // 2
    found = {
        "published": _compared(resources, torch.cat([clean[:half], poisoned[:half]]), Published(epochs=1)),
        "forty times the learning rate": _compared(
            resources, torch.cat([clean[: half // 2], poisoned[: half // 2]]), Published(epochs=1, learning_rate=1e-3)
        ),
    }
    return {"epochs": 1, "settings": found}


def _compared(resources: Resources, pixels: torch.Tensor, published: Published) -> dict[str, Any]:
    text = (
        f"rmc:scope=all,preset=paper-cifar10,epochs={published.epochs},restore=last,"
        f"learning_rate={published.learning_rate}"
    )
    reference = ReferenceRMC(resources, published, carry=False)
    wanted = []
    for image in to_images(pixels):
        request = torch.Generator().manual_seed(_SEEDED)
        seed = draw_seed(request)  # as the defence does for a call
        wanted.append(reference.predict(image, torch.Generator().manual_seed(seed)))
    logits = torch.stack(wanted)

    def compare(scores: torch.Tensor) -> dict[str, Any]:
        return {
            "same_class": _share(scores.argmax(1) == logits.argmax(1)),
            "largest_score_difference": float((scores - logits.softmax(1)).abs().max()),
        }

    with torch.no_grad():
        row = {"base model (control)": compare(resources.classifier(to_images(pixels)).softmax(1))}
    for precision in ("float32", "auto"):
        defence = build_defence(f"{text},precision={precision}", resources)
        answers = [
            defence.predict(image, generator=torch.Generator().manual_seed(_SEEDED), budget=Budget()).scores
            for image in to_images(pixels).split(1)
        ]
        row[f"all, {precision}"] = compare(torch.cat(answers))
    return row


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _cost(row: dict[str, Any]) -> float:
    return float(row.get("batch_64", row["batch_1"])["ms"])


def _print(rows: dict[str, Any], title: str) -> None:
    reference = rows.get("reference", {}).get("batch_1", {}).get("ms")
    table = []
    for cell, row in rows.items():
        if "clean" not in row:
            continue
        sixty_four = row.get("batch_64")
        cells = [cell, f"{row['batch_1']['ms']:.2f}", f"{sixty_four['ms']:.2f}" if sixty_four else "-"]
        best = sixty_four or row["batch_1"]
        cells += [f"{best['ms'] / best['forward_ms']:.2f}", f"{reference / best['ms']:.0f}" if reference else "-"]
        cells.append(f"{row['peak_mb']:.0f}")
        for column in ("clean", "attacked"):
            share = row[column]
            low, high = share["interval"]
            cells.append(f"{100 * share['accuracy']:.1f} ({100 * low:.0f}-{100 * high:.0f}), n={share['n']}")
        table.append(cells)
    columns = ["row", "ms, batch 1", "ms, batch 64", "x forward", "times faster than reference", "peak MB"]
    print_table(title, [*columns, "clean %", "attacked %"], table)
    for cell in ("same-epochs", "same-state"):
        if cell in rows:
            print(cell, json.dumps(rows[cell]))


_COLOURS = {"head": "#0072B2", "tail": "#D55E00", "all": "#009E73", "other": "#444444"}
_MARKS = {"paper-imagenet": "s", "paper-cifar10": "D", "balanced": "o", "fast": "^"}


def _plot(rows: dict[str, Any], path: Path, title: str) -> None:
    """Attacked accuracy against the cost of an image."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    shown = sorted((cell for cell in rows if "attacked" in rows[cell]), key=lambda cell: _cost(rows[cell]))
    dearest, below = max(_cost(rows[cell]) for cell in shown), False
    for place, cell in enumerate(shown):
        row = rows[cell]
        scope, slash, preset = cell.partition("/")
        colour = _COLOURS.get(scope if slash else "other", _COLOURS["other"])
        accuracy, (low, high) = 100 * row["attacked"]["accuracy"], row["attacked"]["interval"]
        errors = [[accuracy - 100 * low], [100 * high - accuracy]]
        cost = _cost(row)
        axes.errorbar(cost, accuracy, yerr=errors, fmt=_MARKS.get(preset, "X"), color=colour, capsize=3, markersize=8)
        near = [other for other in shown[:place] if cost / _cost(rows[other]) < 6]
        crowded = any(abs(100 * rows[other]["attacked"]["accuracy"] - accuracy) < 8 for other in near)
        below = crowded and not below  # neighbours' names take turns above and below
        right = cost > dearest / 4
        axes.annotate(
            cell,
            (cost, accuracy),
            xytext=(-7 if right else 7, -13 if below else 5),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=8,
            color=colour,
        )
    axes.set_xscale("log")
    axes.set_ylim(-8, 104)
    axes.set_xlabel("milliseconds an image (batch 64; batch 1 where that takes over a second an image), log scale")
    axes.set_ylabel("accuracy under static attack, % (bars: 95 % interval)")
    axes.set_title(title)
    axes.grid(visible=True, which="both", alpha=0.25)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    typer.run(main)
