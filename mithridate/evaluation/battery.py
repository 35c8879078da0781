"""Which attacks a defence has to stand, and how each is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch

from mithridate.attacks import APGD, PGD
from mithridate.attacks.adaptive import (
    FPA,
    GMSA,
    AdaptiveAttack,
    AutoThroughSurrogate,
    Found,
    Hijack,
    LockStep,
    Simulation,
    ThroughSurrogate,
)
from mithridate.attacks.adaptive.rounds import Loss, ascend, losses
from mithridate.attacks.adaptive.simulation import begin, random_start, shown
from mithridate.attacks.black_box import RandomNoise, RayS, Square
from mithridate.attacks.in_process import InProcessOracle
from mithridate.attacks.oracle import BlackBoxAttack
from mithridate.defenses.base import Defence, Resources
from mithridate.defenses.options import split_text
from mithridate.defenses.pipeline import build_defence, split_stages
from mithridate.evaluation.effort import Effort
from mithridate.evaluation.findings import AttackKind
from mithridate.types import Epsilon, Images, Labels, Pixels

Suite = Literal["standard", "adaptive", "full"]

_ROUNDS = ("gmsa-avg", "gmsa-min", "lock-step")
"""Against a defence that adapts nothing these are what FPA is: gradient steps on the one model there is."""

_LOSSES: tuple[Loss, ...] = ("margin", "ce")

_SELECTION = ("neighbors", "balanced", "adversarial", "radius")

_BATCH = 64
_ASKED = 5
"""Answers of a random defence to each of Square's points: by one it would keep what was lucky."""

_NOISE = 100
"""Random points an image."""

