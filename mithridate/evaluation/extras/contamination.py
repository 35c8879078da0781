"""Contamination: whether images of one client change what another is answered. They must not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mithridate.attacks.adaptive import contaminate
from mithridate.evaluation.cells import CellStore
from mithridate.evaluation.extras.cost import cost_images
from mithridate.evaluation.extras.ground import Ground
from mithridate.evaluation.findings import Entry, Extra

_VICTIMS, _HOSTILE = 8, 16
"""Of a kind, and of each set."""


def contamination(
    grounds: Sequence[Ground], store: CellStore, progress: Callable[[str, int, int], None], *, slow: bool = True
) -> Extra:
    """Victims beside and after everything that the run made for a defence, against the same victims alone. ``slow``:
    also beside images that keep it busy, which have to be made first."""
    rows, failed = [], []
    for number, ground in enumerate(grounds):
        progress("contamination", number, len(grounds))
        row, isolated = _row(ground, store, slow)
        rows.append(row)
        failed += [] if isolated else [ground.name]
    progress("contamination", len(grounds), len(grounds))
    return Extra(
        kind="contamination",
        title="One client's images against another client's answers",
        columns=(
            "defence",
            "victims",
            "hostile sets",
            "hostile images",
            "changed answers",
            "largest change of a score",
        ),
        rows=tuple(rows),
        note="Clean and attacked images are asked for alone, then in one batch with each set that an attack of this "
        "run made, then alone again, always with the same randomness of their own. No answer may change, and no score "
        "by more than 1e-4, which is what another batch size rounds.",
        failed=tuple(failed),
    )


def _row(ground: Ground, store: CellStore, slow: bool) -> tuple[tuple[Entry, ...], bool]:
    target, sets = ground.front.target, len(ground.front.sent) + 1
    asks = 2 * (sets + 2) + sets * _HOSTILE / _VICTIMS  # an image of the clean victims, with its share of all else
    count = min(_VICTIMS, ground.affordable(asks))
    victims = torch.cat([target.pixels[:count], ground.worst[:count]])
    hostile = [sent.pixels[: 2 * count] for sent in ground.front.sent]
    if slow and ground.sample().adaptations[0] is not None:
        hostile.append(cost_images(ground, store)[: 2 * count])
    found = contaminate(target.defence, victims, hostile, seed=target.seed + 59)
    return (ground.name, found.victims, len(hostile), found.hostile, found.changed, found.moved), found.failed
