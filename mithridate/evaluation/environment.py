"""Where a measurement ran: filed with its numbers, since speed depends on it and rounding may."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import mithridate


def environment() -> dict[str, Any]:
    """Versions and size of the machine; no names."""
    return {
        "mithridate": mithridate.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
