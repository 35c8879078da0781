"""Where torch and FAISS compute, and on how many threads."""

from __future__ import annotations

import os

import torch

from mithridate.errors import OptionError
from mithridate.memory import keep_freed_memory
from mithridate.neighbors import set_search_threads


def resolve_device(name: str) -> torch.device:
    """The device called ``name``. Raises OptionError where it cannot be used here."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not a kind that is supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"device {name!r} cannot be used here ({reason}); allowed: cpu, or cuda with a GPU"
        ) from error
    return device


def use_threads(count: int | None) -> None:
    """Sets torch and FAISS to ``count`` threads, or as many as this process has cores."""
    keep_freed_memory()
    count = count or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    set_search_threads(count)
