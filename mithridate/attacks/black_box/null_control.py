"""The null control: what asking often finds by luck alone."""

from __future__ import annotations

import torch

from mithridate.attacks.oracle import BlackBoxResult, Oracle
from mithridate.types import Labels, Pixels


def null_control(oracle: Oracle, pixels: Pixels, labels: Labels, *, queries: torch.Tensor) -> BlackBoxResult:
    """Sends uint8 ``pixels`` ``[N, C, H, W]`` unchanged, each as often as ``queries`` ``[N]`` says.

    A random defence that is asked a thousand times is wrong once, attacked or not: an attack's successes mean something
    as far as they exceed these. ``broken_at`` is the first wrong answer; all are asked for.
    """
    broken_at = torch.zeros(len(pixels), dtype=torch.int64)
    for number in range(1, int(queries.max()) + 1 if len(pixels) else 1):
        rows = (queries >= number).nonzero()[:, 0]
        wrong = rows[oracle.ask(rows, pixels[rows]).labels != labels[rows]]
        broken_at[wrong[broken_at[wrong] == 0]] = number
    return BlackBoxResult(pixels=pixels.clone(), queries=queries.clone(), broken_at=broken_at)