_CONFIDENCES = (0.5, 3.0, 10.0)
"""How far over the border the transferred examples go: a repair works on those that went far."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A defence under attack, the clean images ``pixels`` uint8 ``[N, C, H, W]`` and their classes ``[N]``."""

    defence: Defence
    random: bool
    pixels: Pixels
    labels: Labels
    epsilon: Epsilon
    effort: Effort
    seed: int
    memory: dict[bytes, float] = field(default_factory=dict, repr=False)

    def step_size(self, steps: int) -> float:
        """One level, or as many as it takes to cross the ball in ``steps`` (Madry et al.: 2.5 epsilon / steps)."""
        return max(1, round(2.5 * self.epsilon.levels / steps)) / 255

    @property
    def simulation(self) -> Simulation:
        """A fresh one, as the attacker runs it. An image is left alone once all checks misread it: with three of them
        that is one in five of those that are misread in 6 of 10, and the attack would stop at luck."""
        if self.random:
            return Simulation(defence=self.defence, checks=max(self.effort.checks, self.effort.repeats // 2))
        return Simulation(defence=self.defence, memory=self.memory)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What one attack made for one defence: uint8 ``pixels`` ``[N, C, H, W]`` within ``epsilon``.

    ``stood`` bool ``[looks, N]``: after each round; ``broken_at`` int64 ``[N]``: the query that broke an image, 0 for
    none, with ``spent`` queries each; None where an attack has no rounds or does not ask.
    """

    attack: str
    kind: AttackKind
    config: str
    pixels: Pixels
    seconds: float
    steps: int | None = None
    stood: torch.Tensor | None = None
    broken_at: torch.Tensor | None = None
    spent: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Column:
    """An attack of the matrix: ``run(target, candidates)``. ``same_as``: the attack that it is no other than, where a
    defence adapts nothing."""

    name: str
    run: Callable[[Target, Sequence[Pixels]], Sent]
    same_as: str | None = None


def columns(target: Target, suite: Suite) -> list[Column]:
    """After the transfer attack, in the order of the report."""
    effort, epsilon = target.effort, target.epsilon
    steps, twice = effort.steps, 2 * effort.steps
    size, small = target.step_size(steps), target.step_size(twice)
    through = [ThroughSurrogate(epsilon=epsilon, steps=steps, step_size=size, loss=loss) for loss in _LOSSES]
    found = [_adaptive("white-box", through, kind="white-box"), _asking("noise")]
    if target.defence.name != "none":  # as hard as its base, which they are run on for the transfer
        auto = [AutoThroughSurrogate(attack=attack) for attack in _auto(target, suite)]
        found.insert(1, _adaptive("apgd", auto, kind="white-box"))
    if suite == "standard":
        return found
    fpa = [FPA(epsilon=epsilon, rounds=effort.rounds, steps=steps, step_size=size, loss=loss) for loss in _LOSSES]
    average = [
        GMSA(epsilon=epsilon, reduce="avg", rounds=effort.rounds, steps=steps, step_size=size, loss=loss)
        for loss in _LOSSES
    ]
    rounds = effort.least_rounds or effort.rounds
    least = [GMSA(epsilon=epsilon, reduce="min", rounds=rounds, steps=steps, step_size=size)]
    found += [
        _adaptive("fpa", fpa),
        _adaptive("gmsa-avg", average),
        _adaptive("gmsa-min", least),
        _adaptive(
            "lock-step", [LockStep(epsilon=epsilon, steps=twice, step_size=small, loss=loss) for loss in _LOSSES]
        ),
    ]
    if not target.simulation.holds:
        found = [replace(column, same_as="fpa") if column.name in _ROUNDS else column for column in found]
    found += [
        _adaptive("hijack", [Hijack(epsilon=epsilon, steps=twice, step_size=small)]),
    ]
    twin = _twin(target.defence)
    if twin is not None:
        found.append(
            _adaptive("soft-knn", [ThroughSurrogate(epsilon=epsilon, steps=twice, step_size=small, twin=twin)])
        )
    found.append(_asking("square"))
    if suite == "full":
        found.append(_asking("rays"))
    return found


def transferred(target: Target, base: Sequence[Sent]) -> Sent:
    """The transfer attack: of everything made on the base model, for each image what the defence, run in private,
    misreads most."""
    attack = _Given(name="transfer")
    sent = _run(target, "transfer", "transfer", [attack], [made.pixels for made in base])
    config = "; ".join(made.config for made in base)
    return replace(sent, config=config, seconds=sum(made.seconds for made in base) + sent.seconds)


def base_attacks(target: Target, suite: Suite) -> list[tuple[str, Callable[[], Sent]]]:
    """By name what makes examples on the base model alone, which is what ``target`` must be: shallow and deep ones."""
    epsilon, steps = target.epsilon, target.effort.steps
    attacks: list[PGD | APGD] = [PGD(epsilon=epsilon, steps=steps, step_size=target.step_size(steps))]
    attacks += _auto(target, suite)
    found: list[tuple[str, Callable[[], Sent]]] = [
        (attack.name, partial(_on_base, target, attack, number)) for number, attack in enumerate(attacks)
    ]
    shallow = [(f"pgd{steps}-margin-{limit:g}", limit) for limit in _CONFIDENCES]
    return found + [(name, partial(_shallow, target, name, limit)) for name, limit in shallow]


def _auto(target: Target, suite: Suite) -> list[APGD]:
    epsilon, steps = target.epsilon, target.effort.steps
    found = [APGD(epsilon=epsilon, steps=2 * steps, loss="ce")]
    if suite != "standard":
        found.append(APGD(epsilon=epsilon, steps=2 * steps, loss="dlr"))
        found.append(APGD(epsilon=epsilon, steps=steps, loss="t", early_stop=True))
    return found


def _on_base(target: Target, attack: PGD | APGD, number: int) -> Sent:
    generator, started = torch.Generator().manual_seed(target.seed + number), time.perf_counter()
    parts = zip(target.pixels.split(_BATCH), target.labels.split(_BATCH), strict=True)
    forward = partial(shown, target.defence, generator=generator)
    pixels = torch.cat([attack.run(forward, few, truth, generator=generator) for few, truth in parts])
    return _plain(attack.name, repr(attack), pixels, started, attack.steps)


def _shallow(target: Target, name: str, confidence: float) -> Sent:
    """No further over the border than ``confidence``."""
    generator, started = torch.Generator().manual_seed(target.seed), time.perf_counter()
    starts = random_start(target.pixels, target.epsilon, generator)
    steps, found = target.effort.steps, []
    size = target.step_size(steps)
    for rows in torch.arange(len(target.pixels)).split(_BATCH):

        def objective(images: Images, truth: Labels = target.labels[rows]) -> torch.Tensor:
            logits = shown(target.defence, images, generator=generator)
            return losses(logits[:, None], truth, "margin", confidence=confidence)[:, 0]

        _, best = ascend(
            objective, target.pixels[rows], starts[rows], epsilon=target.epsilon, steps=steps, step_size=size
        )
        found.append(best)
    config = f"PGD, {steps} steps of {255 * size:.0f}/255, margin up to {confidence:g}"
    return _plain(name, config, torch.cat(found), started, steps)


def _plain(attack: str, config: str, pixels: Pixels, started: float, steps: int) -> Sent:
    seconds = time.perf_counter() - started
    return Sent(attack=attack, kind="white-box", config=config, pixels=pixels, seconds=seconds, steps=steps)


def _twin(defence: Defence) -> Defence | None:
    """A defence whose gradient goes through the closed-form head and soft neighbours, in the place of ``defence``, with
    its selection as far as it names one; the neighbour votes' own surrogate is soft already. None where no neighbours
    are asked."""
    parts = split_stages(defence.name)
    families = [part.partition(":")[0] for part in parts]
    if families[0] in ("webnn", "deepnn"):
        return defence
    if "rmc" not in families or not defence.resources.classifier.has_head:
        return None
    chosen = split_text(parts[families.index("rmc")])[1]
    options = {key: value for key, value in chosen.items() if key in _SELECTION} | {"temperature": "0.25", "gate": "0"}
    soft = "rmc:" + ",".join(f"{key}={value}" for key, value in options.items())
    stages = [part for part, family in zip(parts, families, strict=True) if family not in ("sap", "region", "tta")]
    return build_defence("+".join(soft if part.startswith("rmc") else part for part in stages), defence.resources)


def _adaptive(name: str, attacks: Sequence[AdaptiveAttack], kind: AttackKind = "adaptive") -> Column:
    return Column(name=name, run=lambda target, candidates: _run(target, name, kind, attacks, candidates))


def _run(
    target: Target, name: str, kind: AttackKind, attacks: Sequence[AdaptiveAttack], candidates: Sequence[Pixels]
) -> Sent:
    """One after the other, each with what the one before it found."""
    started, looks, points = time.perf_counter(), [], list(candidates)
    for number, attack in enumerate(attacks):
        generator = torch.Generator().manual_seed(target.seed + 7919 * (number + 1))
        found = attack.run(target.simulation, target.pixels, target.labels, generator=generator, candidates=points)
        points = [found.pixels]
        looks.append(found.stood)
    return Sent(
        attack=name,
        kind=kind,
        config="; ".join(_described(attack) for attack in attacks),
        pixels=points[0],
        seconds=time.perf_counter() - started,
        steps=sum(attack.gradient_steps for attack in attacks) or None,
        stood=torch.cat(looks),
    )


def _described(attack: AdaptiveAttack) -> str:
    """A twin by its name: a defence's own representation is all that it is made of."""
    twin = attack.twin if isinstance(attack, ThroughSurrogate) else None
    return repr(attack) if twin is None else f"{attack!r} through {twin.name}"


@dataclass(frozen=True, kw_only=True)
class _Given:
    """Looks at the candidates, and makes nothing."""

    name: str
    gradient_steps: int = 0

    def run(
        self,
        simulation: Simulation,
        pixels: Pixels,
        labels: Labels,
        *,
        generator: torch.Generator,
        candidates: Sequence[Pixels] = (),
    ) -> Found:
        return begin(simulation, pixels, labels, generator, candidates).found()


def _asking(name: str) -> Column:
    kind: AttackKind = "noise" if name == "noise" else "black-box"
    return Column(name=name, run=lambda target, candidates: _ask(target, name, kind))


def _ask(target: Target, name: str, kind: AttackKind) -> Sent:
    attack = _black_box(name, target)
    started = time.perf_counter()
    classes = target.defence.resources.classifier.spec.num_classes
    oracle = InProcessOracle(target.defence, classes=classes, track=attack.track, seed=target.seed + 1)
    budget = min(_NOISE, target.effort.queries) if name == "noise" else target.effort.queries
    found = attack.run(oracle, target.pixels, target.labels, seed=target.seed, budget=budget)
    return Sent(
        attack=name,
        kind=kind,
        config=f"{attack!r}, {budget} queries",
        pixels=found.pixels,
        seconds=time.perf_counter() - started,
        broken_at=found.broken_at,
        spent=found.queries,
    )


def _black_box(name: str, target: Target) -> BlackBoxAttack:
    if name == "square":
        return Square(epsilon=target.epsilon, random=target.random, repeats=_ASKED if target.random else 1)
    if name == "rays":
        return RayS(epsilon=target.epsilon, random=target.random)
    return RandomNoise(epsilon=target.epsilon, random=target.random)


def names(resources: Resources) -> tuple[str, ...]:
    """The defences of the published table, as far as the bundle has what they need."""
    wanted = ["none", "webnn", "rmc"]
    wanted += ["rmc:scope=tail"] if resources.exemplars.activations is not None else []
    wanted += ["prm"] if resources.prms else []
    wanted += ["sap"]
    wanted += ["prm+rmc"] if resources.prms else []
    return (*wanted, "rmc+sap")
