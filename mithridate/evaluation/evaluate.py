"""An evaluation: every attack of a suite on every defence of a bundle, image by image, and what may be said of it.

The order is that of an attacker who means it. The base model is attacked first, and what that gives is tried on every
defence. Each attack on a defence starts from there. In the end everything that was made for one defence is tried on
all others: an image stands only where nothing at all that was made in the run makes it fall.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Defence, Resources, build_defence, describe_defence
from mithridate.errors import OptionError
from mithridate.evaluation.battery import Sent, Suite, Target, base_attacks, columns, names, transferred
from mithridate.evaluation.cells import CellStore
from mithridate.evaluation.effort import Effort, Pace, latency_factor, pace_of, too_weak
from mithridate.evaluation.environment import environment
from mithridate.evaluation.extras import Ground, contamination, run_extras
from mithridate.evaluation.findings import Cell, DefenceFindings, Evaluation, Extra, Gate, Repeated
from mithridate.evaluation.front import Front, epsilon_curve, query_curve, round_curve, step_curve
from mithridate.evaluation.probes import ProbeSettings
from mithridate.evaluation.repeated import Scored, is_random, score
from mithridate.evaluation.strips import draw_strips
from mithridate.evaluation.trust import Tried, run_gates
from mithridate.evaluation.verdict import rule
from mithridate.types import Epsilon, Pixels

Progress = Callable[[str, int, int], None]

ENGINE = 2
"""Goes up where attacks change: what an older engine made is not gone on with."""

_BASE = "none"
_WORST_SEED = 0x0AF
_OFTEN = 0.9
"""Of a random defence's answers to a point: where so many are wrong, no worse point is looked for."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What to evaluate: ``defenses`` as text (empty: every one that the bundle can serve for the published table)."""

    bundle: Bundle
    resources: Resources
    data: LabelledImages
    epsilon: Epsilon
    suite: Suite = "adaptive"
    defenses: Sequence[str] = ()
    effort: Effort = field(default_factory=Effort)
    seed: int = 0
    command: str = ""

    def describe(self) -> dict[str, object]:
        """What a result depends on."""
        return {
            "engine": ENGINE,
            "bundle": self.bundle.digest,
            "dataset": self.data.fingerprint(),
            "epsilon": str(self.epsilon),
            "suite": self.suite,
            "seed": self.seed,
            "effort": {
                key: value for key, value in asdict(self.effort).items() if key not in ("curve", "least_rounds")
            },
        }


def evaluate(plan: EvaluationPlan, work: Path, *, progress: Progress = lambda what, done, total: None) -> Evaluation:
    """Runs it, keeping in ``work`` what was made so far. Raises OptionError where data and bundle do not fit."""
    started = time.perf_counter()
    plan.bundle.check_fits(plan.data)
    if len(plan.data) < 1:
        raise OptionError(f"{plan.data.spec} holds no image; allowed: at least 1")
    if not plan.epsilon.levels:
        raise OptionError(f"epsilon {plan.epsilon} leaves an attack nothing to change; allowed: 1/255 to 255/255")
    # All of them before the first is attacked: one that the bundle cannot serve would else come to light hours later.
    built = [build_defence(text, plan.resources) for text in (_BASE, *(plan.defenses or names(plan.resources)))]
    defences = list({defence.name: defence for defence in built}.values())
    with closing(CellStore.open(work, plan.describe())) as store:
        run = _Run(plan=plan, store=store, progress=progress)
        fronts = []
        for number, defence in enumerate(defences):
            progress("defences", number, len(defences))
            fronts.append(run.attack(defence))
        progress("defences", len(defences), len(defences))
        found = run.judge(fronts)
        extras = run.extras(fronts)
        curves = [query_curve(fronts, run.clean), round_curve(fronts)]
        if plan.effort.curve:
            curves = [
                epsilon_curve(fronts, plan.effort.curve, progress),
                step_curve(fronts, plan.effort.curve, progress),
                *curves,
            ]
    bundle, manifest = plan.bundle, plan.bundle.manifest
    return Evaluation(
        command=plan.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
        environment={key: str(value) for key, value in environment().items()},
        bundle={
            "name": manifest.name,
            "digest": bundle.digest,
            "arch": plan.resources.classifier.spec.arch,
            "exemplars": str(len(plan.resources.exemplars)),
        },
        dataset={"spec": plan.data.spec, "fingerprint": plan.data.fingerprint()},
        classes=tuple(plan.data.classes),
        images=len(plan.data),
        labels=tuple(plan.data.labels.tolist()),
        epsilon=str(plan.epsilon),
        seed=plan.seed,
        suite=plan.suite,
        effort=plan.effort.in_numbers(),
        defences=tuple(found),
        curves=tuple(curve for curve in curves if curve is not None),
        strips=draw_strips(fronts, found, plan.data.classes),
        extras=extras,
        notes=tuple(note for front in fronts for note in front.notes),
    )


