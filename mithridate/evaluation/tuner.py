"""Finds the settings of RMC on training images that are kept out of the neighbours.

How far one step goes decides nearly everything about a fine-tuned answer, and the right length depends on network and
data. So it is measured, on images that serving will never be scored on: a sample of the training set is taken out of
the index, and its images, clean and attacked, are the queries. The base model has seen them in training, so their
*clean* accuracy flatters every setting alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from mithridate.attacks import parse_attack
from mithridate.defenses import Budget, Defence, Resources, build_defence
from mithridate.defenses.options import split_text
from mithridate.defenses.pipeline import split_stages
from mithridate.defenses.presets import preset_options
from mithridate.errors import OptionError
from mithridate.tuning import Trial, Tuning
from mithridate.types import Epsilon, Labels, Pixels, to_images

_BATCH = 64
_WIDTHS = ("64", "128", "256", "512", "1024")

AXES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "rmc": {
        "anchor": ("0.0001", "0.001", "0.01", "0.1", "1.0", "10.0"),
        "neighbors": _WIDTHS,
        "temperature": ("0.0", "0.25", "0.5", "1.0"),
    },
    "rmc:solver=adam": {
        "learning_rate": ("0.003", "0.01", "0.03", "0.1", "0.3"),
        "neighbors": _WIDTHS,
        "steps": ("10", "25", "50", "100"),
    },
    "rmc:scope=tail": {
        "learning_rate": ("0.001", "0.003", "0.01", "0.03"),
        "neighbors": ("16", "64", "256"),
        "epochs": ("1", "3", "6", "12"),
    },
    "rmc:scope=all": {
        "learning_rate": ("0.0003", "0.001", "0.003", "0.01"),
        "neighbors": ("16", "64", "256"),
        "epochs": ("1", "3", "6"),
    },
}
"""What is searched, in this order, one axis after the other from the best so far, twice around."""

GATES = ("0.0", "0.05", "0.1", "0.3")
"""Searched too, but only against adaptive attacks: static ones show what a gate costs and nothing of what it is for."""


@dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """``start`` names scope and solver and whatever shall stay fixed; ``images`` training images are kept out.

    ``against`` ``static``: their stored attacked copies. ``adaptive``: besides, PGD through each candidate's own
    surrogate, the worst of both an image; slower, and the only kind that shows an adaptation doing harm. ``abstain``
    the share of clean images that may be turned away, where the answer shall be able to abstain.
    """

    start: str = "rmc"
    images: int = 200
    against: Literal["static", "adaptive"] = "static"
    attack: str = "pgd10"
    epsilon: Epsilon = Epsilon(8)
    abstain: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if len(split_stages(self.start)) > 1 or self.family not in AXES:
            raise OptionError(f"{self.start!r} cannot be tuned; allowed: {', '.join(AXES)}, and options beside them")
        if not 0 <= self.abstain < 1:
            raise OptionError(f"a clean rejection rate of {self.abstain} is out of range; allowed: 0 to below 1")
        if self.images < 10:
            raise OptionError(f"{self.images} images are too few to tune on; allowed: 10 and more")

    @property
    def family(self) -> str:
        """Scope and solver alone."""
        name, options = split_text(self.start)
        if name == "rmc" and options.get("preset", "tuned") != "tuned":
            options = {**preset_options(options["preset"], options.get("scope", "head")), **options}
        kept = [f"{key}={options[key]}" for key in ("scope", "solver") if key in options]
        kept = [part for part in kept if part not in ("scope=head", "solver=ridge")]
        return name + (":" + ",".join(kept) if kept else "")


@dataclass(frozen=True, kw_only=True)
class _HeldOut:
    """Queries: uint8 ``clean`` ``[N, C, H, W]``, their attacked ``copies``, ``labels`` ``[N]``; and who may be a
    neighbour.
    """

    resources: Resources
    clean: Pixels
    copies: tuple[Pixels, ...]
    labels: Labels


def tune(
    resources: Resources,
    plan: TuningPlan,
    *,
    bundle: str,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Tuning:
    """Searches the axes of ``plan.family``. ``bundle`` is the digest. Raises OptionError where there is nothing to tune
    on.
    """
    held_out = _hold_out(resources, plan)
    tried: dict[str, Trial] = {}
    axes = {**AXES[plan.family], **({"gate": GATES} if plan.against == "adaptive" else {})}
    rounds, total = 2, 2 * sum(map(len, axes.values()))

    def trial(text: str) -> Trial:
        defence = build_defence(text, held_out.resources)
        if defence.name not in tried:
            tried[defence.name] = _measure(defence, held_out, plan)
        return tried[defence.name]

    best, done = trial(plan.start if ":" in plan.start else f"{plan.start}:preset=balanced"), 0
    for _ in range(rounds):
        for key, values in axes.items():
            for value in values:
                best = _better(trial(_with(best.defense, key, value)), best)
                done += 1
                progress("tune", done, total)
    chosen = best.defense
    if plan.abstain:
        chosen = _with(chosen, "abstain", f"{_threshold(best.defense, held_out, plan.abstain):.6g}")
    base = _measure(build_defence("none", held_out.resources), held_out, plan)
    return Tuning(
        bundle=bundle, defense=chosen, against=plan.against, seed=plan.seed, base=base, trials=tuple(tried.values())
    )


def _better(candidate: Trial, best: Trial) -> Trial:
    """The more accurate one; of equals the cheaper."""
    if (candidate.score, -candidate.milliseconds) > (best.score, -best.milliseconds):
        return candidate
    return best


def _with(text: str, key: str, value: str) -> str:
    name, options = split_text(text)
    return name + ":" + ",".join(f"{k}={v}" for k, v in {**options, key: value}.items())


def _hold_out(resources: Resources, plan: TuningPlan) -> _HeldOut:
    layout = resources.exemplars.layout
    if layout.sources < 2 * plan.images:
        raise OptionError(
            f"the bundle has {layout.sources} training images; keeping {plan.images} out leaves too few: ask for fewer"
        )
    if len(layout.copies) < 2:
        raise OptionError("the bundle holds no attacked copies, so there is nothing to tune against")
    chosen = torch.randperm(layout.sources, generator=torch.Generator().manual_seed(plan.seed))[: plan.images]
    kept = torch.ones(layout.sources, dtype=torch.bool)
    kept[chosen] = False
    pixels = [resources.exemplars.pixels(copy * layout.sources + chosen) for copy in range(len(layout.copies))]
    return _HeldOut(
        resources=replace(resources, index=resources.index.only(kept.repeat(len(layout.copies))), tuning=None),
        clean=pixels[0],
        copies=tuple(pixels[1:]),
        labels=resources.exemplars.gather_labels(chosen, torch.device("cpu")),
    )


def _measure(defence: Defence, held_out: _HeldOut, plan: TuningPlan) -> Trial:
    started = time.perf_counter()
    clean = _right(defence, held_out.clean, held_out.labels)
    milliseconds = 1000 * (time.perf_counter() - started) / len(held_out.labels)
    static = [_right(defence, copy, held_out.labels) for copy in held_out.copies]
    if plan.against == "adaptive":
        adaptive = _right(defence, _attack(defence, held_out, plan), held_out.labels)
        attacked = torch.stack([*static, adaptive]).all(0)
    else:
        attacked = torch.cat(static)
    return Trial(
        defense=defence.name,
        images=len(clean),
        clean=int(clean.sum()),
        attacked_images=len(attacked),
        attacked=int(attacked.sum()),
        milliseconds=milliseconds,
    )


def _right(defence: Defence, pixels: Pixels, labels: Labels) -> torch.Tensor:
    """bool ``[N]``: classified correctly, and not turned away."""
    right = []
    for batch, wanted in zip(pixels.split(_BATCH), labels.split(_BATCH), strict=True):
        answer = defence.predict(to_images(batch), generator=torch.Generator().manual_seed(0), budget=Budget())
        kept = torch.ones(len(batch), dtype=torch.bool) if answer.abstained is None else ~answer.abstained
        right.append((answer.scores.argmax(1) == wanted) & kept)
    return torch.cat(right)


def _attack(defence: Defence, held_out: _HeldOut, plan: TuningPlan) -> Pixels:
    attack = parse_attack(plan.attack, epsilon=plan.epsilon)
    generator = torch.Generator().manual_seed(plan.seed)
    device = held_out.resources.classifier.device
    found = [
        attack.run(
            lambda images: defence.surrogate(images, generator=generator, budget=Budget()),
            pixels.to(device),
            labels.to(device),
            generator=generator,
        ).cpu()
        for pixels, labels in zip(held_out.clean.split(_BATCH), held_out.labels.split(_BATCH), strict=True)
    ]
    return torch.cat(found)


def _threshold(text: str, held_out: _HeldOut, share: float) -> float:
    """The agreement that all but ``share`` of the clean images reach; rounded down, so that the rounding of another
    batch turns no more away.
    """
    from mithridate.defenses.rmc import RMC

    defence = build_defence(text, held_out.resources)
    assert isinstance(defence, RMC)
    agreement = torch.cat([defence.agreement(to_images(batch)) for batch in held_out.clean.split(_BATCH)])
    threshold = math.floor(1e6 * float(agreement.sort().values[int(share * len(agreement))]) - 1) / 1e6
    if threshold <= 0:
        raise OptionError(
            f"{text} cannot abstain on {share:g} of the clean images: on more than that, base, neighbours and answer "
            "agree on nothing at all; ask for a larger share"
        )
    return threshold
