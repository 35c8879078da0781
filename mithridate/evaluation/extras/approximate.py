"""An approximate index in the place of the exact one: how many neighbours it loses, and what that does to the defence.

What an index loses on clean images says little: an attacked image lies where exemplars are sparse, or between cells.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from mithridate.attacks.adaptive import ThroughSurrogate
from mithridate.bundle import Bundle
from mithridate.defenses.base import Prediction
from mithridate.defenses.pipeline import build_defence
from mithridate.evaluation.battery import Sent, Target
from mithridate.evaluation.cells import CellStore
from mithridate.evaluation.extras.ground import Ground, answers
from mithridate.evaluation.findings import Entry, Extra, Share
from mithridate.neighbors import NeighborIndex
from mithridate.types import Pixels

EXACT = "Flat"

_TRAINING = 39
"""Vectors a cell, or a centroid, below which FAISS calls its training too small."""

_SHARE = 16
"""One in so many cells is looked into, where it is not a single one."""

_STEPS = 20
_ASKS = 4 + 2 * _STEPS // 10
"""Answers an image and an index: clean, attacked, attacked anew, and those of the attack."""


def approximate(
    grounds: Sequence[Ground], bundle: Bundle, store: CellStore, progress: Callable[[str, int, int], None]
) -> Extra | None:
    """Each defence that asks for neighbours, on exact and approximate indices over the bundle's embeddings, which are
    held in memory only; None where no defence asks for any."""
    asking = [ground for ground in grounds if ground.sample().neighborhoods[0] is not None]
    if not asking:
        return None
    indices = _indices(bundle, asking[0].front.target.defence.resources.index)
    rows: list[tuple[Entry, ...]] = []
    for number, ground in enumerate(asking):
        progress("approximate indices", number, len(asking))
        rows += _rows(ground, indices, store)
    progress("approximate indices", len(asking), len(asking))
    recalls = ("recall, clean, %", "recall, attacked, %", "least of an image, %")
    return Extra(
        kind="index",
        title="Exact against approximate index",
        columns=("defence", "index", "images", *recalls, "clean", "attacked", "attacked anew"),
        rows=tuple(rows),
        note="Recall: of the exemplars that an answer from the exact index rests on, those that the same request finds "
        "in this one. Attacked: the points that the run found worst for the defence with the bundle's own index "
        f"({bundle.manifest.index}), which is no attack on another. Attacked anew: starting there, {_STEPS} steps "
        "through the surrogate of the defence with this very index; an image counts only where it stands under both. "
        "IVF has 4·√n cells (n exemplars; fewer where n is too small to learn as many), of which a search looks into "
        "so many: a cell may hold fewer exemplars than the defence asks for. PQ compares compressed vectors, and what "
        "it proposes is ranked by exact distances.",
    )


def factories(vectors: int, dimension: int) -> tuple[tuple[str, int], ...]:
    """FAISS factory strings for so many vectors of ``dimension`` numbers, and how many cells a search looks into: exact
    first, then a single cell, then a sixteenth of them, then compressed vectors.

    >>> factories(100_000, 64)
    (('Flat', 1), ('IVF1265,Flat', 1), ('IVF1265,Flat', 79), ('PQ16', 1))
    """
    cells = min(round(4 * math.sqrt(vectors)), vectors // _TRAINING)
    found = [(EXACT, 1)]
    if cells:
        found += [(f"IVF{cells},Flat", probes) for probes in dict.fromkeys((1, max(1, round(cells / _SHARE))))]
    if vectors >= _TRAINING * 16:
        parts = max(part for part in range(1, min(16, dimension) + 1) if dimension % part == 0)
        found.append((f"PQ{parts}" if vectors >= _TRAINING * 256 else f"PQ{parts}x4", 1))
    return tuple(found)


def _indices(bundle: Bundle, own: NeighborIndex) -> dict[str, NeighborIndex]:
    """By name, the exact one first; the bundle's own among them."""
    embeddings, metric = bundle.embeddings, bundle.manifest.metric
    found = {}
    for factory, probes in factories(*embeddings.shape):
        cells = f"{probes} cell{'s' if probes > 1 else ''}"
        index = NeighborIndex.build(embeddings, factory=factory, metric=metric, probes=probes)
        found[f"{factory}, {cells}" if "IVF" in factory else factory] = index.to(own.device)
    return {**found, bundle.manifest.index: own}


def _rows(ground: Ground, indices: Mapping[str, NeighborIndex], store: CellStore) -> list[tuple[Entry, ...]]:
    target = ground.front.target
    count = ground.affordable(_ASKS * len(indices), _STEPS * len(indices))
    rows: list[tuple[Entry, ...]] = []
    exact: list[list[Prediction]] = []
    for name, index in indices.items():
        resources = replace(target.defence.resources, index=index)
        defence = build_defence(ground.name, resources)
        mine = replace(target, defence=defence, pixels=target.pixels[:count], labels=target.labels[:count])
        what = f"index {name}" if not rows else f"index {name}, {count} images"
        anew = store.get(ground.name, what, partial(_attack, mine, ground.worst[:count])).pixels
        count = len(anew)  # what a run before this one could afford
        clean, worst, labels = (part[:count] for part in (target.pixels, ground.worst, target.labels))
        found = [answers(defence, pixels, seed=target.seed + 61) for pixels in (clean, worst, anew)]
        exact = exact or found
        recall = [_recalls(*pair) for pair in zip(exact[:2], found[:2], strict=True)]
        right = [_right(part, labels) for part in found]
        right[2] &= right[1]
        shares = (Share(right=int(stood.sum()), n=count) for stood in right)
        recalled = (100 * share for share in (*map(statistics.fmean, recall), min(recall[1])))
        rows.append((ground.name, name, count, *recalled, *shares))
    return rows


def _attack(target: Target, worst: Pixels) -> Sent:
    attack = ThroughSurrogate(epsilon=target.epsilon, steps=_STEPS, step_size=target.step_size(_STEPS))
    generator, started = torch.Generator().manual_seed(target.seed + 67), time.perf_counter()
    found = attack.run(target.simulation, target.pixels, target.labels, generator=generator, candidates=[worst])
    seconds = time.perf_counter() - started
    return Sent(
        attack="index", kind="adaptive", config=repr(attack), pixels=found.pixels, seconds=seconds, steps=_STEPS
    )


def _recalls(exact: Sequence[Prediction], found: Sequence[Prediction]) -> list[float]:
    """For each image, of the exemplars behind ``exact`` the share that is behind ``found`` too; 1 of none."""
    pairs = zip((n for e in exact for n in e.neighborhoods), (n for f in found for n in f.neighborhoods), strict=True)
    shares = []
    for wanted, got in pairs:
        ids = set() if wanted is None else set(wanted.ids.tolist())
        seen = set() if got is None else set(got.ids.tolist())
        shares.append(len(ids & seen) / len(ids) if ids else 1.0)
    return shares


def _right(found: Sequence[Prediction], labels: torch.Tensor) -> torch.Tensor:
    """Bool ``[N]``: classified rightly, and not turned away."""
    answered = torch.cat([answer.scores.cpu().argmax(1) for answer in found])
    kept = [
        torch.ones(len(answer.scores), dtype=torch.bool) if answer.abstained is None else ~answer.abstained.cpu()
        for answer in found
    ]
    return (answered == labels.cpu()) & torch.cat(kept)
