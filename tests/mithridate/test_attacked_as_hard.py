"""Defences are attacked as hard as their base: what would flatter a slow, an averaged or a random one."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mithridate.attacks import APGD
from mithridate.attacks.adaptive import GMSA, AutoThroughSurrogate, Simulation
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources, build_defence
from mithridate.defenses.rmc import RMC
from mithridate.evaluation.battery import Target, base_attacks, columns
from mithridate.evaluation.effort import LEAST, Effort, too_weak
from mithridate.evaluation.planted import planted
from mithridate.evaluation.verdict import rule
from mithridate.types import Epsilon, Images, Labels, Logits, Pixels

EPSILON = Epsilon(32)


@pytest.fixture(scope="module")
def digits(digits_test: LabelledImages) -> tuple[Pixels, Labels]:
    return torch.from_numpy(digits_test.images[:24]), torch.from_numpy(digits_test.labels[:24])


def target(name: str, resources: Resources, digits: tuple[Pixels, Labels], **changes: Any) -> Target:
    settings = {"random": False, "epsilon": EPSILON, "effort": Effort(steps=10), "seed": 0} | changes
    return Target(defence=build_defence(name, resources), pixels=digits[0], labels=digits[1], **settings)


def test_what_the_base_has_to_stand_its_defences_have_to_stand_too(
    resources: Resources, digits: tuple[Pixels, Labels]
) -> None:
    on_base = {name for name, _ in base_attacks(target("none", resources, digits), "adaptive") if "apgd" in name}
    assert on_base == {"apgd-ce20", "apgd-dlr20", "apgd-t10"}
    against = target("tta", resources, digits)
    column = next(column for column in columns(against, "adaptive") if column.name == "apgd")
    sent = column.run(against, [])
    assert all(f"loss='{name.rstrip('0123456789').removeprefix('apgd-')}'" in sent.config for name in on_base)
    assert sent.stood is not None
    assert float(sent.stood[-1].float().mean()) <= 0.2
    assert int((sent.pixels.int() - digits[0].int()).abs().max()) <= EPSILON.levels


def test_logits_that_leave_no_cross_entropy_do_not_stop_it(resources: Resources, digits: tuple[Pixels, Labels]) -> None:
    attack = AutoThroughSurrogate(attack=APGD(epsilon=EPSILON, steps=10, loss="t", early_stop=True))
    simulation = Simulation(defence=planted("temperature", resources))
    found = attack.run(simulation, *digits, generator=torch.Generator().manual_seed(0))
    assert float(found.stood[-1].float().mean()) <= 0.2


def test_what_is_slow_has_not_gained_anything_by_it() -> None:
    better = {"clean": [True] * 100, "worst": [True] * 80 + [False] * 20}
    base = {"base_clean": [True] * 100, "base_worst": [True] * 50 + [False] * 50}
    assert rule("rmc", **better, **base, gates=(), seed=0).ruling == "gain"
    held_back = rule("rmc", **better, **base, gates=(), seed=0, weak=["2 rounds of 10 steps instead of 10 of 40"])
    assert held_back.ruling == "no evidence of gain"
    assert any("2 rounds of 10" in reason for reason in held_back.reasons)
    assert Effort().exceeds(Effort(rounds=2))
    assert not Effort().exceeds(Effort(probed=10))


def test_no_gain_is_declared_on_little() -> None:
    assert too_weak(Effort(), "adaptive") == too_weak(LEAST, "full") == ()
    assert len(too_weak(Effort(), "standard")) == 1, "no attack of that suite knows the defence"
    for less in (Effort(rounds=1), Effort(steps=10), Effort(queries=199), Effort(probed=29)):
        assert len(too_weak(less, "adaptive")) == 1
    better = {"clean": [True] * 100, "worst": [True] * 80 + [False] * 20}
    base = {"base_clean": [True] * 100, "base_worst": [True] * 50 + [False] * 50}
    verdict = rule("rmc", **better, **base, gates=(), seed=0, weak=too_weak(Effort(), "standard"))
    assert verdict.ruling == "no evidence of gain"
    assert any("no attack that knows the defence" in reason for reason in verdict.reasons)


def test_a_random_defence_is_not_left_alone_after_a_few_unlucky_draws(
    resources: Resources, digits: tuple[Pixels, Labels]
) -> None:
    assert target("none", resources, digits, random=True, effort=Effort(repeats=20)).simulation.checks == 10
    assert target("none", resources, digits, random=True, effort=Effort(repeats=2)).simulation.checks == 3
    assert target("none", resources, digits).simulation.checks == 1
    few = (digits[0][:2], digits[1][:2])
    against = target("none", resources, few, random=True, epsilon=Epsilon(1), effort=Effort(queries=10))
    square = next(column for column in columns(against, "adaptive") if column.name == "square")
    assert "repeats=5" in square.run(against, []).config


@dataclass
class Watched:
    """Counts how many held models live at once."""

    defence: RMC
    alive: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    most: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.defence, name)

    @property
    def answers_as_base(self) -> bool:
        return self.defence.answers_as_base

    def hold(self, images: Images, *, generator: torch.Generator) -> Any:
        held = self.defence.hold(images, generator=generator)
        assert held.heads is not None
        self.alive.add(held.heads)
        self.most = max(self.most, len(self.alive))
        return held

    def held_logits(self, images: Images, held: Any, *, generator: torch.Generator) -> Logits:
        return self.defence.held_logits(images, held, generator=generator)


def test_no_more_is_held_than_one_group_of_images_needs(resources: Resources, digits: tuple[Pixels, Labels]) -> None:
    """A held head of a large network is megabytes, and GMSA keeps one an image and round."""
    defence = build_defence("rmc", resources)
    assert isinstance(defence, RMC)
    watched = Watched(defence=defence)
    attack = GMSA(epsilon=Epsilon(0), reduce="avg", rounds=2, steps=1, rows=4)
    found = attack.run(Simulation(defence=watched), *digits, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert 0 < watched.most <= 2 + 1
    assert found.stood.shape == (1 + 3, 24)
