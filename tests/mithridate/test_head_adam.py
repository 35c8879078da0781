"""Heads fitted together equal heads fitted one by one with torch's own optimiser, and each keeps to its own budget."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

import pytest
import torch
from head_helpers import Descent, allow, slow_head_fit
from torch import nn
from torch.nn import functional as F

from mithridate.defenses import Budget
from mithridate.defenses.head_adam import AdamConfig, HeadFit, fit_heads
from mithridate.errors import OptionError

ROWS, NEIGHBORS, WIDTH, CLASSES = 9, 30, 12, 4
FREE = (Budget(),) * ROWS


@dataclass(frozen=True, kw_only=True)
class Case:
    """``[9, 30, 12]`` features in ever wider clouds around four centres, so that rows end at different steps."""

    head: nn.Linear
    features: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    queries: torch.Tensor

    def fit(self, config: AdamConfig, budgets: tuple[Budget, ...] = FREE, rows: slice = slice(None)) -> HeadFit:
        parts = self.features[rows], self.labels[rows], self.weights[rows]
        return fit_heads(*parts, self.head, config, budgets[rows], int(config.held_out * NEIGHBORS))

    def slow(self, row: int, config: AdamConfig, ceiling: int = 10**9) -> tuple[torch.Tensor, int, Descent]:
        """Logits at the query, steps and the first fit."""
        parts = self.features[row], self.labels[row], self.weights[row]
        head, steps, first = slow_head_fit(*parts, self.head, config, ceiling)
        return head(self.queries[row].double()), steps, first


def make(*, bias: bool = True, soft: bool = False) -> Case:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(WIDTH, CLASSES, bias=bias).requires_grad_(False)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (ROWS, NEIGHBORS), generator=generator)
    noise = torch.linspace(0, 3.5, ROWS)[:, None, None] * torch.randn(ROWS, NEIGHBORS, WIDTH, generator=generator)
    features = centres[labels] + noise
    labels[8] = head(features[8]).argmax(1)  # the base model is right about all of them
    features[6, :6] = 3 * centres[labels[6, :6]]  # the nearest of these are easier than the others
    labels[7, :6] = (labels[7, :6] + 1) % CLASSES  # what the others teach is wrong for the nearest
    weights = torch.ones(ROWS, NEIGHBORS, dtype=torch.float64)
    if soft:
        weights = torch.rand(ROWS, NEIGHBORS, generator=generator, dtype=torch.float64)
        weights[:, -4:] = 0
    queries = torch.randn(ROWS, WIDTH, generator=generator)
    return Case(
        head=head, features=features, labels=labels, weights=weights / weights.sum(1, keepdim=True), queries=queries
    )


HELD = AdamConfig(learning_rate=0.1, steps=50, tolerance=0.1, anchor=0.0, held_out=0.2, patience=5, refit=True)
PLAIN = replace(HELD, held_out=0)


@pytest.mark.parametrize(("bias", "soft"), [(True, False), (False, True)])
@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        replace(PLAIN, learning_rate=0.01, steps=20, tolerance=0.5),
        replace(PLAIN, steps=3, tolerance=0),
        replace(PLAIN, tolerance=100),
        replace(PLAIN, steps=20, tolerance=0, anchor=0.3),
        replace(HELD, steps=25),
        replace(HELD, steps=25, refit=False),
        replace(HELD, learning_rate=0.02, steps=60, tolerance=0.6),
        replace(HELD, steps=5, tolerance=0.2, patience=3),
        replace(HELD, learning_rate=0.5, steps=30, tolerance=0, patience=2),
        replace(HELD, learning_rate=0.02, steps=15, patience=3, held_out=0.5, anchor=0.1),
    ],
)
def test_heads_equal_one_by_one_training_with_torch(config: AdamConfig, soft: bool, bias: bool) -> None:
    """A batch in which rows converge at different steps, at once, lose patience, or never end by themselves."""
    case = make(bias=bias, soft=soft)
    fit = case.fit(config)
    logits = fit.logits(case.queries)
    for row, adaptation in enumerate(fit.adaptations):
        wanted, steps, first = case.slow(row, config)
        torch.testing.assert_close(logits[row], wanted, rtol=0, atol=1e-6)
        assert (adaptation.steps, adaptation.stop_reason) == (steps, first.reason)
        assert adaptation.weights == ("adapted" if first.kept else "base")
        if config.held_out:
            assert adaptation.held_out_loss == pytest.approx(first.losses)
        else:
            assert adaptation.held_out_loss is None


def test_the_examples_above_end_in_every_way_a_fit_can_end_by_itself() -> None:
    """Or they would prove less than they seem to."""
    fates = make().fit(replace(HELD, learning_rate=0.1, steps=5, tolerance=0.2, patience=3)).adaptations
    assert {fate.stop_reason for fate in fates} == {"converged", "patience", "max_steps"}
    assert {fate.weights for fate in fates} == {"adapted", "base"}
    assert len({fate.steps for fate in fates}) > 3


def test_rows_have_nothing_to_do_with_each_other() -> None:
    case, config = make(soft=True), replace(HELD, steps=25, tolerance=0.2, patience=3)
    together = case.fit(config)
    for row in range(ROWS):
        alone = case.fit(config, rows=slice(row, row + 1))
        torch.testing.assert_close(together.weight[row], alone.weight[0], rtol=0, atol=1e-9)
        assert together.adaptations[row] == alone.adaptations[0]


def test_restores_the_best_of_the_held_out_and_not_the_last() -> None:
    """Step by step: the loss of the held out after exactly the kept number of steps is the least there was."""
    case, config = make(), replace(HELD, steps=30, tolerance=0, patience=30, refit=False)
    fit, held = case.fit(config), 6
    for row, fate in enumerate(fit.adaptations):
        inputs = F.pad(case.features[row, :held].double(), (0, 1), value=1.0)
        loss = F.cross_entropy(inputs @ fit.weight[row].T, case.labels[row, :held])
        assert fate.held_out_loss is not None
        assert loss.item() == pytest.approx(fate.held_out_loss[1])
        assert fate.held_out_loss[1] <= fate.held_out_loss[0]
        assert fate.steps == 30
    for row in (3, 5):  # the best was on the way there
        _, _, first = case.slow(row, config)
        assert 0 < first.kept < 30


def test_where_nothing_helps_the_held_out_the_base_head_stays() -> None:
    case = make()
    fit = case.fit(replace(HELD, steps=30, tolerance=0))
    start = torch.cat([case.head.weight, case.head.bias[:, None]], 1).double()
    fate = fit.adaptations[7]
    assert (fate.weights, fate.stop_reason, fate.steps) == ("base", "patience", 5)
    assert fate.held_out_loss is not None
    assert fate.held_out_loss[0] == fate.held_out_loss[1]
    assert torch.equal(fit.weight[7], start)
    assert not torch.equal(fit.weight[0], start)


def test_a_refit_learns_from_the_held_out_too() -> None:
    case, config = make(), replace(HELD, steps=20)
    once, again = case.fit(replace(config, refit=False)), case.fit(config)
    for row in range(7):
        first, both = once.adaptations[row], again.adaptations[row]
        assert both.held_out_loss == first.held_out_loss  # of the fit that decided
        assert both.stop_reason == first.stop_reason
        assert first.steps < both.steps <= 2 * first.steps
        assert not torch.allclose(again.weight[row], once.weight[row], atol=1e-3)


def test_the_anchor_pulls_towards_the_base_head() -> None:
    """At Adam's usual step size too: in the gradient, its scaling would cancel any anchor."""
    case, lengths = make(), []
    start = torch.cat([case.head.weight, case.head.bias[:, None]], 1).double()
    for anchor in (0.0, 0.1, 1.0, 10.0):
        fit = case.fit(replace(HELD, learning_rate=0.1, steps=20, tolerance=0, anchor=anchor, held_out=0))
        lengths.append((fit.weight - start).flatten(1).norm(dim=1))
    for weaker, stronger in itertools.pairwise(lengths):
        assert (stronger < weaker).all()
    assert (lengths[-1] < 0.1 * lengths[0]).all()


