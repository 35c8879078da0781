"""The tail: what fine-tuning it one image at a time gives, for many images at once, on stored activations."""

from __future__ import annotations

import copy
import time
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from scope_helpers import ByHand, allow, ask, check_leaves_nothing, check_rows_do_not_mix, pick, scores, within

from mithridate.attacks import parse_attack
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Resources, rmc_tail
from mithridate.defenses.adapting import Query
from mithridate.defenses.fine_tuning import FineTuning, Plan
from mithridate.defenses.learner import Examples
from mithridate.defenses.private_weights import PrivateWeights
from mithridate.defenses.rmc_tail import TailAdapter, TailConfig
from mithridate.errors import ModelError, OptionError
from mithridate.models import build_classifier
from mithridate.types import Epsilon, to_images

SMALL = TailConfig(epochs=3, batch_size=8, learning_rate=1e-3, refit=True, precision="float32")
STEPS = 4 * 3  # of 32 neighbours that are learned from; the refit is of 40


@pytest.fixture(scope="module")
def tailed(resources: Resources) -> Resources:
    """The digits bundle as if it had been built with --tail-layer auto."""
    spec = resources.classifier.spec
    classifier = build_classifier(
        spec.arch,
        num_classes=spec.num_classes,
        image_shape=spec.image_shape,
        mean=spec.mean,
        std=spec.std,
        tail_layer="auto",
    )
    classifier.network.load_state_dict(resources.classifier.network.state_dict())
    exemplars = copy.copy(resources.exemplars)
    with torch.no_grad():
        trace = classifier.trace(to_images(exemplars.pixels(torch.arange(len(exemplars)))))
    assert trace.activation is not None
    exemplars.activations = trace.activation.half()
    return replace(resources, classifier=classifier, exemplars=exemplars)


@pytest.fixture(scope="module")
def exact(tailed: Resources) -> Resources:
    return replace(tailed, classifier=deepcopy(tailed.classifier).double())


@pytest.fixture(scope="module")
def images(resources: Resources, digits_test: LabelledImages) -> torch.Tensor:
    """Two clean images and eight attacked ones."""
    pixels, labels = torch.from_numpy(digits_test.images[:10]), torch.from_numpy(digits_test.labels[:10])
    attack = parse_attack("pgd20", epsilon=Epsilon(32))
    found = attack.run(resources.classifier, pixels, labels, generator=torch.Generator().manual_seed(7))
    return torch.cat([to_images(pixels[:2]), to_images(found[2:])])


@pytest.fixture(scope="module")
def query(tailed: Resources, images: torch.Tensor) -> Query:
    return ask(tailed, images)


@pytest.fixture(scope="module")
def small(tailed: Resources) -> TailAdapter:
    return TailAdapter(resources=tailed, config=SMALL)


def in_one_run(adapter: TailAdapter) -> TailAdapter:
    """As on a GPU."""
    activations, classifier = adapter.resources.exemplars.activations, adapter.resources.classifier
    assert activations is not None
    private = PrivateWeights(classifier.tail, activations[:2].to(classifier.mean.dtype), channels_last=False)
    object.__setattr__(adapter, "_private", private)
    object.__setattr__(adapter, "_together", True)
    return adapter


# The same as by hand

