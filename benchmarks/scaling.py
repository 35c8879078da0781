"""What search and adaptation cost as store and neighbourhood grow, and where search becomes the dearer of the two.

    python -m benchmarks.scaling [--quick]

``rmc`` on the head, 64 images at a time, milliseconds an image: against 1,000 to 1,000,000 exemplars at K = 256, and
against K = 16 to 4,096 at 16,000 and 100,000 exemplars. Search is what ``rmc`` does of it (exact index, soft weights);
adaptation is the closed form (``ridge``) and, beside it, ``solver=adam`` with all of its 50 steps: how soon it would
converge is a matter of the data. Embedding the images and describing the neighbours are left out. Embeddings are
synthetic and memory-mapped: 64 numbers in ten classes, half of them attacked, spread so that neighbours are as near
and as mixed as those of a CIFAR-10 ResNet-20 (``neighborhoods`` in the result). Each cell is the median over batches of
fresh queries, all cells taking turns: a noisy machine is equally unfair to all.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from benchmarks import results
from cli.options import use_threads
from cli.output import note, print_table
from mithridate.defenses import Budget, Resources, build_defence
from mithridate.defenses.adapting import Query
from mithridate.defenses.none import BasePass
from mithridate.defenses.rmc import RMC
from mithridate.defenses.selection import Selector
from mithridate.exemplars import ExemplarStore, Layout
from mithridate.models import Classifier, build_classifier
from mithridate.neighbors import NeighborIndex

CLASSES, WIDTH = 10, 64
_OFF_CENTRE, _TOWARDS, _TARGETS = 0.42, 0.25, 3
"""Neighbours are then as near, and as mixed, as in a store of 8,000 + 8,000 CIFAR-10 images."""

_BATCH = 64
_SOLVERS = {"ridge": "solver=ridge", "adam": "solver=adam,tolerance=0,held_out=0"}
_USUAL_K, _USUAL_SIZES = 256, (16_000, 100_000)


class Mixture:
    """Embeddings in ten classes, half of them attacked: near the centre of another class, labelled with their own.

    ``head`` ``[10, 64]`` and ``bias`` ``[10]`` tell the classes apart as a trained last layer does: an attacked one is
    taken for the class that it looks like.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._centres = self._random.normal(size=(CLASSES, WIDTH))
        self._scales = 0.9 ** np.arange(WIDTH)  # most of the spread is in a few directions
        self._scales /= np.sqrt(np.square(self._scales).sum() / WIDTH)
        self.head = torch.from_numpy(0.5 * self._centres).float()
        self.bias = torch.from_numpy(-0.25 * np.square(self._centres).sum(1)).float()

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """``count`` embeddings float32 ``[N, 64]`` and their true labels int64 ``[N]``."""
        labels = self._random.integers(CLASSES, size=count)
        attacked = self._random.random(count) < 0.5
        looks_like = np.where(attacked, (labels + self._random.integers(1, _TARGETS + 1, size=count)) % CLASSES, labels)
        points = self._centres[looks_like] + _OFF_CENTRE * self._scales * self._random.normal(size=(count, WIDTH))
        points += _TOWARDS * (self._centres[labels] - self._centres[looks_like]) * attacked[:, np.newaxis]
        return points.astype(np.float32), labels


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the plot."""

    exemplars: int
    neighbors: int


def main(quick: bool = False, repeats: int = 9, name: str = "scaling", seed: int = 0) -> None:
    use_threads(None)
    sizes = [1_000, 10_000, 100_000] if quick else [1_000, 10_000, 100_000, 300_000, 1_000_000]
    counts = [4**power for power in range(2, 5 if quick else 7)]
    cells = list(
        dict.fromkeys(
            [Cell(exemplars=size, neighbors=_USUAL_K) for size in sizes]
            + [Cell(exemplars=size, neighbors=count) for size in _USUAL_SIZES for count in counts]
        )
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        mixture = Mixture(seed)
        stores = _stores(mixture, sorted({cell.exemplars for cell in cells}), Path(folder))
        rows = _measure(cells, stores, mixture, 3 if quick else repeats)
        described = _neighborhoods(stores[_USUAL_SIZES[0]], mixture)
    crossings = _crossings(rows)
    content = {"batch": _BATCH, "width": WIDTH, "neighborhoods": described, "crossings": crossings, "rows": rows}
    _print(rows, crossings)
    if quick:
        note("--quick: nothing is filed")
        return
    path = results.write(name, content)
    _plot(rows, crossings, path.with_suffix(".png"))


def _stores(mixture: Mixture, sizes: Sequence[int], folder: Path) -> dict[int, Resources]:
    """The same exemplars, the first so many of them; one file, memory-mapped as in a bundle."""
    file, labels = folder / "embeddings.npy", np.empty(sizes[-1], np.int64)
    written = np.lib.format.open_memmap(file, "w+", np.float32, (sizes[-1], WIDTH))
    for start in range(0, sizes[-1], 50_000):
        part = slice(start, min(start + 50_000, sizes[-1]))
        written[part], labels[part] = mixture.draw(part.stop - part.start)
    written.flush()
    classifier = build_classifier("resnet20", num_classes=CLASSES, image_shape=(3, 32, 32))
    classifier.head.weight.copy_(mixture.head)
    classifier.head.bias.copy_(mixture.bias)
    everything = np.load(file, mmap_mode="c")
    return {size: _resources(classifier, everything[:size], labels[:size]) for size in sizes}


def _resources(classifier: Classifier, embeddings: np.ndarray, labels: np.ndarray) -> Resources:
    store = ExemplarStore(
        Layout(sources=len(labels), copies=("clean",), shard_size=len(labels)),
        shards=[],  # the head scope looks at no pixels
        labels=labels,
        features=embeddings,
        predictions=np.zeros(len(labels), np.int32),
    )
    return Resources(classifier=classifier, index=NeighborIndex.build(embeddings), exemplars=store)


def _measure(
    cells: Sequence[Cell], stores: dict[int, Resources], mixture: Mixture, repeats: int
) -> list[dict[str, Any]]:
    defences = {
        (cell, solver): build_defence(f"rmc:{_SOLVERS[solver]},neighbors={cell.neighbors}", stores[cell.exemplars])
        for cell, solver in itertools.product(cells, _SOLVERS)
    }
    seconds: dict[tuple[Cell, str], list[float]] = defaultdict(list)
    for turn in range(repeats + 1):
        queries = torch.from_numpy(mixture.draw(_BATCH)[0])
        for cell in cells:
            for solver in _SOLVERS:
                defence = defences[cell, solver]
                assert isinstance(defence, RMC)
                search, adapt = _once(defence, queries)
                if not turn:
                    continue  # the first one reads the files and warms up
                seconds[cell, solver].append(adapt)
                if solver == "ridge":
                    seconds[cell, "search"].append(search)
        note(f"turn {turn} of {repeats}")
    return [
        {
            "exemplars": cell.exemplars,
            "neighbors": cell.neighbors,
            **{f"{what}_ms": _milliseconds(seconds[cell, what]) for what in ("search", *_SOLVERS)},
            **{f"{what}_least_ms": _milliseconds([min(seconds[cell, what])]) for what in ("search", *_SOLVERS)},
        }
        for cell in cells
    ]


def _once(defence: RMC, queries: torch.Tensor) -> tuple[float, float]:
    """Seconds of search and of adaptation for a batch."""
    selector = Selector(resources=defence.resources, config=defence.selection)
    logits = defence.resources.classifier.head(queries)
    started = time.perf_counter()
    selection = selector.select(queries)
    found = time.perf_counter()
    query = Query(
        images=queries.new_empty(len(queries), 0),
        base=BasePass(logits=logits, embedding=queries, head_input=queries),
        selection=selection,
        budgets=(Budget(),) * len(queries),
        seeds=(0,) * len(queries),
    )
    defence.adapter.adapt(query)
    return found - started, time.perf_counter() - found


def _milliseconds(seconds: Sequence[float]) -> float:
    return 1000 * statistics.median(seconds) / _BATCH


def _neighborhoods(resources: Resources, mixture: Mixture) -> dict[str, float]:
    """How near and how mixed the neighbours are: medians of distances, and the share of the query's own class."""
    points, labels = mixture.draw(200)
    found = resources.index.search(torch.from_numpy(points), _USUAL_K)
    everywhere = resources.index.search(torch.from_numpy(points), len(resources.index)).distances.median(1).values
    own = resources.exemplars.gather_labels(found.ids) == torch.from_numpy(labels)[:, None]
    return {
        "exemplars": len(resources.index),
        "nearest over median distance": float((found.distances[:, 0] / everywhere).median()),
        "256th over median distance": float((found.distances[:, -1] / everywhere).median()),
        "share of the query's class": float(own.double().mean()),
    }