# The budget


def among(row: int, budget: Budget) -> tuple[Budget, ...]:
    return tuple(budget if other == row else Budget() for other in range(ROWS))


@pytest.mark.parametrize("config", [replace(PLAIN, tolerance=0, steps=12), replace(HELD, tolerance=0, steps=12)])
@pytest.mark.parametrize("checks", [0, 1, 4])
def test_a_caller_who_leaves_takes_nobody_along(config: AdamConfig, checks: int) -> None:
    case, free = make(), make().fit(config)
    fit = case.fit(config, among(3, Budget(cancelled=allow(checks))))
    assert (fit.adaptations[3].steps, fit.adaptations[3].stop_reason) == (checks, "cancelled")
    for row in range(ROWS):
        if row != 3:
            assert fit.adaptations[row] == free.adaptations[row]
            torch.testing.assert_close(fit.weight[row], free.weight[row], rtol=0, atol=1e-9)
    if not config.held_out and checks:
        stopped = case.fit(replace(config, steps=checks)).weight[3]
        torch.testing.assert_close(fit.weight[3], stopped, rtol=0, atol=1e-9)
    assert (fit.adaptations[3].weights == "base") == (not checks)


def test_a_refit_that_is_cut_short_leaves_the_weights_that_were_validated() -> None:
    config = replace(HELD, tolerance=0, steps=12)
    case, once = make(), make().fit(replace(config, refit=False))
    whole = case.fit(config)
    looks = once.adaptations[2].steps + 1  # the first fit looks before each step and once at its end
    fit = case.fit(config, among(2, Budget(cancelled=allow(looks + 3))))
    assert (fit.adaptations[2].steps, fit.adaptations[2].stop_reason) == (once.adaptations[2].steps + 3, "cancelled")
    assert fit.adaptations[2].steps < whole.adaptations[2].steps
    torch.testing.assert_close(fit.weight[2], once.weight[2], rtol=0, atol=1e-9)
    torch.testing.assert_close(fit.weight[1], whole.weight[1], rtol=0, atol=1e-9)


