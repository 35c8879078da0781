"""RMC on the last layer equals a slow and obvious version of itself, does no harm, keeps to its budget, and repairs the
attack it was built for.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import time
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from head_helpers import allow, predict, slow_head_fit, slow_ridge
from torch.nn import functional as F

from mithridate.attacks import parse_attack
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Prediction, Resources, build_defence, exemplar_scores, head_ridge, rmc_head
from mithridate.defenses.head_adam import AdamConfig
from mithridate.errors import BudgetExceededError, ModelError
from mithridate.models import build_classifier
from mithridate.types import Epsilon, Images, Labels, to_images

COUNT = 80
SOLVERS = ["ridge", "adam"]


@pytest.fixture(scope="module")
def clean(digits_test: LabelledImages) -> Images:
    return to_images(torch.from_numpy(digits_test.images[:COUNT]))


@pytest.fixture(scope="module")
def labels(digits_test: LabelledImages) -> Labels:
    return torch.from_numpy(digits_test.labels[:COUNT])


@pytest.fixture(scope="module")
def attacked(resources: Resources, clean: Images, labels: Labels) -> Images:
    """PGD-20 on the base model, which knows nothing of the defence."""
    attack = parse_attack("pgd20", epsilon=Epsilon(32))
    pixels = (clean * 255).round().to(torch.uint8)
    return to_images(attack.run(resources.classifier, pixels, labels, generator=torch.Generator().manual_seed(7)))


@pytest.fixture(scope="module")
def mixed(clean: Images, attacked: Images) -> Images:
    """28 images, clean and attacked ones in turn."""
    return torch.stack([clean[:14], attacked[:14]], 1).flatten(0, 1)


def relabelled(resources: Resources, labels: torch.Tensor) -> Resources:
    """The same exemplars under other labels."""
    exemplars = copy.copy(resources.exemplars)
    exemplars.labels = labels
    return replace(resources, exemplars=exemplars)


def without_bias(resources: Resources) -> Resources:
    classifier = deepcopy(resources.classifier)
    classifier.head.bias = None
    return replace(resources, classifier=classifier)


def fates(prediction: Prediction) -> list[str]:
    return [a.weights for a in prediction.adaptations if a is not None]


# Equal to the slow loop


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("neighbors", "temperature", "anchor", "held_out"),
    [(256, 0.5, 1e-3, 0.2), (60, 0.0, 0.1, 0.5), (40, 0.1, 1e-2, 0.0)],
)
def test_ridge_equals_the_slow_loop(
    resources: Resources, mixed: Images, neighbors: int, temperature: float, anchor: float, held_out: float, bias: bool
) -> None:
    """More neighbours than features, which are 128 numbers, and fewer."""
    mixed, resources = mixed[:14], resources if bias else without_bias(resources)
    options = f"neighbors={neighbors},temperature={temperature},anchor={anchor},held_out={held_out},gate=0"
    prediction, head = predict(f"rmc:{options}", resources, mixed), deepcopy(resources.classifier.head).double()
    with torch.no_grad():
        queries = resources.classifier.embed(mixed)
    for row, query in enumerate(queries):
        found = resources.index.search(query[None], neighbors)
        ids, squares = found.ids[0], found.distances[0]
        features, truth = resources.exemplars.features[ids].double(), F.one_hot(resources.exemplars.labels[ids], 10)
        missing = truth - head(features).softmax(1)
        heights = -squares / (temperature * squares.mean()) if temperature else torch.zeros_like(squares)
        weights = heights.softmax(0)
        inputs, point = (F.pad(part.double(), (0, 1), value=float(bias)) for part in (features, query))

        held, loss, fate = int(held_out * neighbors), None, prediction.adaptations[row]
        if held:
            rest = weights[held:] / weights[held:].sum()
            guess = slow_ridge(inputs[held:], missing[held:], rest, inputs[:held], anchor)
            errors, shares = (missing[:held], missing[:held] - guess), weights[:held] / weights[:held].sum()
            loss = tuple(float((error.square().sum(1) * shares).sum()) for error in errors)
        base = head(query.double()).softmax(0)
        falls_back = loss is not None and loss[1] > loss[0]
        shares = base + slow_ridge(inputs, missing, weights, point, anchor)
        positive = (shares + (shares**2 + 1e-6).sqrt()) / 2
        fitted = positive / positive.sum()

        assert fate is not None
        assert (fate.steps, fate.stop_reason) == (1, "converged")
        assert fate.weights == ("base" if falls_back else "adapted")
        assert fate.held_out_loss == (None if loss is None else pytest.approx(loss, rel=1e-4, abs=1e-8))
        wanted = (base if falls_back else fitted).float()
        torch.testing.assert_close(prediction.scores[row], wanted, rtol=0, atol=1e-5)
        neighborhood = prediction.neighborhoods[row]
        assert neighborhood is not None
        assert torch.equal(neighborhood.ids, ids)
    assert set(fates(prediction)) == ({"adapted", "base"} if held_out else {"adapted"})


@pytest.mark.parametrize("config", [AdamConfig(steps=30), AdamConfig(held_out=0, steps=15, anchor=0.05)])
def test_adam_equals_the_slow_loop(resources: Resources, mixed: Images, config: AdamConfig) -> None:
    options = f"neighbors=60,steps={config.steps},held_out={config.held_out},anchor={config.anchor},gate=0"
    prediction = predict(f"rmc:solver=adam,{options}", resources, mixed[:10])
    with torch.no_grad():
        queries = resources.classifier.embed(mixed[:10])
    for row, query in enumerate(queries):
        ids = resources.index.search(query[None], 60).ids[0]
        tuned, steps, first = slow_head_fit(
            resources.exemplars.features[ids],
            resources.exemplars.labels[ids],
            torch.full((60,), 1 / 60, dtype=torch.float64),
            resources.classifier.head,
            config,
        )
        fate = prediction.adaptations[row]
        assert fate is not None
        assert (fate.steps, fate.stop_reason) == (steps, first.reason)
        assert fate.weights == ("adapted" if first.kept else "base")
        torch.testing.assert_close(prediction.scores[row], tuned(query.double()).softmax(0).float(), rtol=0, atol=1e-6)
    assert len({a.steps for a in prediction.adaptations if a is not None}) > 1


# Whoever else is asking


@pytest.mark.parametrize(
    "text", ["rmc", "rmc:balanced=true,radius=5,gate=0.3,mix=0.1", "rmc:solver=adam,neighbors=48,steps=20"]
)
def test_alone_together_and_in_any_order_the_answer_is_the_same(resources: Resources, mixed: Images, text: str) -> None:
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(1))
    together, shuffled = predict(text, resources, mixed), predict(text, resources, mixed[order])
    torch.testing.assert_close(shuffled.scores, together.scores[order], rtol=0, atol=1e-6)
    for row in range(0, len(mixed), 3):
        alone = predict(text, resources, mixed[row : row + 1])
        torch.testing.assert_close(alone.scores[0], together.scores[row], rtol=0, atol=1e-6)
        here, there = alone.adaptations[0], together.adaptations[row]
        assert here is not None
        assert there is not None
        assert (here.steps, here.stop_reason, here.weights) == (there.steps, there.stop_reason, there.weights)
        assert here.held_out_loss == pytest.approx(there.held_out_loss, rel=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_large_request_is_fitted_in_parts_with_the_same_answers(
    resources: Resources, mixed: Images, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    text = "rmc:neighbors=64" if solver == "ridge" else "rmc:solver=adam,neighbors=48,steps=10"
    whole = predict(text, resources, mixed)
    module = head_ridge if solver == "ridge" else rmc_head
    for numbers in (1, 100_000):
        monkeypatch.setattr(module, "_NUMBERS_AT_A_TIME", numbers)
        parts = predict(text, resources, mixed)
        torch.testing.assert_close(parts.scores, whole.scores, rtol=0, atol=1e-6)
        assert fates(parts) == fates(whole)
        assert [a.steps for a in parts.adaptations if a] == [a.steps for a in whole.adaptations if a]


def test_scores_of_exemplars_that_are_too_many_to_keep_are_computed_on_the_way(
    resources: Resources, mixed: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = predict("rmc", resources, mixed)
    monkeypatch.setattr(exemplar_scores, "_NUMBERS_KEPT", 0)
    torch.testing.assert_close(predict("rmc", resources, mixed).scores, kept.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_base_weights_are_not_touched(resources: Resources, mixed: Images, solver: str) -> None:
    def fingerprint() -> str:
        digest = hashlib.sha256()
        shared = [*resources.classifier.state_dict().values(), resources.exemplars.features, resources.exemplars.labels]
        for tensor in shared:
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    before, text = fingerprint(), f"rmc:solver={solver},neighbors=24"
    first = predict(text, resources, mixed)
    predict(text, resources, mixed, Budget(cancelled=allow(3)))
    asked = mixed[:4].clone().requires_grad_()
    defence = build_defence(text, resources)
    defence.surrogate(asked, generator=torch.Generator(), budget=Budget()).sum().backward()
    assert fingerprint() == before
    assert not any(p.requires_grad or p.grad is not None for p in resources.classifier.parameters())
    assert torch.equal(predict(text, resources, mixed).scores, first.scores)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_images_are_no_error(resources: Resources, clean: Images, solver: str) -> None:
    prediction = predict(f"rmc:solver={solver}", resources, clean[:0])
    assert prediction.scores.shape == (0, 10)
    assert prediction.adaptations == prediction.neighborhoods == ()


def test_a_network_without_a_head_says_what_to_use_instead(resources: Resources) -> None:
    headless = replace(resources, classifier=build_classifier("squeezenet1_1", num_classes=10, image_shape=(3, 32, 32)))
    for solver in SOLVERS:
        with pytest.raises(ModelError, match="use rmc:scope=all"):
            build_defence(f"rmc:solver={solver}", headless)


# Do no harm


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_the_neighbours_cannot_confirm_is_not_served(resources: Resources, mixed: Images, solver: str) -> None:
    """Labels drawn by lot teach nothing that holds for the nearest fifth."""
    lots = torch.randint(10, resources.exemplars.labels.shape, generator=torch.Generator().manual_seed(0))
    noisy, text = relabelled(resources, lots), f"rmc:solver={solver},neighbors=64,gate=0,learning_rate=1"
    text = text if solver == "adam" else "rmc:neighbors=64,gate=0,anchor=1e-6"
    prediction = predict(text, noisy, mixed)
    fell_back = torch.tensor([fate == "base" for fate in fates(prediction)])
    assert fell_back.double().mean() > 0.5
    assert torch.equal(prediction.scores[fell_back], prediction.base_scores[fell_back])
    assert (prediction.scores[~fell_back] != prediction.base_scores[~fell_back]).any(1).all()
    for fate in prediction.adaptations:
        assert fate is not None
        assert fate.held_out_loss is not None
        before, after = fate.held_out_loss
        if solver == "ridge":
            assert (fate.weights == "base") == (after > before)
        else:
            assert (fate.weights == "base") == (after == before)  # the best it came by was where it began
    free = predict(f"{text},held_out=0", noisy, mixed)
    assert set(fates(free)) == {"adapted"}
    assert all(fate is not None and fate.held_out_loss is None for fate in free.adaptations)


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_the_neighbours_confirm_is_served(resources: Resources, clean: Images, solver: str) -> None:
    """Under consistently wrong labels nothing speaks for the base model any more."""
    turned = relabelled(resources, (resources.exemplars.labels + 1) % 10)
    prediction = predict(f"rmc:solver={solver},neighbors=64,gate=0.05", turned, clean[:40])
    assert set(fates(prediction)) == {"adapted"}
    for fate in prediction.adaptations:
        assert fate is not None
        assert fate.held_out_loss is not None
        assert fate.held_out_loss[1] < fate.held_out_loss[0]
    followed = prediction.scores.argmax(1) == (prediction.base_scores.argmax(1) + 1) % 10
    assert followed.double().mean() > 0.9


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_that_has_no_neighbours_within_the_radius_is_answered_by_the_base(
    resources: Resources, mixed: Images, solver: str
) -> None:
    defence = f"rmc:solver={solver},neighbors=30,gate=0"
    free = predict(f"{defence},held_out=0", resources, mixed)
    nearest = torch.stack([n.distances[0].sqrt() for n in free.neighborhoods if n is not None])
    radius = float(nearest.median())
    prediction = predict(f"{defence},held_out=0,radius={radius}", resources, mixed)
    for row, fate in enumerate(prediction.adaptations):
        assert fate is not None
        neighborhood = prediction.neighborhoods[row]
        assert neighborhood is not None
        assert len(neighborhood.ids) == sum(neighborhood.label_counts.values())
        assert (neighborhood.distances.sqrt() <= radius).all()  # the others had no say
        assert (len(neighborhood.ids) == 0) == bool(nearest[row] > radius)
        if nearest[row] > radius:
            assert (fate.steps, fate.weights, fate.held_out_loss) == (0, "base", None)
            assert torch.equal(prediction.scores[row], prediction.base_scores[row])
        else:
            assert fate.weights == ("adapted" if fate.steps else "base")
    assert 0 < fates(prediction).count("base") < len(mixed)


def test_the_anchor_holds_the_answer_to_the_base(resources: Resources, mixed: Images) -> None:
    apart = []
    for anchor in (1e-3, 1e-1, 1e1, 1e3, 1e9):
        prediction = predict(f"rmc:held_out=0,gate=0,anchor={anchor}", resources, mixed)
        apart.append((prediction.scores - prediction.base_scores).abs().sum(1))
    assert all(stronger.mean() < 0.95 * weaker.mean() for weaker, stronger in itertools.pairwise(apart))
    assert apart[0].mean() > 0.5
    assert apart[-1].max() < 0.01  # what rounding negative shares off does to ten classes
    assert torch.equal(prediction.scores.argmax(1), prediction.base_scores.argmax(1))


# The budget


def test_the_surrogate_looks_at_the_budget_too(resources: Resources, clean: Images) -> None:
    defence, generator = build_defence("rmc", resources), torch.Generator()
    with pytest.raises(BudgetExceededError, match="cancelled"):
        defence.surrogate(clean[:1], generator=generator, budget=Budget(cancelled=lambda: True))


@pytest.mark.parametrize("text", ["none", "webnn", "deepnn", "rmc", "rmc:solver=adam"])
def test_no_answer_is_made_after_the_deadline(resources: Resources, clean: Images, text: str) -> None:
    with pytest.raises(BudgetExceededError, match="deadline") as caught:
        predict(text, resources, clean[:1], Budget(deadline=time.monotonic() - 1))
    assert caught.value.reason == "deadline"
    with pytest.raises(BudgetExceededError, match="cancelled"):
        predict(text, resources, clean[:1], Budget(cancelled=allow(0)))


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (lambda: Budget(max_steps=0), "max_steps"),
        (lambda: Budget(cancelled=allow(1)), "cancelled"),
        (lambda: Budget(max_steps=0, cancelled=allow(1)), "cancelled"),
    ],
)
@pytest.mark.parametrize("text", ["rmc", "rmc:solver=adam,held_out=0,tolerance=0"])
def test_without_a_step_the_answer_is_the_bases(
    resources: Resources, mixed: Images, text: str, budget: object, reason: str
) -> None:
    assert callable(budget)
    prediction = predict(text, resources, mixed, budget())
    assert {(a.steps, a.stop_reason) for a in prediction.adaptations if a} == {(0, reason)}
    torch.testing.assert_close(prediction.scores, prediction.base_scores, rtol=0, atol=1e-6)
    if text == "rmc":
        assert set(fates(prediction)) == {"base"}
        assert torch.equal(prediction.scores, prediction.base_scores)


def test_a_ceiling_of_one_step_is_enough_for_the_closed_form(resources: Resources, mixed: Images) -> None:
    free = predict("rmc", resources, mixed)
    for ceiling in (1, 10_000):
        assert torch.equal(predict("rmc", resources, mixed, Budget(max_steps=ceiling)).scores, free.scores)


@pytest.mark.parametrize("looks", [2, 5, 11])
def test_a_caller_who_leaves_stops_the_work_within_a_step(resources: Resources, attacked: Images, looks: int) -> None:
    text, budget = "rmc:solver=adam,tolerance=0,steps=40,held_out=0", Budget(cancelled=allow(looks))
    prediction = predict(text, resources, attacked[:3], budget)
    # One look before the start, one before each step, whatever the number of images.
    assert {(a.steps, a.stop_reason) for a in prediction.adaptations if a} == {(looks - 1, "cancelled")}
    assert torch.isfinite(prediction.scores).all()


def test_a_deadline_on_the_way_ends_with_what_there_is(resources: Resources, attacked: Images) -> None:
    text, started = "rmc:solver=adam,tolerance=0,steps=10000,neighbors=64,held_out=0", time.monotonic()
    prediction = predict(text, resources, attacked[:1], Budget(deadline=started + 0.2))
    (adaptation,) = prediction.adaptations
    assert adaptation is not None
    assert adaptation.stop_reason == "deadline"
    assert 0 < adaptation.steps < 10_000
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("ceiling", [1, 4, 20, 35])
@pytest.mark.parametrize("held_out", [0, 0.2])
def test_the_step_ceiling_holds_for_each_image(
    resources: Resources, attacked: Images, ceiling: int, held_out: float
) -> None:
    text = f"rmc:solver=adam,neighbors=64,tolerance=0,steps=20,held_out={held_out}"
    prediction = predict(text, resources, attacked[:4], Budget(max_steps=ceiling))
    steps = [a.steps for a in prediction.adaptations if a is not None]
    assert max(steps) <= ceiling
    if not held_out:
        assert steps == [min(20, ceiling)] * 4
        assert {a.stop_reason for a in prediction.adaptations if a} == {"max_steps"}


# The attacker's path


@pytest.mark.parametrize("options", ["", ",temperature=0", ",radius=4", ",anchor=0.1,mix=0.3"])
def test_the_closed_form_has_the_gradient_of_its_answer(resources: Resources, attacked: Images, options: str) -> None:
    """From the pixels, through weights and fit, in float64; the neighbours stay the same for so small a step."""
    exact = replace(resources, classifier=deepcopy(resources.classifier).double())
    defence = build_defence(f"rmc:neighbors=24,held_out=0,gate=0{options}", exact)
    image = attacked[:1].double().clamp(0.1, 0.9).requires_grad_()

    def answer(image: torch.Tensor) -> torch.Tensor:
        return defence.surrogate(image, generator=torch.Generator(), budget=Budget())[:, :3]

    assert torch.autograd.gradcheck(answer, (image,), eps=1e-5, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("options", ["", ":radius=3", ":temperature=0.001", ":radius=0.001", ":solver=adam,steps=5"])
def test_the_gradient_is_a_number_for_every_image(resources: Resources, mixed: Images, options: str) -> None:
    """Also where neighbours count for nothing at all: an attack must not stop there."""
    asked = mixed.clone().requires_grad_()
    logits = build_defence(f"rmc{options}", resources).surrogate(asked, generator=torch.Generator(), budget=Budget())
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmin(1)), asked)
    assert torch.isfinite(gradient).all()
    assert gradient.flatten(1).any(1).all()


# What it is for


def test_recovers_most_of_what_a_static_attack_takes(
    resources: Resources, clean: Images, attacked: Images, labels: Labels
) -> None:
    def right(text: str, images: Images) -> float:
        return float((predict(text, resources, images).scores.argmax(1) == labels).double().mean())

    base, base_attacked = right("none", clean), right("none", attacked)
    assert base > 0.95
    assert base_attacked < 0.2
    for text, clean_cost in (("rmc", 0.03), ("rmc:solver=adam,neighbors=64,steps=30,held_out=0", 0.05)):
        assert right(text, attacked) >= base_attacked + 0.5
        assert right(text, clean) >= base - clean_cost


@pytest.mark.parametrize("text", ["rmc", "rmc:solver=adam,neighbors=64,steps=10"])
def test_an_attacker_who_knows_the_defence_does_better(
    resources: Resources, attacked: Images, clean: Images, labels: Labels, text: str
) -> None:
    """The surrogate is a path to the defended answer: PGD along it beats the static attack. No gain is for free."""
    defence, count = build_defence(text, resources), 16
    generator = torch.Generator().manual_seed(0)
    found = parse_attack("pgd10", epsilon=Epsilon(32)).run(
        lambda images: defence.surrogate(images, generator=generator, budget=Budget()),
        (clean[:count] * 255).round().to(torch.uint8),
        labels[:count],
        generator=generator,
    )
    static, adaptive = (
        float((predict(text, resources, images).scores.argmax(1) == labels[:count]).double().mean())
        for images in (attacked[:count], to_images(found))
    )
    assert adaptive <= static - 0.2
