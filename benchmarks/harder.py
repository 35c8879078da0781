"""Whether what a finished evaluation says of a defence holds against more of the same: what stood is attacked again.

    python -m benchmarks.harder BUNDLE DATASET OUT --defense DEFENCE [--rounds 10] [--steps 40] [--queries 1000]

OUT is what ``mithridate evaluate`` wrote. Only the images that the defence was left with in its worst case are
attacked, and the base model is not attacked again: what is left of a difference after this is a bound from below. A
random defence is asked 20 times about what was found, and an image has fallen where most answers are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import results
from cli.options import load_data, use_threads
from cli.output import print_table
from mithridate.bundle import Bundle
from mithridate.defenses import Resources, build_defence
from mithridate.evaluation.battery import Target, columns
from mithridate.evaluation.effort import Effort
from mithridate.evaluation.paired import compare
from mithridate.evaluation.reader import read_evaluation
from mithridate.evaluation.repeated import is_random, score
from mithridate.evaluation.verdict import describe
from mithridate.types import Epsilon

_DRAWS = 20


def main(
    bundle: Path,
    dataset: str,
    out: Path,
    defense: Annotated[str, typer.Option()],
    attack: Annotated[list[str] | None, typer.Option()] = None,
    rounds: int = 10,
    steps: int = 40,
    queries: int = 1000,
    seed: int = 1,
    threads: int | None = None,
    name: str = "harder",
) -> None:
    use_threads(threads)
    before, opened = read_evaluation(out / "evaluation.json"), Bundle.open(bundle)
    data = load_data(dataset, data_root=None, download=False, image_size=None, split="test")
    if (before.bundle["digest"], before.dataset["fingerprint"]) != (opened.digest, data.fingerprint()):
        raise typer.BadParameter(f"{out} is about another bundle or other data")
    resources = Resources.load(opened)
    resources.classifier.quicken()
    defence = build_defence(defense, resources)
    found = next(one for one in before.defences if one.name == defence.name)
    standing = torch.tensor(found.worst).nonzero()[:, 0]
    target = Target(
        defence=defence,
        random=is_random(defence, torch.from_numpy(data.images), seed=seed),
        pixels=torch.from_numpy(data.images)[standing],
        labels=torch.from_numpy(data.labels)[standing],
        epsilon=Epsilon.parse(before.epsilon),
        effort=Effort(rounds=rounds, steps=steps, queries=queries),
        seed=seed,
    )
    rows: list[dict[str, Any]] = []
    stands = torch.ones(len(standing), dtype=torch.bool)
    offered = [column for column in columns(target, "adaptive") if column.same_as is None]
    chosen = [column for column in offered if not attack or column.name in attack]
    if not chosen:
        raise typer.BadParameter(f"--attack {attack}; allowed: {', '.join(column.name for column in offered)}")
    for column in chosen:
        sent = column.run(target, [])
        scored = score(defence, sent.pixels, target.labels, repeats=_DRAWS, seed=seed, random=target.random)
        fell = 2 * torch.tensor(scored.wrong) > scored.asked
        stands &= ~fell
        row = {"attack": column.name, "fell": int(fell.sum()), "left": int(stands.sum())}
        rows.append({**row, "config": sent.config, "minutes": round(sent.seconds / 60, 1)})
        print(f"{column.name}: {row['fell']} fell, {row['left']} of {len(stands)} are left", flush=True)
        worst = _without(found.worst, standing[~stands].tolist())
        paired = compare(worst, before.base.worst, seed=seed)
        results.write(
            name,
            {
                "bundle": opened.digest,
                "dataset": data.spec,
                "defense": defence.name,
                "images": before.images,
                "stood": len(standing),
                "effort": target.effort.in_numbers(),
                "attacks": rows,
                "harder": {"worst": sum(worst), "base": sum(before.base.worst), **asdict(paired)},
            },
        )
    print_table(
        f"{defence.name}: {len(standing)} images stood, {sum(worst)} still do; the base, not attacked again, stood on "
        f"{sum(before.base.worst)}",
        ["attack", "fell", "left"],
        [[row["attack"], str(row["fell"]), str(row["left"])] for row in rows],
    )
    print(describe(paired))


def _without(worst: Sequence[bool], fell: Sequence[int]) -> list[bool]:
    gone = set(fell)
    return [stood and row not in gone for row, stood in enumerate(worst)]


if __name__ == "__main__":
    typer.run(main)
