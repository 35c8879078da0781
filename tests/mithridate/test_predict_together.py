"""Several callers answered at once: each gets what it would get alone, and nobody's end is anybody else's."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
import torch
from head_helpers import allow, predict
from hypothesis import given, settings
from hypothesis import strategies as st

from mithridate.attacks import parse_attack
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Outcome, Prediction, Request, Resources, build_defence
from mithridate.defenses.base import gather, interruptions
from mithridate.errors import BudgetExceededError
from mithridate.types import Epsilon, Images, to_images

TEXTS = [
    "none",
    "webnn",
    "deepnn",
    "rmc",
    "rmc:balanced=true,radius=5,gate=0.3,mix=0.1,abstain=0.5",
    "rmc:solver=adam,neighbors=48,steps=20",
]
SIZES = (1, 4, 2, 7)


@pytest.fixture(scope="module")
def images(resources: Resources, digits_test: LabelledImages) -> Images:
    """14 digits, every second one attacked."""
    pixels, labels = torch.from_numpy(digits_test.images[:14]), torch.from_numpy(digits_test.labels[:14])
    attack = parse_attack("pgd10", epsilon=Epsilon(32))
    found = attack.run(resources.classifier, pixels, labels, generator=torch.Generator().manual_seed(0))
    return to_images(torch.where((torch.arange(14) % 2 == 0)[:, None, None, None], pixels, found))


def request(images: Images, budget: Budget | None = None, seed: int = 0) -> Request:
    return Request(images=images, generator=torch.Generator().manual_seed(seed), budget=budget or Budget())


def answered(outcome: Outcome) -> Prediction:
    assert isinstance(outcome, Prediction), outcome
    return outcome


def assert_same(here: Prediction, there: Prediction) -> None:
    """But for the seconds."""
    torch.testing.assert_close(here.scores, there.scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(here.base_scores, there.base_scores, rtol=0, atol=1e-6)
    assert (here.abstained is None) == (there.abstained is None)
    if here.abstained is not None and there.abstained is not None:
        assert torch.equal(here.abstained, there.abstained)
    assert len(here.adaptations) == len(there.adaptations) == len(here.scores)
    for a, b in zip(here.adaptations, there.adaptations, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.steps, a.stop_reason, a.weights) == (b.steps, b.stop_reason, b.weights)
            loss = b.held_out_loss
            assert a.held_out_loss == (None if loss is None else pytest.approx(loss, rel=1e-5, abs=1e-9))
    for m, n in zip(here.neighborhoods, there.neighborhoods, strict=True):
        assert (m is None) == (n is None)
        if m is not None and n is not None:
            assert torch.equal(m.ids, n.ids)
            assert m.label_counts == n.label_counts


@pytest.mark.parametrize("text", TEXTS)
def test_each_gets_what_it_would_get_alone(resources: Resources, images: Images, text: str) -> None:
    parts = images.split(SIZES)
    outcomes = build_defence(text, resources).predict_together([request(part) for part in parts])
    assert [len(answered(outcome).scores) for outcome in outcomes] == list(SIZES)
    for part, outcome in zip(parts, outcomes, strict=True):
        alone = predict(text, resources, part)
        assert_same(answered(outcome), alone)
        assert answered(outcome).seconds.keys() == alone.seconds.keys()


@pytest.mark.parametrize("text", ["rmc", "rmc:solver=adam,neighbors=24,steps=10"])
def test_order_and_company_change_nothing(resources: Resources, images: Images, text: str) -> None:
    defence, whole = build_defence(text, resources), predict(text, resources, images)

    @settings(max_examples=12, deadline=None)
    @given(order=st.permutations(range(14)), cuts=st.sets(st.integers(1, 13), max_size=6), seed=st.integers(0, 2**31))
    def check(order: list[int], cuts: set[int], seed: int) -> None:
        """Any images, in any order, cut into any requests."""
        starts = [0, *sorted(cuts), 14]
        parts = [order[start:stop] for start, stop in itertools.pairwise(starts)]
        outcomes = defence.predict_together([request(images[part], seed=seed + n) for n, part in enumerate(parts)])
        for part, outcome in zip(parts, outcomes, strict=True):
            for place, row in enumerate(part):
                assert_same(answered(outcome).rows(place, place + 1), whole.rows(row, row + 1))

    check()


@pytest.mark.parametrize("text", TEXTS)
def test_who_is_over_before_the_start_gets_an_error_in_its_place(
    resources: Resources, images: Images, text: str
) -> None:
    late, gone = Budget(deadline=time.monotonic() - 1), Budget(cancelled=allow(0))
    budgets: Sequence[Budget | None] = (late, None, gone, None)
    parts = images.split(SIZES)
    outcomes = build_defence(text, resources).predict_together(
        [request(part, budget) for part, budget in zip(parts, budgets, strict=True)]
    )
    reasons = [outcome.reason if isinstance(outcome, BudgetExceededError) else None for outcome in outcomes]
    assert reasons == ["deadline", None, "cancelled", None]
    for place in (1, 3):
        assert_same(answered(outcomes[place]), predict(text, resources, parts[place]))
    nobody = build_defence(text, resources).predict_together([request(parts[0], late), request(parts[1], late)])
    assert all(isinstance(outcome, BudgetExceededError) for outcome in nobody)
    assert build_defence(text, resources).predict_together([]) == []


@pytest.mark.parametrize("text", ["rmc", "rmc:solver=adam,neighbors=48,steps=20,tolerance=0,held_out=0"])
@pytest.mark.parametrize(
    ("ending", "reason"),
    [(lambda: Budget(max_steps=0), "max_steps"), (lambda: Budget(cancelled=allow(1)), "cancelled")],
)
def test_whose_budget_ends_on_the_way_takes_nobody_along(
    resources: Resources, images: Images, text: str, ending: object, reason: str
) -> None:
    assert callable(ending)
    parts = images.split(SIZES)
    first, cut, *rest = build_defence(text, resources).predict_together(
        [request(part, ending() if place == 1 else None) for place, part in enumerate(parts)]
    )
    fates = answered(cut).adaptations
    assert [(a.steps, a.stop_reason) for a in fates if a is not None] == [(0, reason)] * 4
    torch.testing.assert_close(answered(cut).scores, answered(cut).base_scores, rtol=0, atol=1e-6)
    for part, outcome in zip((parts[0], *parts[2:]), (first, *rest), strict=True):
        assert_same(answered(outcome), predict(text, resources, part))


@pytest.mark.parametrize("text", TEXTS)
def test_an_image_that_is_not_a_number_spoils_only_its_own_answer(
    resources: Resources, images: Images, text: str
) -> None:
    for hostile in (torch.full_like(images[:1], torch.nan), torch.full_like(images[:1], 1e38)):
        parts = [images[:3], hostile, images[3:5]]
        outcomes = build_defence(text, resources).predict_together([request(part) for part in parts])
        for place in (0, 2):
            assert_same(answered(outcomes[place]), predict(text, resources, parts[place]))


@pytest.mark.parametrize("text", TEXTS)
def test_each_draws_from_its_own_generator_as_it_would_alone(resources: Resources, images: Images, text: str) -> None:
    asked = [request(images[:1], seed=1), request(images[1:3], seed=2)]
    build_defence(text, resources).predict_together(asked)
    for seed, one in zip((1, 2), asked, strict=True):
        lone = request(one.images, seed=seed)
        build_defence(text, resources).predict(lone.images, generator=lone.generator, budget=lone.budget)
        assert torch.equal(one.generator.get_state(), lone.generator.get_state())


def test_every_row_knows_whose_it_is(images: Images) -> None:
    budgets = [Budget(max_steps=count) for count in range(3)]
    asked = [
        request(part, budget, seed=place)
        for place, (part, budget) in enumerate(zip(images[:7].split((3, 1, 3)), budgets, strict=True))
    ]
    batch = gather(asked, torch.device("cpu"))
    assert torch.equal(batch.images, images[:7])
    assert [budget.max_steps for budget in batch.budgets] == [0, 0, 0, 1, 2, 2, 2]
    assert [batch.seeds[row] == batch.seeds[0] for row in range(7)] == [True] * 3 + [False] * 4
    assert len(set(batch.seeds)) == 3


def test_a_budget_that_rows_share_is_looked_at_once() -> None:
    looks: list[str] = []

    def watched(name: str, gone: bool) -> Budget:
        return Budget(cancelled=lambda: bool(looks.append(name)) or gone)

    mine, yours = watched("mine", False), watched("yours", True)
    assert interruptions((mine, yours, mine, yours, yours)) == [None, "cancelled", None, "cancelled", "cancelled"]
    assert sorted(looks) == ["mine", "yours"]
