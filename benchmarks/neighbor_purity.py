"""Why adversarial copies must be in the index: whose neighbours an attacked image finds, and what that does.

    python -m benchmarks.neighbor_purity BUNDLE DATASET --epsilon 8/255 [--attack pgd20] [--neighbors 64]

The figure of the RMC authors (Wu, Yuan, Wu, ICML 2020, slides 15 to 23), measured: the label histogram of the nearest
exemplars of an attacked image in D (the clean exemplars) and in D' (those and their adversarial copies); the *purity*,
the share of the neighbours whose true label is the image's own; and the accuracy of ``knn-oat``, which learns from D
and attacks it itself, beside that of ``rmc``, which learns from D', on the same attacked images. The attack is static:
it knows the base model and neither defence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from attack_client.transfer import Surrogate, craft
from benchmarks import results
from cli.options import load_data, use_threads
from cli.output import percent, print_table, progress
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Defence, Resources, build_defence
from mithridate.evaluation import wilson_interval
from mithridate.types import Epsilon, Pixels, to_images

_BATCH = 64
_ACCURACY = "accuracy on attacked images"
_TRUE, _WRONG, _OTHER, _CLEAN = "#0072B2", "#D55E00", "#BBBBBB", "#009E73"  # Okabe and Ito: told apart by everybody


def main(
    bundle: Path,
    dataset: str,
    epsilon: str = "8/255",
    attack: str = "pgd20",
    neighbors: int = 64,
    control: Annotated[str, typer.Option(help="Learns from the clean exemplars")] = "knn-oat",
    defense: Annotated[str, typer.Option(help="Learns from clean and adversarial ones")] = "rmc",
    control_images: Annotated[int, typer.Option(help="Images for both of these: the control is slow")] = 50,
    data_root: Path | None = None,
    name: str = "neighbor-purity",
    seed: int = 0,
    threads: int | None = None,
) -> None:
    use_threads(threads)
    opened = Bundle.open(bundle)
    resources = Resources.load(opened)
    data = load_data(dataset, data_root=data_root, download=False, image_size=None, split="test")
    surrogate = Surrogate(classifier=resources.classifier, source=opened.digest)
    crafted = craft(surrogate, data, attack=attack, epsilon=Epsilon.parse(epsilon), seed=seed)
    clean, attacked = torch.from_numpy(data.images), torch.from_numpy(crafted.pixels)
    seen = {
        "clean": look_up(resources, clean, data.labels, neighbors),
        "attacked": look_up(resources, attacked, data.labels, neighbors),
    }
    accuracy = [
        answers(build_defence(text, resources), attacked[:control_images], data, seed)
        for text in ("none", control, defense)
    ]
    content = {
        "bundle": opened.digest,
        "dataset": data.spec,
        "images": len(data),
        "attack": attack,
        "epsilon": epsilon,
        "neighbors": neighbors,
        "queries": {query: found.summary() for query, found in seen.items()},
        _ACCURACY: accuracy,
        "examples": [example(seen["attacked"], data, i) for i in telling(seen["attacked"], 3)],
    }
    path = results.write(name, content)
    draw(path.with_suffix(".png"), seen, accuracy, data, attacked, f"{bundle.name}, {attack} at {epsilon}")
    _print(content, path)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The neighbours of ``N`` images, by true label: counts ``[N, C]`` in ``D`` and in ``D'``.

    ``true`` and ``predicted`` ``[N]`` are the images' own labels and what the base model says.
    """

    counts: dict[str, NDArray[np.int64]]
    true: NDArray[np.int64]
    predicted: NDArray[np.int64]

    def share(self, store: str, labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """``[N]``: of each image's neighbours, those that carry its label of ``labels`` ``[N]``."""
        counts = self.counts[store]
        return counts[np.arange(len(labels)), labels] / counts.sum(1)

    @property
    def fooled(self) -> NDArray[np.bool_]:
        return self.predicted != self.true

    def summary(self) -> dict[str, Any]:
        """What is filed of it, for ``D`` and ``D'``. Means over images come with their standard error."""
        rows: dict[str, Any] = {"misread by the base model": int(self.fooled.sum())}
        for store, counts in self.counts.items():
            right = int((counts.argmax(1) == self.true).sum())
            rows[store] = {
                "purity": _mean(self.share(store, self.true)),
                "share with the wrong label predicted": _mean(self.share(store, self.predicted)[self.fooled]),
                "most frequent label is the true one": _report(right, len(counts)),
                "histogram by rank": _ranked(counts).mean(0).round(4).tolist(),
            }
        return rows


def look_up(resources: Resources, pixels: Pixels, labels: NDArray[np.int64], neighbors: int) -> Found:
    """The labels of the ``neighbors`` nearest exemplars of ``pixels`` ``[N, C, H, W]``, in D and in D'."""
    classifier, exemplars, index = resources.classifier, resources.exemplars, resources.index
    stores = {"D": index.only(torch.arange(len(exemplars)) < exemplars.clean_count), "D'": index}
    counts: dict[str, list[torch.Tensor]] = {store: [] for store in stores}
    predicted = []
    for batch in pixels.split(_BATCH):
        images = to_images(batch)
        with torch.no_grad():
            embedding = classifier.embed(images)
            predicted.append(classifier(images).argmax(1))
        for store, part in stores.items():
            found = exemplars.gather_labels(part.search(embedding, neighbors).ids)
            counts[store].append(torch.nn.functional.one_hot(found, classifier.spec.num_classes).sum(1))
    return Found(
        counts={store: torch.cat(parts).numpy() for store, parts in counts.items()},
        true=labels,
        predicted=torch.cat(predicted).numpy(),
    )


def answers(defence: Defence, pixels: Pixels, data: LabelledImages, seed: int) -> dict[str, Any]:
    """Accuracy on ``pixels``, and how often the answer is the most frequent label among the neighbours learnt from."""
    generator, labels = torch.Generator().manual_seed(seed), data.labels[: len(pixels)]
    said, majority, seconds = [], [], 0.0
    with progress() as report:
        for number, image in enumerate(pixels.split(1), 1):
            prediction = defence.predict(to_images(image), generator=generator, budget=Budget())
            said.append(int(prediction.scores.argmax()))
            majority += [next(iter(n.label_counts)) for n in prediction.neighborhoods if n is not None]
            seconds += sum(prediction.seconds.values())
            report(defence.name, number, len(pixels))
    row = {"defense": defence.name, **_report(int((np.array(said) == labels).sum()), len(labels))}
    row["milliseconds an image"] = round(1000 * seconds / len(labels), 2)
    if majority:
        row["answer is its neighbours' most frequent label"] = _report(
            int((np.array(said) == np.array(majority)).sum()), len(labels)
        )
    return row


def telling(found: Found, count: int) -> list[int]:
    """The first misread images, each of another true label: none is chosen for how well it looks."""
    chosen: dict[int, int] = {}
    for i in np.flatnonzero(found.fooled):
        chosen.setdefault(int(found.true[i]), int(i))
    return sorted(chosen.values())[:count]


def example(found: Found, data: LabelledImages, i: int) -> dict[str, Any]:
    """One image's histograms."""
    row: dict[str, Any] = {"image": i, "true": data.classes[found.true[i]]}
    row["predicted"] = data.classes[found.predicted[i]]
    for store, counts in found.counts.items():
        row[store] = {data.classes[c]: int(counts[i, c]) for c in counts[i].argsort()[::-1] if counts[i, c]}
    return row


def draw(
    path: Path, seen: dict[str, Found], accuracy: list[dict], data: LabelledImages, attacked: Pixels, what: str
) -> None:
    """Left: three images and their neighbours; middle: the mean histogram; right: purity and accuracy."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = seen["attacked"]
    chosen = telling(found, 3)
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, grid = plt.subplots(2, len(chosen) + 2, figsize=(3.6 * (len(chosen) + 2), 7.4), layout="constrained")
    for row, (store, words) in enumerate((("D", "D: clean exemplars"), ("D'", "D': clean and adversarial"))):
        for axes, i in zip(grid[row], chosen, strict=False):
            _draw_example(axes, found, store, i, data.classes, attacked[i] if row == 0 else None)
        _draw_ranked(grid[row, len(chosen)], found, store)
        grid[row, 0].set_ylabel(f"{words}\nneighbours [count]", fontweight="bold")
    _draw_purity(grid[0, -1], seen)
    _draw_accuracy(grid[1, -1], accuracy)
    colours = {"the image's true label": _TRUE, "the wrong label the base model reads": _WRONG, "other labels": _OTHER}
    handles = [mpl.patches.Patch(color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False)
    count = int(found.counts["D"][0].sum())
    figure.suptitle(
        f"Whose neighbours an attacked image finds: its {count} nearest exemplars by true label "
        f"({what}, {len(found.true)} images)"
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _draw_example(
    axes: Any, found: Found, store: str, i: int, classes: tuple[str, ...], pixels: torch.Tensor | None
) -> None:
    counts = found.counts[store][i]
    shown = range(len(counts)) if len(counts) <= 12 else sorted(counts.argsort()[::-1][:12])
    roles = {int(found.predicted[i]): _WRONG, int(found.true[i]): _TRUE}
    axes.bar([classes[c] for c in shown], [counts[c] for c in shown], color=[roles.get(c, _OTHER) for c in shown])
    axes.tick_params(axis="x", rotation=90)
    axes.set_ylim(0, counts.sum() * 1.05)
    axes.set_xlim(-0.7, len(shown) - 0.3)
    if pixels is None:
        return
    axes.set_title(f"{classes[found.true[i]]}, read as {classes[found.predicted[i]]}")
    free = max((0.03, 0.33, 0.63), key=lambda left: _distance_from_bars(left, counts[list(shown)]))
    inset = axes.inset_axes((free, 0.6, 0.36, 0.38))
    inset.imshow(pixels.permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=255)
    inset.set_axis_off()


def _distance_from_bars(left: float, heights: NDArray[np.int64]) -> float:
    """How far an inset that begins at ``left`` (of the width) stays from the middle of the bars."""
    return abs(left + 0.18 - float((heights * (np.arange(len(heights)) + 0.5)).sum() / heights.sum() / len(heights)))


def _draw_ranked(axes: Any, found: Found, store: str) -> None:
    """The mean over images of each one's sorted histogram, split by what the label at that rank is."""
    counts, ranks = found.counts[store], min(6, found.counts[store].shape[1])
    order = (-counts).argsort(1, kind="stable")[:, :ranks]
    shares = _ranked(counts)[:, :ranks]
    bottom = np.zeros(ranks)
    true = order == found.true[:, None]
    wrong = (order == found.predicted[:, None]) & ~true
    for part, colour in ((true, _TRUE), (wrong, _WRONG), (~true & ~wrong, _OTHER)):
        height = 100 * (shares * part).mean(0)
        axes.bar(np.arange(1, ranks + 1), height, bottom=bottom, color=colour)
        bottom += height
    axes.set_ylim(0, 105)
    axes.set(title="mean over all attacked images", xlabel="rank of the label", ylabel="neighbours [%]")


def _draw_purity(axes: Any, seen: dict[str, Found]) -> None:
    looks = {"clean": {"color": _CLEAN}, "attacked": {"color": _TRUE, "hatch": "//", "edgecolor": "white"}}
    for shift, (query, found) in zip((-0.2, 0.2), seen.items(), strict=True):
        for place, store in enumerate(found.counts):
            values = 100 * found.share(store, found.true)
            label = f"{query} images" if not place else None
            bar = axes.bar(place + shift, values.mean(), 0.4, label=label, **looks[query])
            axes.bar_label(bar, fmt="%.0f %%", padding=2)
    axes.set_xticks([0, 1], ["in D", "in D'"])
    axes.set(title="purity: neighbours of\nthe image's own class", ylabel="neighbours [%]", ylim=(0, 125))
    axes.legend(frameon=False, loc="upper center", ncols=2, fontsize=9, handlelength=1.2, columnspacing=1)


def _draw_accuracy(axes: Any, accuracy: list[dict]) -> None:
    for place, row in enumerate(accuracy):
        value, (low, high) = 100 * row["accuracy"], (100 * end for end in row["interval"])
        axes.bar(place, value, 0.6, color=_TRUE, hatch="//", edgecolor="white")
        axes.errorbar(place, value, [[value - low], [high - value]], color="black", capsize=4)
        axes.text(place, high + 2, f"{value:.0f} %", ha="center")
    names = [row["defense"].split(":")[0] for row in accuracy]
    axes.set_xticks(range(len(accuracy)), [names[0], f"{names[1]}\nlearns from D", f"{names[2]}\nlearns from D'"])
    axes.set(title=f"accuracy on {accuracy[0]['images']} attacked images", ylabel="accuracy [%], 95 % interval")
    axes.set_ylim(0, 112)


def _ranked(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.sort(counts, 1)[:, ::-1] / counts.sum(1, keepdims=True)


def _mean(values: NDArray[np.float64]) -> dict[str, Any]:
    if not len(values):
        return {"images": 0}
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"images": len(values), "mean": float(values.mean()), "standard error": error}


def _report(right: int, count: int) -> dict[str, Any]:
    interval = wilson_interval(right, count)
    return {"images": count, "correct": right, "accuracy": right / count, "interval": list(interval)}


def _print(content: dict[str, Any], path: Path) -> None:
    def cell(mean: dict[str, Any]) -> str:
        return percent(mean["mean"]) if mean["images"] else "-"

    rows = [
        [query, store, cell(row["purity"]), cell(row["share with the wrong label predicted"])]
        for query, stores in content["queries"].items()
        for store, row in stores.items()
        if isinstance(row, dict)
    ]
    title = (
        f"{content['dataset']}, {content['attack']} at {content['epsilon']}, K = {content['neighbors']}; {path.name}"
    )
    print_table(title, ["queries", "in", "purity", "wrong label"], rows)
    columns = ["defense", "right", "of", "accuracy"]
    right = [[r["defense"], str(r["correct"]), str(r["images"]), percent(r["accuracy"])] for r in content[_ACCURACY]]
    print_table("attacked images", columns, right)


if __name__ == "__main__":
    typer.run(main)
