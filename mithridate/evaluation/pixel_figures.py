"""The pictures of a PixelReport. Needs matplotlib, which is the extra ``report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mithridate.errors import OptionError
from mithridate.evaluation.pixel_report import ORDERS, PixelReport, counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRADIENTS, LAMBDA, MASKED = "gradients.png", "lambda.png", "masked-pgd.png"

_SHOWN = (0.0, 0.5, 0.9, 1.0)
_DPI = 110
_LOOKS = {
    "top": ("#D55E00", "o", "largest first"),
    "random": ("#666666", "s", "at random"),
    "bottom": ("#0072B2", "^", "smallest first"),
}
"""Colours of Okabe and Ito, which everybody tells apart, and shapes for print."""

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def require_matplotlib() -> None:
    """Raises OptionError where it is not installed: before hours of measuring, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError("pictures need matplotlib; install it: pip install 'mithridate[report]'") from error


def names(report: PixelReport) -> tuple[str, ...]:
    """Of the pictures: one where the bundle has no PRM, else three."""
    return (GRADIENTS, LAMBDA, MASKED) if report.manipulated else (GRADIENTS,)


def draw(report: PixelReport, directory: Path, *, title: str) -> None:
    """Writes the pictures into ``directory``."""
    require_matplotlib()
    import matplotlib as mpl

    pictures = {GRADIENTS: _gradients, LAMBDA: _lambda, MASKED: _masked}
    with mpl.rc_context(_STYLE):
        for name in names(report):
            figure = pictures[name](report, title.replace("$", r"\$"))  # else it is read as mathematics
            figure.savefig(directory / name, dpi=_DPI, metadata={"Software": None})


def _gradients(report: PixelReport, title: str) -> Figure:
    """Heat maps on one scale, or a model that is more sensitive everywhere would look the same; of square roots, or the
    less sensitive one would be black."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    panels = {"base model": report.base.mean}
    panels |= {f"PRM, λ = {value:g}": report.manipulated[value].mean for value in _shown(tuple(report.manipulated))}
    figure = Figure(figsize=(2.6 * len(panels) + 1.4, 3.4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    norm = PowerNorm(0.5, vmin=0, vmax=max(float(panel.max()) for panel in panels.values()) or 1)
    for axes, (name, panel) in zip(grid, panels.items(), strict=True):
        drawn = axes.imshow(panel.numpy(), cmap="viridis", norm=norm, interpolation="nearest")
        axes.set_title(f"{name}\nmean R {float(panel.mean()):.2g}", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=grid, label="R = mean |dLoss/dx|\n(square-root scale)", shrink=0.75, pad=0.01)
    figure.suptitle(f"Where the input gradient is ({title}, {report.images} images)", fontsize=11)
    return figure


def _shown(lambdas: Sequence[float]) -> tuple[float, ...]:
    """Of those measured the customary four, or four from the first to the last."""
    known = tuple(value for value in _SHOWN if value in lambdas)
    if len(known) >= 2 or len(lambdas) <= len(known):
        return known
    places = torch.linspace(0, len(lambdas) - 1, min(4, len(lambdas))).round().long().unique()
    return tuple(lambdas[place] for place in places.tolist())


def _lambda(report: PixelReport, title: str) -> Figure:
    """The values of lambda at equal distances: half of them lie above 0.8."""
    from matplotlib.figure import Figure

    assert report.designated is not None
    figure = Figure(figsize=(7.6, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    base, places = counted(report.base.right), range(len(report.manipulated))
    rows = [counted(gradient.right) for gradient in report.manipulated.values()]
    above.axhline(100 * base["accuracy"], color="black", linestyle="--", linewidth=1, label="base model")
    _intervals(above, places, rows, color="#0072B2", marker="o", label="with the PRM")
    above.set(ylabel="accuracy [%], 95 % interval", ylim=(0, 102))
    above.legend(loc="lower left")
    share = float(report.designated.double().mean())
    chance, overlaps = share / (2 - share), [report.iou(gradient) for gradient in report.manipulated.values()]
    below.plot(places, overlaps, color="#009E73", marker="s", label=f"top {100 * share:.0f} % of R and the lattice")
    below.axhline(chance, color="black", linestyle=":", linewidth=1, label="pixels drawn at random")
    below.set(ylabel="intersection over union", ylim=(0, 1.04), xlabel="λ (not to scale)")
    below.set_xticks(places, [f"{value:g}" for value in report.manipulated])
    below.legend(loc="upper left")
    figure.suptitle(f"What λ costs, and what it moves ({title}, {report.images} images)", fontsize=11)
    return figure


def _masked(report: PixelReport, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9 * len(report.attacks), 4.5), layout="constrained")
    grid = figure.subplots(1, len(report.attacks), sharey=True, squeeze=False)[0]
    for axes, (model, orders) in zip(grid, report.attacks.items(), strict=True):
        _draw_orders(axes, orders)
        axes.set(title=_model_name(model), xlabel="pixels that may be changed [%]", ylim=(-2, 102), xlim=(-3, 103))
    assert report.designated is not None
    share = 100 * float(report.designated.double().mean())
    grid[-1].axvline(share, color="black", linestyle=":", linewidth=1)
    grid[-1].text(share + 1, 101, "the lattice", va="top", fontsize=9)
    grid[0].set_ylabel("accuracy [%], 95 % interval")
    grid[0].legend(title="pixels by R", loc="upper right")
    images = len(next(iter(next(iter(report.attacks.values()))["top"].values())))
    attack = f"{report.plan.attack.name} at {report.plan.attack.epsilon}"
    figure.suptitle(f"{attack} on some of the pixels ({title}, {images} images)", fontsize=11)
    return figure


def _draw_orders(axes: Axes, orders: Mapping[str, Mapping[float, torch.Tensor]]) -> None:
    for name in ORDERS:
        colour, marker, label = _LOOKS[name]
        rows = [counted(right) for right in orders[name].values()]
        _intervals(axes, [100 * share for share in orders[name]], rows, color=colour, marker=marker, label=label)


def _model_name(model: str) -> str:
    if model == "none":
        return "base model"
    value = model.split("lambda=")[1].split(",")[0]
    return f"PRM, λ = {value}, not moved"


def _intervals(
    axes: Axes, places: Sequence[float], rows: Sequence[Mapping[str, Any]], *, color: str, marker: str, label: str
) -> None:
    """Accuracies with their 95 % intervals, in percent."""
    values = torch.tensor([[row["accuracy"], *row["interval"]] for row in rows]).double() * 100
    errors = torch.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]).clamp_min(0)
    axes.errorbar(
        list(places), values[:, 0].tolist(), errors.numpy(), color=color, marker=marker, capsize=3, label=label
    )
