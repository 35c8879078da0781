"""All of the extra questions, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mithridate.bundle import Bundle
from mithridate.evaluation.cells import CellStore
from mithridate.evaluation.extras.approximate import approximate
from mithridate.evaluation.extras.contamination import contamination
from mithridate.evaluation.extras.cost import cost
from mithridate.evaluation.extras.ground import Ground
from mithridate.evaluation.extras.unseen import unseen
from mithridate.evaluation.findings import Extra


def run_extras(
    grounds: Sequence[Ground],
    bundle: Bundle,
    store: CellStore,
    *,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Extra, ...]:
    """Of every defence of a run, the base model first. ``store`` keeps what takes long."""
    found = list(unseen(grounds, bundle.manifest.copies, store, progress))
    found += [extra for extra in (cost(grounds, store, progress), contamination(grounds, store, progress)) if extra]
    searched = approximate(grounds, bundle, store, progress)
    return (*found, searched) if searched else tuple(found)
