"""What every measurement is filed with: where it ran, and the command that repeats it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mithridate.evaluation import wilson_interval
from mithridate.evaluation.environment import environment

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def accuracy(right: np.ndarray) -> dict[str, Any]:
    """How many of a bool ``[N]``, with the 95 % interval."""
    correct, count = int(right.sum()), len(right)
    return {"correct": correct, "accuracy": correct / count, "interval": list(wilson_interval(correct, count))}


def write(name: str, content: dict[str, Any]) -> Path:
    """Files a measurement under docs/results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    module = Path(sys.argv[0]).stem
    command = shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])
    path.write_text(json.dumps({"command": command, "environment": environment(), **content}, indent=1) + "\n")
    return path
