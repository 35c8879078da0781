"""Unseen: static examples of a larger epsilon, another norm and other families than the index holds copies of.

They are made on the base model alone. A defence that repairs what looks like its exemplars is asked here whether it
repairs anything else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from mithridate.attacks import APGD, PGD
from mithridate.attacks.judging import Attack
from mithridate.attacks.white_box.carlini_wagner import CarliniWagner
from mithridate.attacks.white_box.deepfool import DeepFool
from mithridate.attacks.white_box.jsma import JSMA
from mithridate.bundle import CopyEntry
from mithridate.evaluation.battery import Sent, Target
from mithridate.evaluation.cells import CellStore
from mithridate.evaluation.extras.ground import Ground
from mithridate.evaluation.findings import Entry, Extra, Share
from mithridate.evaluation.repeated import score
from mithridate.types import Epsilon, Pixels

_FACTORS = (1.5, 2.0)
"""Of the run's epsilon."""

_L2_LEVELS = 128
"""The customary L2 radius for images of 3 x 32 x 32 numbers where the L-infinity one is 8 levels."""

_CIFAR_NUMBERS = 3 * 32 * 32
_JSMA_PAIRS, _JSMA_SHARE = 30, 0.145
"""JSMA moves no more than these: two numbers a step, and the share of the numbers that its paper allows."""

_BATCH = 64
_CLEAN = "clean"


@dataclass(frozen=True, kw_only=True)
class _Unseen:
    name: str
    attack: Attack


def unseen(
    grounds: Sequence[Ground], copies: Sequence[CopyEntry], store: CellStore, progress: Callable[[str, int, int], None]
) -> tuple[Extra, Extra]:
    """Two tables: how far the attacks went, and what each of ``grounds`` (the base model first) answers."""
    base = grounds[0].front
    count = min(len(base.target.pixels), base.target.effort.probed)
    target = replace(base.target, pixels=base.target.pixels[:count], labels=base.target.labels[:count])
    known = base.sent[0]
    sent = {f"{known.attack}, {target.epsilon}": replace(known, pixels=known.pixels[:count])}
    todo = _attacks(target)
    for number, one in enumerate(todo):
        progress("attacks that the index never saw", number, len(todo))
        sent[one.name] = store.get("on the base model", f"unseen {one.name}", partial(_make, target, one))
    progress("attacks that the index never saw", len(todo), len(todo))
    right_before = torch.tensor(score(target.defence, target.pixels, target.labels, repeats=1, seed=target.seed).right)
    made = [_change(name, one, target.pixels, right_before) for name, one in sent.items()]
    shares = []
    for number, ground in enumerate(grounds):
        progress("scoring them", number, len(grounds))
        shares.append(_shares(ground, [target.pixels, *(one.pixels for one in sent.values())], count))
    progress("scoring them", len(grounds), len(grounds))
    held = ", ".join(f"{copy.name} at {copy.epsilon}" for copy in copies if copy.epsilon) or "none"
    return (
        Extra(
            kind="unseen",
            title="Attacks that the index never saw: what was made",
            columns=("attack on the base model", "settings", "images", "pixel changes by, levels", "L2", "changed, %"),
            rows=tuple(made),
            note=f"Attacked copies in the index: {held}. The first attack is the run's own, to compare. Medians over "
            "images that the base model reads rightly when clean: the largest change of a number, the Euclidean length "
            "of the change (1: one number from black to white), and the share of numbers that change at all.",
        ),
        Extra(
            kind="unseen",
            title="Attacks that the index never saw: what stands",
            columns=("defence", _CLEAN, *sent),
            rows=tuple((ground.name, *row) for ground, row in zip(grounds, shares, strict=True)),
            note=f"The first {count} images. These are static attacks: they know the base model and nothing of the "
            "defence, so what stands here says nothing of an attacker who knows more. They go beyond the run's "
            "epsilon, and count for no worst case.",
        ),
    )


def _attacks(target: Target) -> list[_Unseen]:
    levels, steps, numbers = target.epsilon.levels, target.effort.steps, target.pixels[0].numel()
    found = []
    for radius in dict.fromkeys(Epsilon(min(255, max(levels + 1, round(levels * factor)))) for factor in _FACTORS):
        attack = PGD(epsilon=radius, steps=steps, step_size=max(1, round(2.5 * radius.levels / steps)) / 255)
        found.append(_Unseen(name=f"pgd{steps}, {radius}", attack=attack))
    length = Epsilon(min(255, max(1, round(_L2_LEVELS * levels / 8 * math.sqrt(numbers / _CIFAR_NUMBERS)))))
    found.append(_Unseen(name=f"apgd-ce, L2 {length}", attack=APGD(epsilon=length, steps=2 * steps, norm="l2")))
    found.append(_Unseen(name="deepfool", attack=DeepFool()))
    found.append(_Unseen(name="carlini-wagner", attack=CarliniWagner(steps=50, searches=5, initial_c=0.1)))
    gamma = min(_JSMA_SHARE, (2 * _JSMA_PAIRS + 0.5) / numbers)
    found.append(_Unseen(name="jsma", attack=JSMA(gamma=gamma)))
    return found


def _make(target: Target, one: _Unseen) -> Sent:
    generator, started = torch.Generator().manual_seed(target.seed + 43), time.perf_counter()
    classifier = target.defence.resources.classifier
    parts = zip(target.pixels.split(_BATCH), target.labels.split(_BATCH), strict=True)
    pixels = torch.cat([one.attack.run(classifier, few, truth, generator=generator) for few, truth in parts])
    seconds = time.perf_counter() - started
    return Sent(attack=one.name, kind="transfer", config=repr(one.attack), pixels=pixels, seconds=seconds)


def _change(name: str, sent: Sent, pixels: Pixels, right_before: torch.Tensor) -> tuple[Entry, ...]:
    moved = (sent.pixels[right_before].double() - pixels[right_before].double()).flatten(1)
    if not len(moved):
        return (name, sent.config, 0, None, None, None)
    return (
        name,
        sent.config,
        len(moved),
        float(moved.abs().amax(1).median()),
        float((moved / 255).norm(dim=1).median()),
        float(100 * (moved != 0).double().mean(1).median()),
    )


def _shares(ground: Ground, points: Sequence[Pixels], count: int) -> tuple[Share, ...]:
    target = ground.front.target
    scored = [
        score(target.defence, one, target.labels[:count], repeats=1, seed=target.seed, random=target.random)
        for one in points
    ]
    return tuple(Share(right=sum(found.right), n=count) for found in scored)