def crossing(places: Sequence[float], rising: Sequence[float], other: Sequence[float]) -> float | None:
    """Where ``rising`` overtakes ``other``, both straight between ``places`` on logarithmic axes; None: nowhere."""
    gaps = [math.log(a / b) for a, b in zip(rising, other, strict=True)]
    for (x0, g0), (x1, g1) in itertools.pairwise(zip(places, gaps, strict=True)):
        if g0 < 0 <= g1:
            return math.exp(math.log(x0) + (math.log(x1) - math.log(x0)) * g0 / (g0 - g1))
    return None


def _crossings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Against exemplars search is what rises; against K it is the adaptation."""
    found = []
    usual = _line(rows, "neighbors", _USUAL_K)
    for solver in _SOLVERS:
        search, adapt = ([row[f"{what}_ms"] for row in usual] for what in ("search", solver))
        place = crossing([row["exemplars"] for row in usual], search, adapt)
        found.append(_crossing(solver, "exemplars", place, f"K = {_USUAL_K}", search, adapt, "search"))
        for size in _USUAL_SIZES:
            line = _line(rows, "exemplars", size)
            search, adapt = ([row[f"{what}_ms"] for row in line] for what in ("search", solver))
            place = crossing([row["neighbors"] for row in line], adapt, search)
            found.append(_crossing(solver, "neighbors", place, f"{size:,} exemplars", search, adapt, "adaptation"))
    return found


def _crossing(
    solver: str, axis: str, place: float | None, at: str, search: Sequence[float], adapt: Sequence[float], rises: str
) -> dict[str, Any]:
    what = "exemplars" if axis == "exemplars" else "neighbours"
    if place is not None:
        words = f"{solver}, {at}: {rises} overtakes at about {_rounded(place):,} {what}"
    else:
        dearer = "search" if all(s >= a for s, a in zip(search, adapt, strict=True)) else "adaptation"
        words = f"{solver}, {at}: {dearer} is the dearer throughout"
    return {"solver": solver, "axis": axis, "at": at, "place": place, "words": words}


def _rounded(value: float) -> int:
    """To two digits."""
    return int(float(f"{value:.1e}"))


def _line(rows: Sequence[dict[str, Any]], key: str, value: int) -> list[dict[str, Any]]:
    other = "exemplars" if key == "neighbors" else "neighbors"
    return sorted((row for row in rows if row[key] == value), key=lambda row: row[other])


def _print(rows: Sequence[dict[str, Any]], crossings: Sequence[dict[str, Any]]) -> None:
    header = ["exemplars", "K", "search", "ridge", "adam", "search / ridge"]
    cells = [
        [
            f"{row['exemplars']:,}",
            str(row["neighbors"]),
            *(f"{row[f'{what}_ms']:.3f}" for what in ("search", *_SOLVERS)),
            f"{row['search_ms'] / row['ridge_ms']:.2f}",
        ]
        for row in rows
    ]
    print_table(f"milliseconds an image, {_BATCH} at a time", header, cells)
    for found in crossings:
        print(found["words"])


def _plot(rows: Sequence[dict[str, Any]], crossings: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    # Okabe and Ito's colours, and a marker each: told apart without colour, too.
    looks = {"search": ("#0072B2", "o"), "ridge": ("#D55E00", "s"), "adam": ("#009E73", "^")}
    names = {"search": "search (exact)", "ridge": "adaptation, ridge", "adam": "adaptation, adam (50 steps)"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for what, (colour, marker) in looks.items():
        line = _line(rows, "neighbors", _USUAL_K)
        xs, ys = [row["exemplars"] for row in line], [row[f"{what}_ms"] for row in line]
        left.plot(xs, ys, color=colour, marker=marker, label=names[what])
        for size, style in zip(_USUAL_SIZES, ("-", "--"), strict=True):
            line = _line(rows, "exemplars", size)
            xs, ys = [row["neighbors"] for row in line], [row[f"{what}_ms"] for row in line]
            right.plot(xs, ys, color=colour, marker=marker, linestyle=style, label=f"{names[what]}, {size:,} exemplars")
    for found in crossings:
        if found["axis"] == "exemplars" and found["place"] is not None:
            line = _line(rows, "neighbors", _USUAL_K)
            height = _at(found["place"], [row["exemplars"] for row in line], [row["search_ms"] for row in line])
            left.plot(found["place"], height, "*", color="black", markersize=13, zorder=3)
            left.annotate(
                f"search overtakes {found['solver']}\nat {_rounded(found['place']):,} exemplars",
                (found["place"], height),
                xytext=(-12, 22),
                textcoords="offset points",
                ha="right",
                fontsize=9,
                arrowprops={"arrowstyle": "-", "color": "grey"},
            )
    left.set(xlabel=f"exemplars (K = {_USUAL_K} neighbours)", ylabel="milliseconds an image (64 at a time)")
    right.set(xlabel="K, neighbours an image")
    for axis in (left, right):
        axis.set(xscale="log", yscale="log")
        axis.grid(which="major", color="0.88")
        axis.legend(fontsize=8, frameon=False)
    right.set_xscale("log", base=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _at(place: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    return float(np.exp(np.interp(np.log(place), np.log(xs), np.log(ys))))


if __name__ == "__main__":
    typer.run(main)
