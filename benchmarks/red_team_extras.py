"""What a full evaluation asks beside the matrix, alone: unseen attacks, cost, contamination, approximate index.

    python -m benchmarks.red_team_extras BUNDLE DATASET [--epsilon 8/255] [--images 100] [--defense rmc ...]
        [--work DIR] [--name NAME]

Hostile images are those of the base model's attacks, of what transfers best, of the gradient through each defence's own
surrogate and of the hijack; the worst points are the last of these, each of which starts from the one before. With
``--work`` what was made is kept there, and an interrupted run goes on.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import results
from cli.options import load_data, use_threads
from cli.output import print_table, progress
from mithridate.bundle import Bundle
from mithridate.defenses import Resources, build_defence
from mithridate.evaluation.battery import Sent, Target, base_attacks, columns, transferred
from mithridate.evaluation.cells import CellStore
from mithridate.evaluation.effort import Effort, pace_of
from mithridate.evaluation.extras import Ground, run_extras
from mithridate.evaluation.front import Front
from mithridate.evaluation.repeated import is_random
from mithridate.evaluation.wording import entry_text
from mithridate.types import Epsilon

_ATTACKS = ("white-box", "hijack")


def main(
    bundle: Path,
    dataset: str,
    epsilon: str = "8/255",
    images: int = 100,
    defense: Annotated[list[str] | None, typer.Option()] = None,
    steps: int = 40,
    minutes: float = 20.0,
    work: Path | None = None,
    name: str = "red-team-extras",
    seed: int = 0,
    threads: int | None = None,
) -> None:
    use_threads(threads)
    opened = Bundle.open(bundle)
    resources = Resources.load(opened)
    data = load_data(dataset, data_root=None, download=False, image_size=None, split="test")
    pixels, labels = torch.from_numpy(data.images)[:images], torch.from_numpy(data.labels)[:images]
    effort = Effort(steps=steps, probed=images, seconds=60 * minutes)
    plan = {"bundle": opened.digest, "dataset": data.spec, "images": len(labels), "epsilon": epsilon, "steps": steps}
    plan |= {"seed": seed}
    with tempfile.TemporaryDirectory() as scratch, progress() as report:
        store = CellStore.open(work or Path(scratch), plan)
        grounds: list[Ground] = []
        for text in dict.fromkeys(["none", *(defense or ["rmc"])]):
            defence = build_defence(text, resources)
            target = Target(
                defence=defence,
                random=is_random(defence, pixels, seed=seed),
                pixels=pixels,
                labels=labels,
                epsilon=Epsilon.parse(epsilon),
                effort=effort,
                seed=seed,
            )
            grounds.append(_attacked(target, grounds[0].front.sent if grounds else (), store))
        found = run_extras(grounds, opened, store, progress=report)
    results.write(name, {**plan, "extras": [asdict(extra) for extra in found]})
    for extra in found:
        rows = [[entry_text(entry) for entry in row] for row in extra.rows]
        print_table(extra.title + (f"; FAILED: {', '.join(extra.failed)}" if extra.failed else ""), extra.columns, rows)


def _attacked(target: Target, on_base: tuple[Sent, ...], store: CellStore) -> Ground:
    name, sent = target.defence.name, []
    if not on_base:
        sent = [store.get("on the base model", made, make) for made, make in base_attacks(target, "standard")]
        on_base = tuple(sent)
    last = store.get(name, "transfer", partial(transferred, target, on_base))
    sent += [last] if name != "none" else []
    for column in columns(target, "adaptive"):
        if column.name in _ATTACKS:
            last = store.get(name, column.name, partial(column.run, target, [last.pixels]))
            sent.append(last)
    pace = pace_of(target.defence, target.pixels, seed=target.seed)
    return Ground(front=Front(target=target, pace=pace, sent=tuple(sent), notes=()), worst=last.pixels)


if __name__ == "__main__":
    typer.run(main)
