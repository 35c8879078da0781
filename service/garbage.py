"""What the garbage collector need not look at."""

from __future__ import annotations

import gc


def set_aside() -> None:
    """Takes all that is there out of later collections. Call it when what stays has been loaded, and again when it has
    been replaced: what is set aside and no longer needed would never be freed.

    The libraries are half a million objects, and a full collection over them stops everything for a tenth of a second.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def take_back() -> None:
    """Undoes it. Call it before the interpreter ends, which frees what it can reach."""
    gc.unfreeze()