@dataclass
class _Run:
    plan: EvaluationPlan
    store: CellStore
    progress: Progress
    on_base: list[Sent] = field(default_factory=list)
    worst: dict[str, Pixels] = field(default_factory=dict)
    clean: dict[str, Scored] = field(default_factory=dict)

    def attack(self, defence: Defence) -> Front:
        """All of the suite's, each as hard as the pace of ``defence`` allows."""
        plan = self.plan
        pixels, labels = torch.from_numpy(plan.data.images), torch.from_numpy(plan.data.labels)
        target = Target(
            defence=defence,
            random=is_random(defence, pixels, seed=plan.seed),
            pixels=pixels,
            labels=labels,
            epsilon=plan.epsilon,
            effort=plan.effort,
            seed=plan.seed,
        )
        sent = []
        if not self.on_base:
            made = base_attacks(target, plan.suite)
            self.on_base = [self.store.get("on the base model", name, make) for name, make in made]
            sent = list(self.on_base)
        first = self.store.get(defence.name, "transfer", lambda: transferred(target, self.on_base))
        if defence.name != _BASE:
            sent.append(first)
        pace = Pace(**self.store.remember(defence.name, lambda: asdict(pace_of(defence, pixels, seed=plan.seed))))
        standing = len(pixels) if first.stood is None else int(first.stood[-1].sum())
        effort, reduced = pace.fit(plan.effort, standing, asked=len(pixels), adapts=target.simulation.holds)
        target = replace(target, effort=effort)
        todo = columns(target, plan.suite)
        for number, column in enumerate(todo):
            self.progress(defence.name, number, len(todo))
            if column.same_as is not None:
                known = next(one for one in sent if one.attack == column.same_as)
                config = f"nothing adapts: no other than {column.same_as}"
                sent.append(replace(known, attack=column.name, config=config, seconds=0.0))
                continue
            sent.append(self.store.get(defence.name, column.name, partial(column.run, target, [first.pixels])))
        self.progress(defence.name, len(todo), len(todo))
        return Front(
            target=target, pace=pace, sent=tuple(sent), notes=tuple(f"{defence.name}: {note}" for note in reduced)
        )

    def judge(self, fronts: Sequence[Front]) -> list[DefenceFindings]:
        """Scores with fresh randomness, the worst case, gates and ruling of each; the base model comes first."""
        found: list[DefenceFindings] = []
        for number, front in enumerate(fronts):
            self.progress("judging", number, len(fronts))
            others = [sent for other in fronts if other is not front for sent in other.sent]
            found.append(self._judge(front, others, found[0] if found else None, fronts[0]))
        self.progress("judging", len(fronts), len(fronts))
        return found

    def extras(self, fronts: Sequence[Front]) -> tuple[Extra, ...]:
        """What is asked beside the matrix, of defences that were judged; whether one client's images reach another's
        answers always, but where nothing knows the defence."""
        if self.plan.suite == "standard":
            return ()
        grounds = [Ground(front=front, worst=self.worst[front.name]) for front in fronts]
        if self.plan.suite == "adaptive":
            return (contamination(grounds, self.store, self.progress, slow=False),)
        return run_extras(grounds, self.plan.bundle, self.store, progress=self.progress)

    def _judge(
        self, front: Front, others: Sequence[Sent], base: DefenceFindings | None, base_front: Front
    ) -> DefenceFindings:
        target, plan = front.target, self.plan
        clean = self.clean[front.name] = self._score(target, target.pixels)
        scores = [self._score(target, sent.pixels) for sent in front.sent]
        worst, worst_repeated = self._worst(front, clean, scores, others)
        random = target.random
        cells = [
            Cell(
                attack=sent.attack,
                kind=sent.kind,
                config=sent.config,
                right=scored.right,
                seconds=sent.seconds,
                steps=sent.steps,
                queries=None if sent.spent is None else float(sent.spent.double().median()),
                repeated=scored.repeated if random else None,
                **_each(sent, target.pixels),
            )
            for sent, scored in zip(front.sent, scores, strict=True)
        ]
        gates = self._gates(front, cells, base_front)
        verdict = rule(
            front.name,
            clean=clean.right,
            worst=worst,
            base_clean=clean.right if base is None else base.clean,
            base_worst=worst if base is None else base.worst,
            gates=gates,
            seed=plan.seed,
            base_gates=() if base is None else base.gates,
            weak=(
                *too_weak(target.effort, plan.suite),
                *(front.notes if plan.effort.exceeds(target.effort) else ()),
            ),
        )
        return DefenceFindings(
            name=front.name,
            description=describe_defence(target.defence),
            random=random,
            clean=clean.right,
            cells=tuple(cells),
            worst=worst,
            latency_factor=latency_factor(target.defence, base_front.target.defence, target.pixels, seed=plan.seed),
            gates=gates,
            clean_cost=verdict.clean_cost,
            gain=verdict.gain,
            ruling=verdict.ruling,
            reasons=verdict.reasons,
            worst_repeated=worst_repeated,
        )

    def _score(self, target: Target, pixels: Pixels, *, salt: int = 0) -> Scored:
        return score(
            target.defence,
            pixels,
            target.labels,
            repeats=target.effort.repeats,
            seed=self.plan.seed + salt,
            random=target.random,
        )

    def _worst(
        self, front: Front, clean: Scored, scores: Sequence[Scored], others: Sequence[Sent]
    ) -> tuple[tuple[bool, ...], Repeated | None]:
        """Deterministic: who stands under everything. Random: for each image the point that is misread most, asked for
        once more with seeds that had no part in the choice; one unlucky draw in many attacks is no success."""
        target = front.target
        worst, most = target.pixels.clone(), torch.tensor(clean.wrong)
        for sent, scored in zip(front.sent, scores, strict=True):
            _take(worst, most, torch.arange(len(most)), sent.pixels, torch.tensor(scored.wrong))
        # What breaks elsewhere is tried where nothing of its own does (of a random defence: nearly always). There it
        # has to be misread more often to count: of many that are tried, one is misread by luck.
        enough = _OFTEN * clean.asked if target.random else 1
        generator = torch.Generator().manual_seed(self.plan.seed + 31)
        for number, sent in enumerate(others):
            rows = (most < enough).nonzero()[:, 0]
            if not len(rows):
                break
            margins = target.simulation.margins(sent.pixels[rows], target.labels[rows], generator=generator)
            fell = rows[margins < 0]
            if len(fell):
                few = replace(target, pixels=sent.pixels[fell], labels=target.labels[fell])
                asked = self._score(few, few.pixels, salt=_WORST_SEED + 1 + number) if target.random else None
                wrong = torch.ones(len(fell), dtype=most.dtype) if asked is None else torch.tensor(asked.wrong)
                _take(worst, most, fell, few.pixels, wrong)
        self.worst[front.name] = worst
        if not target.random:
            return tuple((most == 0).tolist()), None
        last = self._score(target, worst, salt=_WORST_SEED)
        return last.right, last.repeated

    def _gates(self, front: Front, cells: Sequence[Cell], base: Front) -> tuple[Gate, ...]:
        target = front.target
        tried = [
            Tried(
                attack=cell.attack,
                kind=cell.kind,
                pixels=sent.pixels,
                right=cell.right,
                epsilon=target.epsilon,
                found=None if sent.broken_at is None else tuple((sent.broken_at > 0).tolist()),
            )
            for sent, cell in zip(front.sent, cells, strict=True)
        ]
        settings = ProbeSettings(images=target.effort.probed, asks=target.effort.repeats)
        return run_gates(
            target.defence,
            base.target.defence,
            target.pixels,
            target.labels,
            tried,
            epsilon=target.epsilon,
            seed=self.plan.seed,
            settings=settings,
            random=target.random,
            progress=lambda what, done, total: self.progress(f"{what} of {front.name}", done, total),
        )


def _each(sent: Sent, clean: Pixels) -> dict[str, Any]:
    """What the report says of each image."""
    change = (sent.pixels.int() - clean.int()).flatten(1)
    distance = change.double().div(255).square().sum(1).sqrt()
    found: dict[str, Any] = {
        "linf": tuple(change.abs().amax(1).tolist()),
        "l2": tuple(round(value, 4) for value in distance.tolist()),
    }
    if sent.spent is not None and sent.broken_at is not None:
        found |= {"asked": tuple(sent.spent.tolist()), "broken_at": tuple(sent.broken_at.tolist())}
    return found


def _take(worst: Pixels, most: torch.Tensor, rows: torch.Tensor, pixels: Pixels, wrong: torch.Tensor) -> None:
    """``pixels`` for the images ``rows``, where they are misread more often than ``most``: in place."""
    better = wrong > most[rows]
    worst[rows[better]], most[rows[better]] = pixels[better], wrong[better]
