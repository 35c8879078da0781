"""Files what `mithridate evaluate` found: the numbers of its report, without the pictures.

    python -m benchmarks.evaluation OUT --name evaluation-standard

``OUT`` is the folder that `mithridate evaluate` wrote; its own command, which repeats the measurement, is filed.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.results import RESULTS
from mithridate.evaluation.findings import DefenceFindings, Evaluation, Paired, Share
from mithridate.evaluation.reader import read_evaluation


def main(out: Path, name: Annotated[str, typer.Option()]) -> None:
    found = read_evaluation(out / "evaluation.json")
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(_summary(found), indent=1) + "\n")
    print(path.name)


def _summary(found: Evaluation) -> dict[str, Any]:
    return {
        "command": found.command,
        "environment": found.environment,
        "bundle": found.bundle,
        "evaluation": {
            "dataset": found.dataset["spec"],
            "images": found.images,
            "epsilon": found.epsilon,
            "suite": found.suite,
            "seed": found.seed,
            "effort": found.effort or None,
            "minutes": round(found.seconds / 60, 1),
            "notes": found.notes,
            "defences": [_row(one) for one in found.defences],
            "curves": [asdict(curve) for curve in found.curves],
        },
    }


def _row(one: DefenceFindings) -> dict[str, Any]:
    cells = {
        cell.attack: {
            **_share(cell.right),
            "kind": cell.kind,
            "steps": cell.steps,
            "queries": cell.queries,
            "seconds": round(cell.seconds, 1),
            "repeated": None if cell.repeated is None else asdict(cell.repeated),
            "config": cell.config,
        }
        for cell in one.cells
    }
    return {
        "defense": one.name,
        "random": one.random,
        "clean": _share(one.clean),
        "attacks": cells,
        "worst case": _share(one.worst),
        "worst_repeated": None if one.worst_repeated is None else asdict(one.worst_repeated),
        "latency_factor": round(one.latency_factor, 2),
        "gain": _paired(one.gain),
        "clean_cost": _paired(one.clean_cost),
        "gates_failed": [gate.id for gate in one.gates if gate.passed is False],
        "gates": [asdict(gate) for gate in one.gates],
        "ruling": one.ruling,
        "reasons": one.reasons,
    }


def _share(right: tuple[bool, ...]) -> dict[str, Any]:
    counted = Share(right=sum(right), n=len(right))
    return {"correct": counted.right, "accuracy": counted.value, "interval": list(counted.interval), "n": counted.n}


def _paired(paired: Paired | None) -> dict[str, Any] | None:
    return None if paired is None else asdict(paired)


if __name__ == "__main__":
    typer.run(main)
