"""What SAP must not lose of its speed. Each bound is far from what is measured (docs/results), for a busy machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Resources, build_defence
from mithridate.defenses.pruning import prune
from mithridate.types import to_images


def ratio(first: Callable[[], object], second: Callable[[], object], repeats: int = 7) -> float:
    """Of the medians of both, measured in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for work, taken in zip((first, second), times, strict=True):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
    mine, other = (sorted(taken)[repeats // 2] for taken in times)
    return mine / other


def test_binomial_sampling_takes_a_fraction_of_multinomial() -> None:
    """A seventh, measured; a fifth, promised."""
    layer = torch.randn(4, 65_536, generator=torch.Generator().manual_seed(0)).relu()
    generators = [torch.Generator().manual_seed(row) for row in range(4)]
    found = ratio(
        lambda: prune(layer, fraction=1, sampling="binomial", generators=generators),
        lambda: prune(layer, fraction=1, sampling="multinomial", generators=generators),
    )
    assert found < 0.4


def test_passes_together_are_cheaper_than_one_call_each(resources: Resources, digits_test: LabelledImages) -> None:
    images = to_images(torch.from_numpy(digits_test.images[:1]))
    many, one = (build_defence(f"sap:passes={passes},sampling=binomial", resources) for passes in (50, 1))

    def ask(calls: int) -> None:
        for _ in range(calls):
            (many if calls == 1 else one).predict(images, generator=torch.Generator().manual_seed(0), budget=Budget())

    assert ratio(lambda: ask(1), lambda: ask(50)) < 0.7
