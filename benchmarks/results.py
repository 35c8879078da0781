"""What every measurement is filed with: where it ran, and the command that repeats it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from mithridate.evaluation.environment import environment

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def write(name: str, content: dict[str, Any]) -> Path:
    """Files a measurement under docs/results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    module = Path(sys.argv[0]).stem
    command = shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])
    path.write_text(json.dumps({"command": command, "environment": environment(), **content}, indent=1) + "\n")
    return path