SETTINGS = {
    "several batches": TailConfig(learning_rate=1e-3, epochs=3, batch_size=10),
    "refit": TailConfig(learning_rate=1e-3, epochs=3, batch_size=10, refit=True),
    "patience": TailConfig(learning_rate=3e-2, epochs=12, batch_size=64, patience=2),
    "tolerance": TailConfig(learning_rate=3e-3, epochs=30, batch_size=16, tolerance=0.2),
    "tolerance and refit": TailConfig(learning_rate=3e-3, epochs=30, batch_size=16, tolerance=0.2, refit=True),
    "anchor": TailConfig(learning_rate=3e-3, epochs=4, batch_size=16, anchor=0.3),
    "nothing held out": TailConfig(learning_rate=1e-3, epochs=2, batch_size=16, held_out=0),
}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_fine_tuning_by_hand(exact: Resources, images: torch.Tensor, name: str, together: bool) -> None:
    """Rows that end at different steps, each with neighbours that count differently."""
    config, classifier, exemplars = SETTINGS[name], exact.classifier, exact.exemplars
    query = ask(exact, images[1:8].double(), 40)
    weights = torch.rand(7, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    query = replace(query, selection=replace(query.selection, weights=weights / weights.sum(1, keepdim=True)))
    adapter = TailAdapter(resources=exact, config=config)
    with torch.no_grad():
        adapted = (in_one_run(adapter) if together else adapter).adapt(query)
    held, ended = int(config.held_out * 40), set()
    for row, fate in enumerate(adapted.adaptations):
        ids, tail = query.selection.ids[row], classifier.private_tail()
        known = exemplars.gather_activations(ids).double(), exemplars.gather_labels(ids), query.selection.weights[row]
        by_hand = ByHand(
            rate=config.learning_rate,
            epochs=config.epochs,
            batch_size=config.batch_size,
            patience=config.patience,
            tolerance=config.tolerance,
            anchor=config.anchor,
        )
        kept, steps, reason = by_hand.tune(tail, *known, held, query.seeds[row])
        after = by_hand.held_out(tail, *known, held)
        if held and config.refit:
            tail = classifier.private_tail()
            again = replace(by_hand, epochs=kept, tolerance=0.0)
            steps += again.tune(tail, *known, 0, query.seeds[row])[1]
        assert query.base.activation is not None
        with torch.no_grad():
            logits = tail(query.base.activation[row : row + 1])[0]
        torch.testing.assert_close(adapted.logits[row], logits, rtol=1e-6, atol=1e-6)
        assert (fate.steps, fate.stop_reason, fate.weights) == (steps, reason, "adapted" if kept else "base")
        before = by_hand.held_out(classifier.tail, *known, held)
        assert fate.held_out_loss == (pytest.approx((before, after)) if held else None)
        ended.add((steps, reason))
    wanted = {"patience": "patience", "tolerance": "converged"}.get(name.split()[0], "max_steps")
    assert wanted in {reason for _, reason in ended}
    assert len(ended) > 1 or name in ("several batches", "nothing held out", "refit", "anchor")


# No trace


@pytest.mark.parametrize("together", [False, True])
def test_rows_do_not_mix(tailed: Resources, query: Query, together: bool) -> None:
    adapter = TailAdapter(resources=tailed, config=replace(SMALL, learning_rate=3e-4))
    check_rows_do_not_mix(in_one_run(adapter) if together else adapter, query.rows(0, 5), tailed.classifier)


def test_a_row_has_its_answer_to_the_bit_in_any_company(small: TailAdapter, query: Query) -> None:
    whole = scores(small, query)
    alone = torch.cat([scores(small, query.rows(row, row + 1)) for row in range(len(query))])
    assert torch.equal(whole, alone)


def test_a_large_batch_is_tuned_in_parts(small: TailAdapter, query: Query, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sizes = scores(small, query), []
    adapt = TailAdapter._adapt

    def counted(self: TailAdapter, part: Query) -> object:
        sizes.append(len(part))
        return adapt(self, part)

    monkeypatch.setattr(TailAdapter, "_adapt", counted)
    monkeypatch.setattr(rmc_tail, "_BYTES_AT_A_TIME", 14_000_000)
    assert torch.equal(scores(small, query), whole)
    assert len(sizes) > 1
    assert max(sizes) > 1


def test_an_exception_on_the_way_leaves_no_trace(tailed: Resources, small: TailAdapter, query: Query) -> None:
    before, answers = deepcopy(tailed.classifier.state_dict()), scores(small, query.rows(0, 3))
    looks = iter([False] * 5)

    def fail() -> bool:
        if next(looks, True):
            raise RuntimeError("the line is dead")
        return False

    with pytest.raises(RuntimeError, match="the line is dead"), torch.no_grad():
        small.adapt(within(query.rows(0, 3), Budget(cancelled=fail)))
    assert all(torch.equal(value, before[name]) for name, value in tailed.classifier.state_dict().items())
    assert torch.equal(scores(small, query.rows(0, 3)), answers)


def test_nothing_is_left_behind(small: TailAdapter, query: Query) -> None:
    short = within(query.rows(1, 3), Budget(max_steps=1))
    check_leaves_nothing(lambda: scores(small, short))


# The budget


@pytest.mark.parametrize("looks", [1, 2, 5, 11])
def test_a_caller_who_leaves_stops_the_work_within_a_step(small: TailAdapter, query: Query, looks: int) -> None:
    adaptations = small.adapt(within(query, Budget(cancelled=allow(looks)))).adaptations
    assert {(fate.steps, fate.stop_reason) for fate in adaptations} == {(looks, "cancelled")}  # a look a step, for all


def test_a_caller_who_leaves_during_the_refit_gets_the_first_fit(tailed: Resources, query: Query) -> None:
    one = query.rows(3, 4)
    first = TailAdapter(resources=tailed, config=replace(SMALL, refit=False))
    both = TailAdapter(resources=tailed, config=SMALL)
    with torch.no_grad():
        adapted = both.adapt(within(one, Budget(cancelled=allow(STEPS + 2))))
    assert (adapted.adaptations[0].steps, adapted.adaptations[0].stop_reason) == (STEPS + 2, "cancelled")
    assert torch.equal(adapted.logits.softmax(1), scores(first, one))
    assert not torch.equal(adapted.logits.softmax(1), scores(both, one))


def test_budgets_are_each_rows_own(small: TailAdapter, query: Query) -> None:
    """The second row never begins, the third leaves on the way, the fourth may make five steps; the others notice
    nothing."""
    budgets = (
        Budget(),
        Budget(deadline=time.monotonic() - 1),
        Budget(cancelled=allow(6)),
        Budget(max_steps=5),
        Budget(),
    )
    with torch.no_grad():
        adapted = small.adapt(within(query.rows(2, 7), *budgets))
    fates = adapted.adaptations
    assert [fate.steps for fate in fates[1:4]] == [0, 6, 5]
    assert [fate.stop_reason for fate in fates[1:4]] == ["deadline", "cancelled", "max_steps"]
    assert fates[1].weights == "base"
    assert torch.equal(adapted.logits[1], query.base.logits[3])
    assert {fate.steps for fate in (fates[0], fates[4])} <= {12, 17, 22, 27}
    alone = scores(small, pick(query, [2, 6]))
    assert torch.equal(adapted.logits[[0, 4]].softmax(1), alone)


class _Downhill:
    """A learner that goes down by 1 a step, with the lowest loss after 5."""

    def gradients(self, weights: torch.Tensor, batch: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones_like(weights), torch.ones(len(weights))

    def losses(self, weights: torch.Tensor, batch: Examples) -> torch.Tensor:
        return (weights[:, 0] + 5).square()


def test_one_rows_ceiling_is_not_where_another_is_judged() -> None:
    """Four steps an epoch: the first row is looked at after 4 and 8, not where the other one has to stop."""
    plan = Plan(settings=TailConfig(learning_rate=1.0, batch_size=4, epochs=3), neighbors=18, held=2, restore_best=True)
    examples = Examples(inputs=torch.zeros(2, 18, 1), labels=torch.zeros(2, 18).long(), weights=torch.ones(2, 18))
    first, second = FineTuning(
        _Downhill(),  # type: ignore[arg-type]
        torch.zeros(3),
        plan,
        load=lambda _: examples,
        budgets=[Budget(), Budget(max_steps=5)],
        seeds=[1, 1],
    ).run()
    assert (first.steps, first.kept, second.steps, second.kept) == (12, 4, 5, 5)
    torch.testing.assert_close(first.weights, torch.full((3,), -4.0))
    torch.testing.assert_close(second.weights, torch.full((3,), -5.0))


@pytest.mark.parametrize("ceiling", [0, 1, 4, 7, 14])
def test_the_step_ceiling_holds_for_each_image(small: TailAdapter, query: Query, ceiling: int) -> None:
    with torch.no_grad():
        adapted = small.adapt(within(query, Budget(max_steps=ceiling)))
    assert {(fate.steps, fate.stop_reason) for fate in adapted.adaptations} == {(min(ceiling, STEPS), "max_steps")}
    if ceiling == 0:
        assert torch.equal(adapted.logits, query.base.logits)


def test_a_deadline_on_the_way_ends_with_what_there_is(tailed: Resources, query: Query) -> None:
    endless = TailAdapter(resources=tailed, config=replace(SMALL, epochs=1000, patience=1000))
    started = time.monotonic()
    with torch.no_grad():
        adapted = endless.adapt(within(query, Budget(deadline=started + 0.5)))
    assert {fate.stop_reason for fate in adapted.adaptations} == {"deadline"}
    assert all(fate.steps > 0 for fate in adapted.adaptations)
    assert adapted.logits.isfinite().all()
    assert time.monotonic() - started < 5


# Do no harm


def test_held_out_neighbours_never_fare_worse(tailed: Resources, query: Query) -> None:
    config = replace(SMALL, learning_rate=0.3)
    with torch.no_grad():
        adapted = TailAdapter(resources=tailed, config=config).adapt(query)
    assert "base" in {fate.weights for fate in adapted.adaptations}
    for fate, logits, base in zip(adapted.adaptations, adapted.logits, query.base.logits, strict=True):
        assert fate.held_out_loss is not None
        before, after = fate.held_out_loss
        assert after < before if fate.weights == "adapted" else after == before and torch.equal(logits, base)


def test_without_activations_it_says_what_to_do(resources: Resources, tailed: Resources) -> None:
    for lacking in (resources, replace(tailed, exemplars=resources.exemplars)):
        with pytest.raises(ModelError, match="stores no activations for a tail; build it with --tail-layer auto"):
            TailAdapter(resources=lacking, config=TailConfig())


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(OptionError, match="batch_size=0"):
        TailConfig(batch_size=0)


# What attackers get


def test_the_surrogate_has_the_gradient_of_the_adapted_tail(exact: Resources, images: torch.Tensor) -> None:
    adapter = TailAdapter(resources=exact, config=SMALL)
    query = ask(exact, images[2:6].double())
    assert query.base.activation is not None
    moving = query.base.activation.clone().requires_grad_()
    adapted = adapter.adapt(replace(query, base=replace(query.base, activation=moving)))
    assert {fate.weights for fate in adapted.adaptations} == {"adapted"}
    (gradient,) = torch.autograd.grad(adapted.logits[:, 3].sum(), moving)
    noise = torch.randn(moving.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(step: float) -> float:
        there = replace(query, base=replace(query.base, activation=moving.detach() + step * noise))
        return float(adapter.adapt(there).logits[:, 3].sum())

    assert float((gradient * noise).sum()) == pytest.approx((value(1e-6) - value(-1e-6)) / 2e-6, rel=1e-4)


# What it is for


def test_recovers_attacked_images(tailed: Resources, digits_test: LabelledImages) -> None:
    pixels, labels = torch.from_numpy(digits_test.images[:30]), torch.from_numpy(digits_test.labels[:30])
    attack = parse_attack("pgd20", epsilon=Epsilon(32))
    found = attack.run(tailed.classifier, pixels, labels, generator=torch.Generator().manual_seed(7))
    query = ask(tailed, to_images(found), 40)
    adapter = TailAdapter(resources=tailed, config=TailConfig(learning_rate=3e-3, batch_size=16, precision="float32"))
    base = float((query.base.logits.argmax(1) == labels).double().mean())
    defended = float((scores(adapter, query).argmax(1) == labels).double().mean())
    assert base < 0.2
    assert defended >= base + 0.5