def test_a_fit_that_has_ended_is_not_said_to_have_been_interrupted() -> None:
    """Row 7 keeps the base head: nothing is left to do for it when its caller leaves."""
    config = replace(HELD, tolerance=0, steps=12)
    fit = make().fit(config, among(7, Budget(cancelled=allow(6))))
    assert (fit.adaptations[7].stop_reason, fit.adaptations[7].steps) == ("patience", 5)


@pytest.mark.parametrize("config", [replace(PLAIN, tolerance=0, steps=12), replace(HELD, tolerance=0, steps=12)])
@pytest.mark.parametrize("ceiling", [0, 1, 5, 12, 17, 24])
def test_a_ceiling_counts_both_fits_and_is_the_rows_own(config: AdamConfig, ceiling: int) -> None:
    case, free = make(), make().fit(config)
    fit = case.fit(config, among(4, Budget(max_steps=ceiling)))
    assert fit.adaptations[4].steps <= ceiling
    if ceiling:
        wanted, steps, _ = case.slow(4, config, ceiling)
        assert fit.adaptations[4].steps == steps
        torch.testing.assert_close(fit.logits(case.queries)[4], wanted, rtol=0, atol=1e-6)
    else:
        assert fit.adaptations[4].stop_reason == "max_steps"
    for row in (0, 3, 5, 8):
        assert fit.adaptations[row] == free.adaptations[row]
        torch.testing.assert_close(fit.weight[row], free.weight[row], rtol=0, atol=1e-9)


def test_a_deadline_on_the_way_ends_that_row_with_what_there_is() -> None:
    config = replace(PLAIN, tolerance=0, steps=200)
    fit = make().fit(config, among(1, Budget(deadline=time.monotonic() + 0.005)))
    assert fit.adaptations[1].stop_reason == "deadline"
    assert fit.adaptations[1].steps < 200
    assert [fit.adaptations[row].stop_reason for row in (0, 2, 8)] == ["max_steps"] * 3
    assert torch.isfinite(fit.weight).all()


# The edges


@pytest.mark.parametrize("config", [PLAIN, HELD])
def test_an_empty_fit_is_no_error(config: AdamConfig) -> None:
    empty = make().fit(config, rows=slice(0, 0))
    assert empty.adaptations == ()
    assert empty.logits(torch.zeros(0, WIDTH)).shape == (0, CLASSES)


def test_where_all_the_weight_is_on_the_held_out_there_is_nothing_to_learn() -> None:
    case = make()
    case.weights.zero_()[:, :3] = 1 / 3
    fit = case.fit(replace(HELD, tolerance=0))
    assert {fate.weights for fate in fit.adaptations} == {"base"}
    assert torch.isfinite(fit.weight).all()


def test_logits_are_differentiable_in_the_query() -> None:
    case = make()
    fit, queries = case.fit(PLAIN), case.queries.double().requires_grad_()
    assert torch.autograd.gradcheck(fit.logits, (queries,))


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0},
        {"steps": 0},
        {"tolerance": -1},
        {"anchor": float("nan")},
        {"held_out": 1},
        {"patience": 0},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=rf"rmc: {next(iter(options))}=.* is out of range; allowed: "):
        AdamConfig(**options)  # type: ignore[arg-type]
