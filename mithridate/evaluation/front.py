"""A defence with everything that was made for it, and the curves that can be drawn of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mithridate.attacks.adaptive import ThroughSurrogate
from mithridate.attacks.adaptive.simulation import Simulation
from mithridate.evaluation.battery import Sent, Target
from mithridate.evaluation.effort import Pace
from mithridate.evaluation.findings import Curve, Point, Share
from mithridate.evaluation.query_curves import standing_after
from mithridate.evaluation.repeated import Scored, score
from mithridate.types import Epsilon, Pixels

_LADDER = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
_CURVE_STEPS = 20
_MOST_STEPS, _LOOKED_EVERY = 100, 5


@dataclass(frozen=True, kw_only=True)
class Front:
    """``sent`` in the order of the report; ``notes`` on what was made smaller for this defence."""

    target: Target
    pace: Pace
    sent: tuple[Sent, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.target.defence.name


def epsilon_curve(fronts: Sequence[Front], images: int, progress: Callable[[str, int, int], None]) -> Curve:
    """Accuracy of every defence on its first ``images`` against the radius: a gradient attack through its own surrogate
    at each, and a larger radius takes along what a smaller one found."""
    series: dict[str, tuple[Point, ...]] = {}
    for number, front in enumerate(fronts):
        progress("curve", number, len(fronts))
        target, chosen = front.target, front.target.epsilon.levels
        levels = sorted(
            {0, max(1, chosen // 4), max(1, chosen // 2), chosen, min(255, 2 * chosen), min(255, 4 * chosen)}
        )
        pixels, labels = target.pixels[:images], target.labels[:images]
        points: list[Point] = []
        carried: list[Pixels] = []
        for level in levels:
            found = pixels
            if level:
                radius = Epsilon(level)
                size = max(1, round(2.5 * level / _CURVE_STEPS)) / 255
                attack = ThroughSurrogate(epsilon=radius, steps=_CURVE_STEPS, step_size=size)
                generator = torch.Generator().manual_seed(target.seed + level)
                simulation = Simulation(defence=target.defence, checks=target.simulation.checks)
                found = attack.run(simulation, pixels, labels, generator=generator, candidates=carried).pixels
                carried = [found]
            scored = score(target.defence, found, labels, repeats=1, seed=target.seed + level, random=target.random)
            points.append(Point.of(level, Share(right=sum(scored.right), n=len(labels))))
        series[front.name] = tuple(points)
    progress("curve", len(fronts), len(fronts))
    return Curve(
        kind="epsilon",
        title=f"Accuracy against epsilon, {_CURVE_STEPS} steps through each surrogate",
        x_label="epsilon, in levels of 255",
        y_label="accuracy",
        log_x=False,
        series=series,
    )


def step_curve(fronts: Sequence[Front], images: int, progress: Callable[[str, int, int], None]) -> Curve:
    """Images, of the first ``images``, that still stand after each few steps of one gradient attack through each
    defence's own surrogate, from a random start; the defence itself is asked, in the simulation."""
    series: dict[str, tuple[Point, ...]] = {}
    for number, front in enumerate(fronts):
        progress("curve of steps", number, len(fronts))
        target = front.target
        attack = ThroughSurrogate(
            epsilon=target.epsilon, steps=_MOST_STEPS, every=_LOOKED_EVERY, step_size=target.step_size(_MOST_STEPS)
        )
        generator = torch.Generator().manual_seed(target.seed)
        simulation = Simulation(defence=target.defence, checks=target.simulation.checks)
        stood = attack.run(simulation, target.pixels[:images], target.labels[:images], generator=generator).stood
        series[front.name] = tuple(
            Point.of(_LOOKED_EVERY * look, Share(right=int(standing.sum()), n=len(standing)))
            for look, standing in enumerate(stood)
        )
    progress("curve of steps", len(fronts), len(fronts))
    curve = _curve("steps", "Accuracy against the steps of one attack through each surrogate", "steps", series)
    assert curve is not None
    return curve


def query_curve(fronts: Sequence[Front], clean: Mapping[str, Scored]) -> Curve | None:
    """Accuracy against the queries of the black-box attacks, as they saw it; None where none was run. Of a random
    defence that is its first unlucky answer, so there is the null control beside it: of the ``clean`` images asked for
    as often, how many are never misread."""
    series: dict[str, tuple[Point, ...]] = {}
    for front in fronts:
        for sent in front.sent:
            if sent.kind != "black-box" or sent.broken_at is None or sent.spent is None:
                continue
            most = int(sent.spent.max()) if len(sent.spent) else 1
            steps = sorted({*(step for step in _LADDER if step < most), most})
            points = (Point.of(step, standing_after(sent.broken_at, step)) for step in steps)
            series[_line(front.name, sent.attack, fronts)] = tuple(points)
            if front.target.random:
                series[f"{front.name}, clean asked as often"] = tuple(
                    Point.of(step, _never_misread(clean[front.name], step)) for step in steps
                )
    return _curve("queries", "Accuracy against queries", "queries an image", series, log_x=True)


def round_curve(fronts: Sequence[Front]) -> Curve | None:
    """Images that still stood after each round of GMSA-MIN, in the simulation; None where it was not run. The first
    point is the transfer attack, from which it starts."""
    series = {
        front.name: tuple(
            Point.of(number, Share(right=int(stood.sum()), n=len(stood))) for number, stood in enumerate(sent.stood)
        )
        for front in fronts
        for sent in front.sent
        if sent.attack == "gmsa-min" and sent.stood is not None and front.target.simulation.holds
    }
    return _curve("rounds", "Accuracy against the rounds of GMSA-MIN", "rounds", series)


def _never_misread(clean: Scored, times: int) -> Share:
    n = len(clean.wrong)
    return Share(right=round(n * clean.unbroken_after(times)), n=n)


def _line(defense: str, attack: str, fronts: Sequence[Front]) -> str:
    several = len({sent.attack for front in fronts for sent in front.sent if sent.kind == "black-box"}) > 1
    return f"{defense}, {attack}" if several else defense


def _curve(
    kind: str, title: str, x_label: str, series: dict[str, tuple[Point, ...]], *, log_x: bool = False
) -> Curve | None:
    if not series:
        return None
    return Curve(kind=kind, title=title, x_label=x_label, y_label="accuracy", log_x=log_x, series=series)
