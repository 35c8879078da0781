"""All weights: what the published procedure computes, without what it costs, and without a trace."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from scope_helpers import ByHand, allow, ask, check_leaves_nothing, check_rows_do_not_mix, scores, within

from benchmarks.reference_rmc import Published, ReferenceRMC
from mithridate.attacks import parse_attack
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Resources, build_defence
from mithridate.defenses.adapting import Query
from mithridate.defenses.fine_tuning import FineTuning, Plan
from mithridate.defenses.learner import Examples
from mithridate.defenses.rmc_all import AllAdapter, AllConfig
from mithridate.errors import OptionError
from mithridate.types import Epsilon, to_images

SMALL = AllConfig(epochs=3, batch_size=8, learning_rate=1e-3, precision="float32")


@pytest.fixture(scope="module")
def images(resources: Resources, digits_test: LabelledImages) -> torch.Tensor:
    """Two clean images and eight attacked ones."""
    pixels, labels = torch.from_numpy(digits_test.images[:10]), torch.from_numpy(digits_test.labels[:10])
    attack = parse_attack("pgd20", epsilon=Epsilon(32))
    found = attack.run(resources.classifier, pixels, labels, generator=torch.Generator().manual_seed(7))
    return torch.cat([to_images(pixels[:2]), to_images(found[2:])])


@pytest.fixture(scope="module")
def query(resources: Resources, images: torch.Tensor) -> Query:
    return ask(resources, images[:4])


@pytest.fixture(scope="module")
def exact(resources: Resources) -> Resources:
    """In float64, where rounding cannot hide a difference."""
    return replace(resources, classifier=deepcopy(resources.classifier).double())


@pytest.fixture(scope="module")
def small(resources: Resources) -> AllAdapter:
    return AllAdapter(resources=resources, config=SMALL)


# The same as by hand


@pytest.mark.parametrize(
    ("rate", "epochs", "patience", "double"),
    [(2.5e-5, 4, 5, False), (2.5e-5, 4, 5, True), (1e-3, 3, 5, True), (3e-3, 30, 2, True)],
)
def test_equals_the_published_procedure(
    resources: Resources, exact: Resources, images: torch.Tensor, rate: float, epochs: int, patience: int, double: bool
) -> None:
    """Exactly in float64; in float32 Adam makes a whole step of a rounding error where a gradient is zero."""
    published = Published(
        neighbors=90, learning_rate=rate, batch_size=16, epochs=epochs, patience=patience, held_out=0.2
    )
    config = AllConfig(
        learning_rate=rate, batch_size=16, epochs=epochs, patience=patience, restore="last", precision="float32"
    )
    chosen, images = (exact, images.double()) if double else (resources, images)
    adapter, query = AllAdapter(resources=chosen, config=config), ask(chosen, images, 90)
    with torch.no_grad():
        adapted = adapter.adapt(query)
    reference = ReferenceRMC(chosen, published, carry=False)
    for row, image in enumerate(images):
        logits = reference.predict(image, torch.Generator().manual_seed(query.seeds[row]))
        assert int(adapted.logits[row].argmax()) == int(logits.argmax())
        torch.testing.assert_close(adapted.logits[row], logits, rtol=0, atol=1e-6 if double else 1e-3)
        assert adapted.adaptations[row].steps == 5 * reference.epochs
        assert adapted.adaptations[row].stop_reason == ("patience" if reference.epochs < epochs else "max_steps")


SETTINGS = {
    "several batches": AllConfig(learning_rate=1e-3, epochs=3, batch_size=10, patience=2),
    "patience": AllConfig(learning_rate=3e-2, epochs=12, batch_size=64, patience=2),
    "tolerance": AllConfig(learning_rate=3e-3, epochs=30, batch_size=16, tolerance=0.2),
    "anchor": AllConfig(learning_rate=3e-3, epochs=4, batch_size=16, anchor=0.3),
    "nothing held out": AllConfig(learning_rate=1e-3, epochs=2, batch_size=16, held_out=0),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_fine_tuning_by_hand(exact: Resources, images: torch.Tensor, name: str, weighted: bool) -> None:
    config, classifier = SETTINGS[name], exact.classifier
    query = ask(exact, images[1:5].double(), 40)
    if weighted:
        weights = torch.rand(4, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        query = replace(query, selection=replace(query.selection, weights=weights / weights.sum(1, keepdim=True)))
    with torch.no_grad():
        adapted = AllAdapter(resources=exact, config=config).adapt(query)
    by_hand = ByHand(
        rate=config.learning_rate,
        epochs=config.epochs,
        batch_size=config.batch_size,
        patience=config.patience,
        tolerance=config.tolerance,
        anchor=config.anchor,
    )
    reasons = set()
    for row, fate in enumerate(adapted.adaptations):
        ids, network = query.selection.ids[row], classifier.private_network()
        inputs, labels = classifier.normalise(to_images(exact.exemplars.pixels(ids))), exact.exemplars.labels[ids]
        held = int(config.held_out * 40)
        kept, steps, reason = by_hand.tune(
            network, inputs, labels, query.selection.weights[row], held, query.seeds[row]
        )
        with torch.no_grad():
            logits = network(classifier.normalise(query.images[row : row + 1]))[0]
        torch.testing.assert_close(adapted.logits[row], logits, rtol=1e-6, atol=1e-6)
        assert (fate.steps, fate.stop_reason, fate.weights) == (steps, reason, "adapted" if kept else "base")
        if held:
            assert fate.held_out_loss is not None
            weights = query.selection.weights[row]
            now = by_hand.held_out(network, inputs, labels, weights, held)
            assert fate.held_out_loss == pytest.approx(
                (by_hand.held_out(classifier.network, inputs, labels, weights, held), now)
            )
        reasons.add(reason)
    wanted = {"patience": "patience", "tolerance": "converged"}.get(name, "max_steps")
    assert wanted in reasons


def test_bfloat16_answers_much_the_same(resources: Resources, images: torch.Tensor, query: Query) -> None:
    rounded = AllAdapter(resources=resources, config=replace(SMALL, precision="bfloat16"))
    answer, sharp = scores(rounded, query), scores(AllAdapter(resources=resources, config=SMALL), query)
    assert not torch.equal(answer, sharp)
    torch.testing.assert_close(answer, sharp, rtol=0, atol=0.1)


# No trace


def test_rows_do_not_mix(resources: Resources, small: AllAdapter, query: Query) -> None:
    check_rows_do_not_mix(small, query, resources.classifier)


def test_the_seed_decides(small: AllAdapter, query: Query) -> None:
    other = replace(query, seeds=(99,) * len(query))
    assert not torch.equal(scores(small, query), scores(small, other))  # another order of the exemplars


def test_an_exception_on_the_way_leaves_no_trace(resources: Resources, small: AllAdapter, query: Query) -> None:
    before, answers = deepcopy(resources.classifier.state_dict()), scores(small, query)
    looks = iter([False] * 5)

    def fail() -> bool:
        if next(looks, True):
            raise RuntimeError("the line is dead")
        return False

    with pytest.raises(RuntimeError, match="the line is dead"), torch.no_grad():
        small.adapt(within(query, Budget(cancelled=fail)))
    assert all(torch.equal(value, before[name]) for name, value in resources.classifier.state_dict().items())
    assert torch.equal(scores(small, query), answers)


def test_nothing_is_left_behind(small: AllAdapter, query: Query) -> None:
    short = within(query.rows(1, 2), Budget(max_steps=1))
    check_leaves_nothing(lambda: scores(small, short))


# The budget


@pytest.mark.parametrize("looks", [1, 2, 5, 11])
def test_a_caller_who_leaves_stops_the_work_within_a_step(small: AllAdapter, query: Query, looks: int) -> None:
    (fate,) = small.adapt(within(query.rows(1, 2), Budget(cancelled=allow(looks)))).adaptations
    assert (fate.steps, fate.stop_reason) == (looks, "cancelled")  # one look before each step


def test_rows_that_were_not_begun_say_so_and_keep_the_base_answer(small: AllAdapter, query: Query) -> None:
    """12 steps a row: with 15 looks at one budget the second row is on its way and the third is never begun."""
    gone = Budget(cancelled=allow(15))
    with torch.no_grad():
        adapted = small.adapt(within(query, gone, gone, gone, Budget()))
    assert [fate.steps for fate in adapted.adaptations] == [12, 3, 0, 12]
    assert [fate.stop_reason for fate in adapted.adaptations] == ["max_steps", "cancelled", "cancelled", "max_steps"]
    assert adapted.adaptations[2].weights == "base"
    assert torch.equal(adapted.logits[2], query.base.logits[2])
    alone = scores(small, query)
    assert torch.equal(adapted.logits[[0, 3]].softmax(1), alone[[0, 3]])


@pytest.mark.parametrize("restore", ["best", "last"])
@pytest.mark.parametrize("ceiling", [0, 1, 4, 7])
def test_the_step_ceiling_holds_for_each_image(resources: Resources, query: Query, ceiling: int, restore: str) -> None:
    config = AllConfig(epochs=3, batch_size=8, learning_rate=1e-3, restore="best" if restore == "best" else "last")
    adapter = AllAdapter(resources=resources, config=config)
    with torch.no_grad():
        adapted = adapter.adapt(within(query, Budget(max_steps=ceiling)))
    assert [(fate.steps, fate.stop_reason) for fate in adapted.adaptations] == [(ceiling, "max_steps")] * 4
    if ceiling == 0:
        assert torch.equal(adapted.logits, query.base.logits)
        assert {fate.weights for fate in adapted.adaptations} == {"base"}
    else:
        assert "adapted" in {fate.weights for fate in adapted.adaptations}


def test_a_deadline_on_the_way_ends_with_what_there_is(resources: Resources, query: Query) -> None:
    endless = AllAdapter(resources=resources, config=replace(SMALL, epochs=1000, patience=1000))
    started = time.monotonic()
    with torch.no_grad():
        adapted = endless.adapt(within(query.rows(1, 2), Budget(deadline=started + 0.5)))
    assert adapted.adaptations[0].stop_reason == "deadline"
    assert adapted.adaptations[0].steps > 0
    assert adapted.logits.isfinite().all()
    assert time.monotonic() - started < 5


# Do no harm


def test_held_out_neighbours_never_fare_worse(resources: Resources, query: Query) -> None:
    config = AllConfig(epochs=4, batch_size=8, learning_rate=3.0)
    with torch.no_grad():
        adapted = AllAdapter(resources=resources, config=config).adapt(query)
    assert "base" in {fate.weights for fate in adapted.adaptations}
    for fate, logits, base in zip(adapted.adaptations, adapted.logits, query.base.logits, strict=True):
        assert fate.held_out_loss is not None
        before, after = fate.held_out_loss
        assert after < before if fate.weights == "adapted" else after == before and torch.equal(logits, base)


class _Nowhere:
    """A learner whose gradients are not numbers."""

    def gradients(self, weights: torch.Tensor, batch: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        return weights * torch.nan, weights.sum(1) * torch.nan

    def losses(self, weights: torch.Tensor, batch: Examples) -> torch.Tensor:
        return weights.sum(1)


@pytest.mark.parametrize("held", [0, 4])
@pytest.mark.parametrize("restore_best", [True, False])
def test_weights_that_are_not_numbers_do_not_answer(held: int, restore_best: bool) -> None:
    examples = Examples(inputs=torch.zeros(1, 20, 3), labels=torch.zeros(1, 20).long(), weights=torch.ones(1, 20))
    plan = Plan(settings=SMALL, neighbors=20, held=held, restore_best=restore_best)
    start = torch.arange(5.0)
    tuning = FineTuning(_Nowhere(), start, plan, load=lambda _: examples, budgets=[Budget()], seeds=[1])  # type: ignore[arg-type]
    (tuned,) = tuning.run()
    assert tuned.adaptation.weights == "base"
    assert torch.equal(tuned.weights, start)


def test_neighbours_that_count_for_nothing_teach_nothing(small: AllAdapter, query: Query) -> None:
    weights = torch.zeros_like(query.selection.weights)
    weights[:, 0] = 1  # it is held out
    with torch.no_grad():
        adapted = small.adapt(replace(query, selection=replace(query.selection, weights=weights)))
    assert {(fate.steps, fate.stop_reason, fate.weights) for fate in adapted.adaptations} == {(0, "converged", "base")}


@pytest.mark.parametrize("option", ["learning_rate=0", "epochs=0", "held_out=0.95", "restore=worst", "precision=int8"])
def test_options_out_of_range_are_refused(resources: Resources, option: str) -> None:
    with pytest.raises(OptionError, match=option.split("=")[0]):
        build_defence(f"rmc:scope=all,{option}", resources)


# What attackers get


def test_the_surrogate_has_the_gradient_of_the_adapted_network(exact: Resources, images: torch.Tensor) -> None:
    adapter = AllAdapter(resources=exact, config=SMALL)
    query = ask(exact, images[2:5].double())
    moving = query.images.clone().requires_grad_()
    adapted = adapter.adapt(replace(query, images=moving))
    assert {fate.weights for fate in adapted.adaptations} == {"adapted"}
    (gradient,) = torch.autograd.grad(adapted.logits[:, 3].sum(), moving)
    step = 1e-6 * torch.randn(moving.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    there, back = (adapter.adapt(replace(query, images=query.images + s)).logits[:, 3].sum() for s in (step, -step))
    assert float((gradient * step).sum()) == pytest.approx(float(there - back) / 2, rel=1e-4)
