"""Attacks that know the defence: what they may return, what they must reach, and that they count what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mithridate.attacks.adaptive import (
    FPA,
    GMSA,
    AdaptiveAttack,
    CostAttack,
    Found,
    Hijack,
    LockStep,
    Simulation,
    ThroughSurrogate,
    contaminate,
)
from mithridate.attacks.adaptive.rounds import ascend
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Defence, Resources, build_defence
from mithridate.defenses.base import Batch, Outcome, Prediction, Request, answer_one, answer_together
from mithridate.defenses.none import base_pass
from mithridate.defenses.rmc import RMC
from mithridate.evaluation.planted import Planted
from mithridate.types import Epsilon, Images, Labels, Logits, Pixels, to_images

RADIUS, IMAGES = Epsilon(32), 20
SIZE = 8 / 255


def all_of(radius: Epsilon, twin: Defence | None = None) -> list[AdaptiveAttack]:
    return [
        FPA(epsilon=radius, rounds=2, steps=10, step_size=SIZE),
        GMSA(epsilon=radius, reduce="avg", rounds=2, steps=10, step_size=SIZE),
        GMSA(epsilon=radius, reduce="min", rounds=2, steps=10, step_size=SIZE),
        LockStep(epsilon=radius, steps=23, every=5, step_size=SIZE),
        Hijack(epsilon=radius, steps=25, every=10, step_size=SIZE),
        ThroughSurrogate(epsilon=radius, steps=15, every=10, step_size=SIZE),
        ThroughSurrogate(epsilon=radius, steps=15, every=10, step_size=SIZE, twin=twin),
    ]


NAMES = ("fpa", "gmsa-avg", "gmsa-min", "lock-step", "hijack", "white-box", "soft-knn")


@pytest.fixture(scope="module")
def defence(resources: Resources) -> RMC:
    found = build_defence("rmc", resources)
    assert isinstance(found, RMC)
    return found


@pytest.fixture(scope="module")
def digits(defence: RMC, digits_test: LabelledImages) -> tuple[Pixels, Labels]:
    """The first that ``rmc`` reads rightly."""
    pixels, labels = torch.from_numpy(digits_test.images[:40]), torch.from_numpy(digits_test.labels[:40])
    right = ~misread(defence, pixels, labels)
    assert int(right.sum()) > IMAGES
    return pixels[right][:IMAGES], labels[right][:IMAGES]


@pytest.fixture(scope="module")
def attacks(resources: Resources) -> dict[str, AdaptiveAttack]:
    return named(RADIUS, resources)


@pytest.fixture(scope="module")
def found(defence: RMC, digits: tuple[Pixels, Labels], attacks: dict[str, AdaptiveAttack]) -> dict[str, Found]:
    """What each attack makes on its own."""
    return {name: run(attack, defence, *digits) for name, attack in attacks.items()}


def named(radius: Epsilon, resources: Resources) -> dict[str, AdaptiveAttack]:
    attacks = all_of(radius, twin=build_defence("rmc:temperature=0.25,gate=0", resources))
    assert tuple(attack.name for attack in attacks) == NAMES
    return {attack.name: attack for attack in attacks}


def run(
    attack: AdaptiveAttack,
    defence: Defence,
    pixels: Pixels,
    labels: Labels,
    *,
    seed: int = 0,
    checks: int = 1,
    candidates: Sequence[Pixels] = (),
) -> Found:
    return attack.run(
        Simulation(defence=defence, checks=checks), pixels, labels, generator=drawn(seed), candidates=candidates
    )


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def asked(defence: Defence, pixels: Pixels) -> Prediction:
    return defence.predict(to_images(pixels), generator=drawn(), budget=Budget())


def misread(defence: Defence, pixels: Pixels, labels: Labels) -> torch.Tensor:
    return asked(defence, pixels).scores.argmax(1) != labels


def within(points: Pixels, pixels: Pixels, radius: Epsilon) -> bool:
    return points.dtype == torch.uint8 and int((points.int() - pixels.int()).abs().max()) <= radius.levels


@pytest.mark.parametrize("name", NAMES)
def test_what_it_returns_can_be_sent_and_is_what_it_says(
    name: str, found: dict[str, Found], defence: RMC, digits: tuple[Pixels, Labels]
) -> None:
    one = found[name]
    assert within(one.pixels, digits[0], RADIUS)
    assert one.stood.shape[1] == IMAGES
    assert bool(one.stood[0].all()), "all were read rightly at the start"
    assert not (one.stood[1:] & ~one.stood[:-1]).any(), "what fell stands again"
    assert torch.equal(misread(defence, one.pixels, digits[1]), ~one.stood[-1])


LEAVES = {"hijack": 0.6, "white-box": 0.6, "soft-knn": 0.8}
"""At most, of images that are all read rightly and hardly ever misread under noise, with this little effort."""


@pytest.mark.parametrize("name", NAMES)
def test_each_breaks_what_stands_against_noise(name: str, found: dict[str, Found]) -> None:
    assert float(found[name].stood[-1].float().mean()) <= LEAVES.get(name, 0.45)


def test_noise_alone_breaks_next_to_nothing(defence: RMC, digits: tuple[Pixels, Labels]) -> None:
    noise = torch.randint(-RADIUS.levels, RADIUS.levels + 1, digits[0].shape, generator=drawn())
    noisy = (digits[0].int() + noise).clamp(0, 255).to(torch.uint8)
    assert float(misread(defence, noisy, digits[1]).float().mean()) <= 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_repeats_it(
    name: str, attacks: dict[str, AdaptiveAttack], defence: RMC, digits: tuple[Pixels, Labels]
) -> None:
    first, again, other = (run(attacks[name], defence, digits[0][:4], digits[1][:4], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(again.pixels, first.pixels)
    assert torch.equal(again.stood, first.stood)
    assert not torch.equal(other.pixels, first.pixels)


@pytest.mark.parametrize("name", NAMES)
def test_what_others_found_is_kept(
    name: str, resources: Resources, found: dict[str, Found], defence: RMC, digits: tuple[Pixels, Labels]
) -> None:
    """With a radius of one level it finds nothing of its own; what it was given still falls, and nothing else."""
    given = found["fpa"]
    broken = ~given.stood[-1]
    mixed = torch.where((broken & (torch.arange(IMAGES) % 2 == 0))[:, None, None, None], given.pixels, digits[0])
    fallen = misread(defence, mixed, digits[1])
    assert 3 < int(fallen.sum()) < IMAGES - 3
    one = run(named(Epsilon(1), resources)[name], defence, *digits, candidates=[digits[0], mixed])
    assert torch.equal(~one.stood[0], fallen)
    assert torch.equal(one.pixels[fallen], mixed[fallen])
    assert misread(defence, one.pixels, digits[1])[fallen].all()


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_falls_the_nearest_to_it_is_sent(
    name: str, resources: Resources, defence: RMC, digits: tuple[Pixels, Labels]
) -> None:
    radius = Epsilon(2)
    pixels, labels = digits[0][:10], digits[1][:10]
    one = run(named(radius, resources)[name], defence, pixels, labels)
    stood = one.stood[-1]
    assert int(stood.sum()) > 5
    assert within(one.pixels, pixels, radius)
    changed = (one.pixels != pixels).flatten(1).any(1)
    assert float(changed[stood].float().mean()) > 0.7, "the clean image is sent"
    simulation = Simulation(defence=defence)
    before, after = (simulation.margins(points, labels, generator=drawn()) for points in (pixels, one.pixels))
    assert (after <= before).all()


# What is counted


@dataclass
class Counting:
    """``defence``, with every gradient counted that an attacker takes of it."""

    defence: RMC
    gradients: list[int] = field(default_factory=lambda: [0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.defence, name)

    def _count(self) -> None:
        self.gradients[0] += torch.is_grad_enabled()

    def hold(self, images: Images, *, generator: torch.Generator) -> Any:
        return self.defence.hold(images, generator=generator)

    def held_logits(self, images: Images, held: Sequence[Any], *, generator: torch.Generator) -> Logits:
        self._count()
        return self.defence.held_logits(images, held, generator=generator)

    def embed(self, images: Images, *, generator: torch.Generator) -> torch.Tensor:
        self._count()
        return self.defence.embed(images, generator=generator)

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        self._count()
        return self.defence.surrogate(images, generator=generator, budget=budget)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_it_takes_as_many_steps_as_it_says(
    name: str, resources: Resources, defence: RMC, digits: tuple[Pixels, Labels]
) -> None:
    counting, attack = Counting(defence), named(Epsilon(0), resources)[name]  # with no radius all stand to the end
    run(attack, counting, *(part[:2] for part in digits))  # type: ignore[arg-type]
    assert counting.gradients == [attack.gradient_steps]
    expected = {"fpa": 30, "gmsa-avg": 30, "gmsa-min": 60, "lock-step": 23, "hijack": 25, "white-box": 15}
    assert attack.gradient_steps == expected[name]


def test_lock_step_adapts_again_every_few_steps(defence: RMC, digits: tuple[Pixels, Labels]) -> None:
    simulation, few = Simulation(defence=defence), tuple(part[:2] for part in digits)
    one = LockStep(epsilon=Epsilon(0), steps=23, every=5).run(simulation, *few, generator=drawn())
    assert len(one.stood) == 1 + 5
    assert simulation.queries == [2 * (1 + 2 * 5)], "the image itself, and twice after each part"


# Defences of other kinds


@pytest.mark.parametrize("name", ["fpa", "lock-step", "hijack", "white-box"])
def test_a_defence_that_adapts_nothing_is_attacked_too(
    name: str, attacks: dict[str, AdaptiveAttack], resources: Resources, digits: tuple[Pixels, Labels]
) -> None:
    for text in ("none", "webnn"):
        defence = build_defence(text, resources)
        one = run(attacks[name], defence, *digits)
        assert within(one.pixels, digits[0], RADIUS)
        assert torch.equal(misread(defence, one.pixels, digits[1]), ~one.stood[-1])
        assert float(one.stood[-1].float().mean()) <= 0.35, text


@dataclass(frozen=True, kw_only=True)
class Coin:
    """Answers class 1 in one of two draws, whatever the image."""

    name: str
    resources: Resources

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        return answer_one(self.predict_together, images, generator, budget)

    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        return answer_together(requests, torch.device("cpu"), self._answer)

    def _answer(self, batch: Batch) -> Prediction:
        ones = torch.rand(len(batch.images), generator=drawn(batch.seeds[0]))
        scores, nothing = torch.stack([1 - ones, ones], 1), (None,) * len(ones)
        return Prediction(scores=scores, base_scores=scores, adaptations=nothing, neighborhoods=nothing, seconds={})

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        return images.flatten(1)[:, :2]


@pytest.mark.parametrize(("checks", "share"), [(1, 0.5), (3, 0.125), (5, 0.03)])
def test_one_lucky_draw_of_a_random_defence_is_no_success(resources: Resources, checks: int, share: float) -> None:
    simulation = Simulation(defence=Coin(name="coin", resources=resources), checks=checks)
    pixels, labels = torch.zeros(2000, 1, 2, 2, dtype=torch.uint8), torch.zeros(2000, dtype=torch.long)
    margins = simulation.margins(pixels, labels, generator=drawn())
    assert float((margins < 0).float().mean()) == pytest.approx(share, abs=0.03)


def test_an_image_that_is_turned_away_is_not_read_rightly(resources: Resources, digits: tuple[Pixels, Labels]) -> None:
    """As in the score, which counts an abstention as wrong."""
    defence = build_defence("rmc:abstain=0.95", resources)
    abstained = asked(defence, digits[0]).abstained
    assert abstained is not None
    assert 0 < int(abstained.sum()) < IMAGES
    margins = Simulation(defence=defence).margins(*digits, generator=drawn())
    assert torch.equal(margins < 0, abstained | misread(defence, *digits))


def test_a_gradient_that_is_no_number_does_not_leave_the_ball(digits: tuple[Pixels, Labels]) -> None:
    pixels = digits[0].clamp(100, 200)

    def undefined(images: Images) -> torch.Tensor:
        return images.flatten(1).sum(1) + (images - images).flatten(1).sum(1).sqrt()

    end, best = ascend(undefined, pixels, to_images(pixels), epsilon=Epsilon(4), steps=3, step_size=SIZE)
    assert end.isfinite().all()
    assert within(best, pixels, Epsilon(4))


# The neighbours, the cost, and other people's answers


def test_hijack_brings_neighbours_of_another_class(
    found: dict[str, Found], defence: RMC, digits: tuple[Pixels, Labels]
) -> None:
    def purity(pixels: Pixels) -> float:
        shares = []
        for near, label in zip(asked(defence, pixels).neighborhoods, digits[1].tolist(), strict=True):
            assert near is not None
            shares.append(near.label_counts.get(label, 0) / sum(near.label_counts.values()))
        return sum(shares) / len(shares)

    before, after = purity(digits[0]), purity(found["hijack"].pixels)
    assert after < 0.6 * before


@pytest.mark.parametrize("text", ["rmc:solver=adam,neighbors=40", "rmc"])
def test_cost_is_never_less_than_that_of_the_image_itself(
    text: str, resources: Resources, digits: tuple[Pixels, Labels]
) -> None:
    defence, pixels = build_defence(text, resources), digits[0][:12]
    costly = CostAttack(epsilon=RADIUS, steps=25, every=10, step_size=SIZE).run(
        Simulation(defence=defence), pixels, generator=drawn()
    )
    assert within(costly.pixels, pixels, RADIUS)
    for points, steps in ((pixels, costly.clean_steps), (costly.pixels, costly.steps)):
        assert [0 if fate is None else fate.steps for fate in asked(defence, points).adaptations] == steps.tolist()
    assert (costly.steps >= costly.clean_steps).all()
    unchanged = costly.steps == costly.clean_steps
    assert torch.equal(costly.pixels[unchanged], pixels[unchanged])
    if "adam" in text:
        assert int(costly.steps.sum()) > int(costly.clean_steps.sum())
    else:
        assert bool(unchanged.all()), "the closed form takes one step, whatever comes"


@pytest.mark.parametrize("text", ["none", "webnn", "rmc", "rmc:solver=adam,neighbors=40", "sap", "rmc+sap"])
def test_nobody_changes_anybody_elses_answer(
    text: str, resources: Resources, found: dict[str, Found], digits: tuple[Pixels, Labels]
) -> None:
    defence = build_defence(text, resources)
    hostile = [one.pixels[:6] for one in list(found.values())[:3]]
    told = contaminate(defence, digits[0][:6], hostile, seed=3)
    assert told.failed
    assert (told.victims, told.hostile, told.changed) == (6, 18, 0)


@dataclass
class Remembers:
    """Leans towards what it said before."""

    lean: torch.Tensor | float = 0.0

    def __call__(self, classifier: Any, images: Images) -> Logits:
        logits = base_pass(classifier, images).logits + self.lean
        self.lean = 4 * logits.mean(0)
        return logits


def test_a_defence_that_remembers_is_caught(
    resources: Resources, found: dict[str, Found], digits: tuple[Pixels, Labels]
) -> None:
    remembers = Remembers()
    planted = Planted(name="remembers", resources=resources, answers=remembers, shows=remembers)
    told = contaminate(planted, digits[0][:6], [found["fpa"].pixels], seed=3)
    assert not told.failed
    assert told.changed > 0
    barely = Planted(
        name="barely",
        resources=resources,
        answers=lambda c, x: base_pass(c, x).logits * (1 + 0.01 * len(x)),
        shows=remembers,
    )
    slight = contaminate(barely, digits[0][:6], [found["fpa"].pixels], seed=3)
    assert slight.changed == 0
    assert not slight.failed, "scores that move are a trace too"


def test_with_a_memory_no_point_is_asked_for_twice(defence: RMC, digits: tuple[Pixels, Labels]) -> None:
    memory: dict[bytes, float] = {}
    first, second = (Simulation(defence=defence, memory=memory) for _ in range(2))
    pixels, labels = digits[0][:4], digits[1][:4]
    known = first.margins(pixels, labels, generator=drawn())
    again = second.margins(torch.cat([pixels, 255 - pixels]), labels.repeat(2), generator=drawn())
    assert (first.queries, second.queries) == ([4], [4])
    assert torch.equal(again[:4], known)
    plain = Simulation(defence=defence).margins(pixels, labels, generator=drawn())
    assert torch.allclose(known, plain, atol=1e-6)
