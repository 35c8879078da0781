"""Cost: how much longer images that keep a defence busy take than images as they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from mithridate.attacks.adaptive import CostAttack
from mithridate.defenses.base import Budget, Defence
from mithridate.evaluation.battery import Sent, Target
from mithridate.evaluation.cells import CellStore
from mithridate.evaluation.extras.ground import Ground, answers
from mithridate.evaluation.findings import Entry, Extra
from mithridate.evaluation.statistics import percentile
from mithridate.types import Pixels, to_images

_ROUNDS = 3
_STEPS, _EVERY = 40, 10
_ASKS = _STEPS // _EVERY + 1 + 2 + 2 * (_ROUNDS + 1)
"""Answers an image that all of it takes: those of the attack, two to count, the rest to time."""


def cost(grounds: Sequence[Ground], store: CellStore, progress: Callable[[str, int, int], None]) -> Extra | None:
    """Optimiser steps and latency, clean and attacked, of each defence that adapts; None where none does."""
    rows = []
    for number, ground in enumerate(grounds):
        progress("cost attack", number, len(grounds))
        if ground.sample().adaptations[0] is not None:
            rows.append(_row(ground, cost_images(ground, store)))
    progress("cost attack", len(grounds), len(grounds))
    if not rows:
        return None
    steps = ("steps clean, mean", "steps clean, p99", "steps attacked, mean", "steps attacked, p99")
    times = ("ms clean, median", "ms clean, p99", "ms attacked, median", "ms attacked, p99")
    return Extra(
        kind="cost",
        title="Cost attack: optimiser steps and latency",
        columns=("defence", "images", *steps, *times, "median attacked / clean", "p99 attacked / clean"),
        rows=tuple(rows),
        note="Images within epsilon whose neighbours are made to disagree; of the points on the way that with the most "
        "optimiser steps is kept, the clean image where none takes more. Latency: one image at a time in this process, "
        f"attacked and clean in turn, {_ROUNDS} times each; read the ratios, not the milliseconds. With fewer than a "
        "hundred measurements p99 is the largest. What a defence of fixed steps takes cannot be driven up, but it pays "
        "for all of them on every image.",
    )


def cost_images(ground: Ground, store: CellStore) -> Pixels:
    """uint8 ``[M, C, H, W]`` for the first ``M`` images of the run, made or as ``store`` has them."""
    return store.get(ground.name, "cost", partial(_make, ground)).pixels


def _make(ground: Ground) -> Sent:
    target, count = ground.front.target, ground.affordable(_ASKS, _STEPS)
    attack = CostAttack(epsilon=target.epsilon, steps=_STEPS, every=_EVERY, step_size=target.step_size(_STEPS))
    generator, started = torch.Generator().manual_seed(target.seed + 47), time.perf_counter()
    found = attack.run(target.simulation, target.pixels[:count], generator=generator)
    seconds = time.perf_counter() - started
    return Sent(attack="cost", kind="adaptive", config=repr(attack), pixels=found.pixels, seconds=seconds, steps=_STEPS)


def _row(ground: Ground, attacked: Pixels) -> tuple[Entry, ...]:
    target = ground.front.target
    clean = target.pixels[: len(attacked)]
    counted = [_steps(target, pixels) for pixels in (clean, attacked)]
    before, after = latencies(target.defence, clean, attacked, seed=target.seed)
    middle, worst = (
        [statistics.median(times) for times in (before, after)],
        [percentile(t, 0.99) for t in (before, after)],
    )
    return (
        ground.name,
        len(attacked),
        *(entry for steps in counted for entry in (statistics.fmean(steps), int(percentile(steps, 0.99)))),
        *(1000 * entry for pair in zip(middle, worst, strict=True) for entry in pair),
        middle[1] / middle[0],
        worst[1] / worst[0],
    )


def _steps(target: Target, pixels: Pixels) -> list[int]:
    """With randomness that had no part in the attack."""
    found = answers(target.defence, pixels, seed=target.seed + 53)
    return [0 if fate is None else fate.steps for answer in found for fate in answer.adaptations]


def latencies(
    defence: Defence, clean: Pixels, attacked: Pixels, *, seed: int, rounds: int = _ROUNDS
) -> tuple[list[float], list[float]]:
    """Seconds of answers for uint8 ``clean`` and ``attacked`` ``[M, C, H, W]``, one image at a time, in turn, and each
    first as often as second. What the first round takes is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for row in range(len(clean)):
            order = (0, 1) if (row + turn) % 2 else (1, 0)
            for which in order:
                image = to_images((clean, attacked)[which][row : row + 1])
                generator = torch.Generator().manual_seed(seed + row)
                started = time.perf_counter()
                defence.predict(image, generator=generator, budget=Budget()).scores.cpu()
                if turn:
                    times[which].append(time.perf_counter() - started)
    return times
