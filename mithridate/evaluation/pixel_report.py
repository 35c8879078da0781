"""The three figures of the PRM paper for one bundle, as numbers: where the gradient is, what lambda does to it and to
the accuracy, and what an attacker gets who may change only some of the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mithridate.attacks import PGD, Forward
from mithridate.defenses import Budget, Resources, build_defence
from mithridate.errors import OptionError
from mithridate.evaluation.pixel_robustness import (
    InputGradient,
    by_gradient,
    first_pixels,
    input_gradient,
    masked_attacks,
    overlap,
    share_count,
)
from mithridate.evaluation.statistics import wilson_interval
from mithridate.models.prm import lattice
from mithridate.types import Labels, Pixels

LAMBDAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
"""The authors' sweep."""

SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)

ORDERS = ("top", "random", "bottom")
"""Which pixels an attacker may change: those of the largest R first, as they are drawn, or the smallest first."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class PixelPlan:
    """What to measure. ``lambdas`` and ``shares`` (of the pixels) in [0, 1]; ``attack`` runs on the first
    ``attacked`` images, or on all."""

    attack: PGD
    module: int = 0
    lambdas: tuple[float, ...] = LAMBDAS
    shares: tuple[float, ...] = SHARES
    attacked: int | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, values in (("lambda", self.lambdas), ("share", self.shares)):
            if not values:
                raise OptionError(f"there is no {name}; give at least one")
            wrong = next((value for value in values if not 0 <= value <= 1), None)
            if wrong is not None:
                raise OptionError(f"{name} {wrong:g} is out of range; allowed: 0 to 1")
            if len(set(values)) != len(values):
                raise OptionError(f"a {name} is there twice in {', '.join(f'{value:g}' for value in values)}")


@dataclass(frozen=True, kw_only=True)
class PixelReport:
    """What was measured on ``images`` images.

    ``manipulated``: R by lambda, in the order of the plan. ``attacks``: by model (``none`` and the PRM at its largest
    lambda), order and share, which of the first images withstood. Both are empty, and ``variant`` and ``designated``
    (the lattice, bool ``[H, W]``) None, where the bundle has no PRM.
    """

    plan: PixelPlan
    images: int
    variant: str | None
    designated: torch.Tensor | None
    base: InputGradient
    manipulated: Mapping[float, InputGradient]
    attacks: Mapping[str, Mapping[str, Mapping[float, torch.Tensor]]]

    def iou(self, gradient: InputGradient) -> float:
        """Of the lattice and as many pixels with the largest R. Raises ValueError where there is no lattice."""
        if self.designated is None:
            raise ValueError("no PRM, no lattice")
        order = by_gradient(gradient.mean)
        return overlap(first_pixels(order, int(self.designated.sum()), gradient.mean.shape), self.designated)

    def summary(self) -> dict[str, Any]:
        """For a file: plain numbers."""
        found: dict[str, Any] = {"images": self.images}
        if self.designated is not None:
            share = float(self.designated.double().mean())
            # Two sets of a share s drawn at random meet in s * s of the pixels.
            found["prm"] = {"module": self.plan.module, "variant": self.variant, "lattice_share": share}
            found["prm"]["iou_by_chance"] = share / (2 - share)
        found["gradients"] = [self._gradient_row("none", None, self.base)]
        for value, gradient in self.manipulated.items():
            found["gradients"].append(self._gradient_row(prm_text(value, self.plan.module), value, gradient))
        found["masked"] = [
            {
                "defense": model,
                "pixels": name,
                "share": share,
                "count": share_count(share, self.base.mean.numel()),
                **counted(right),
            }
            for model, orders in self.attacks.items()
            for name, by_share in orders.items()
            for share, right in by_share.items()
        ]
        return found

    def _gradient_row(self, model: str, value: float | None, gradient: InputGradient) -> dict[str, Any]:
        row: dict[str, Any] = {"defense": model, "lambda": value, **counted(gradient.right)}
        row["mean_gradient"] = float(gradient.mean.mean())
        if self.designated is not None:
            row["on_lattice"] = float(gradient.mean[self.designated].mean())
            off = gradient.mean[~self.designated]
            row["off_lattice"] = float(off.mean()) if len(off) else None
            row["iou"] = self.iou(gradient)
        return row


def counted(right: torch.Tensor) -> dict[str, Any]:
    """How many of a bool ``[N]``, with the 95 % interval."""
    correct, images = int(right.sum()), len(right)
    interval = list(wilson_interval(correct, images))
    return {"images": images, "correct": correct, "accuracy": correct / images, "interval": interval}


def prm_text(value: float, module: int) -> str:
    """The defence that is looked at: deterministic, so that its gradient is one and not a mean."""
    return f"prm:lambda={value:.12g},shift=none,module={module}"


def measure_pixels(
    resources: Resources, pixels: Pixels, labels: Labels, plan: PixelPlan, *, progress: Progress = lambda *_: None
) -> PixelReport:
    """Measures uint8 ``pixels`` ``[N, C, H, W]`` with their true ``labels`` ``[N]``.

    Raises OptionError where the bundle has PRMs, but not the one that the plan names.
    """
    device, count = resources.classifier.device, plan.attacked or len(pixels)
    pixels, labels = pixels.to(device), labels.to(device)
    has_prm = bool(resources.prms)
    lambdas = plan.lambdas if has_prm else ()
    models = [_forward("none", resources), *(_forward(prm_text(value, plan.module), resources) for value in lambdas)]
    step = _steps("input gradients", len(models) * -(-len(pixels) // plan.batch_size), progress)
    gradients = [input_gradient(model, pixels, labels, batch_size=plan.batch_size, advance=step) for model in models]
    manipulated = dict(zip(lambdas, gradients[1:], strict=True))
    variant = resources.prms[plan.module].spec.variant if has_prm else None
    attacks = {}
    if has_prm:
        last = max(lambdas)
        targets = {"none": (models[0], gradients[0])}
        targets[prm_text(last, plan.module)] = (models[1 + lambdas.index(last)], manipulated[last])
        attacks = _attack(targets, pixels[:count], labels[:count], plan, progress)
    return PixelReport(
        plan=plan,
        images=len(pixels),
        variant=variant,
        designated=lattice(variant, *pixels.shape[2:]) if variant else None,
        base=gradients[0],
        manipulated=manipulated,
        attacks=attacks,
    )


def _attack(
    targets: Mapping[str, tuple[Forward, InputGradient]],
    pixels: Pixels,
    labels: Labels,
    plan: PixelPlan,
    progress: Progress,
) -> dict[str, dict[str, dict[float, torch.Tensor]]]:
    """Each model by its own R; the random order is the same for all."""
    step = _steps("masked attacks", len(targets) * len(ORDERS) * len(plan.shares), progress)
    drawn = torch.randperm(pixels.shape[2] * pixels.shape[3], generator=torch.Generator().manual_seed(plan.seed))
    found = {}
    for name, (forward, gradient) in targets.items():
        top = by_gradient(gradient.mean)
        found[name] = masked_attacks(
            forward,
            pixels,
            labels,
            attack=plan.attack,
            orders=dict(zip(ORDERS, (top, drawn, top.flip(0)), strict=True)),
            shares=plan.shares,
            batch_size=plan.batch_size,
            seed=plan.seed,
            advance=step,
        )
    return found


def _forward(text: str, resources: Resources) -> Forward:
    """What a defence gives attackers; none of those here draws anything that counts."""
    defence, generator = build_defence(text, resources), torch.Generator().manual_seed(0)
    return lambda images: defence.surrogate(images, generator=generator, budget=Budget())


def _steps(phase: str, total: int, progress: Progress) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(phase, done, total)

    return step
