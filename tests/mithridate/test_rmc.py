"""RMC equals a slow and obvious version of itself, keeps to its budget, and repairs the attack it was built for."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mithridate.attacks import parse_attack
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Prediction, Resources, build_defence, rmc_head
from mithridate.defenses.rmc_head import HeadFit, RMCHeadConfig, fit_heads
from mithridate.errors import BudgetExceededError, ModelError
from mithridate.models import build_classifier
from mithridate.types import Epsilon, to_images


@pytest.fixture(scope="module")
def clean(digits_test: LabelledImages) -> torch.Tensor:
    return to_images(torch.from_numpy(digits_test.images[:200]))


@pytest.fixture(scope="module")
def labels(digits_test: LabelledImages) -> torch.Tensor:
    return torch.from_numpy(digits_test.labels[:200])


@pytest.fixture(scope="module")
def attacked(resources: Resources, clean: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """PGD-20 on the base model, which knows nothing of the defence."""
    attack = parse_attack("pgd20", epsilon=Epsilon(32))
    pixels = (clean * 255).round().to(torch.uint8)
    return to_images(attack.run(resources.classifier, pixels, labels, generator=torch.Generator().manual_seed(7)))


def predict(text: str, resources: Resources, images: torch.Tensor, budget: Budget | None = None) -> Prediction:
    defence = build_defence(text, resources)
    return defence.predict(images, generator=torch.Generator().manual_seed(3), budget=budget or Budget())


def allow(checks: int) -> Callable[[], bool]:
    """A caller who is gone after so many looks at the budget."""
    left = iter([False] * checks)
    return lambda: next(left, True)


# The last layer


def slow_head_fit(
    features: torch.Tensor, labels: torch.Tensor, head: nn.Linear, config: RMCHeadConfig
) -> tuple[nn.Linear, int, str]:
    """One image, one head, torch's own Adam and gradients."""
    tuned = deepcopy(head).double().requires_grad_(True)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=config.learning_rate)
    for step in range(config.steps + 1):
        loss = F.cross_entropy(tuned(features.double()), labels)
        if loss < config.tolerance:
            return tuned, step, "converged"
        if step < config.steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return tuned, config.steps, "max_steps"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        RMCHeadConfig(),
        RMCHeadConfig(learning_rate=0.01, steps=20, tolerance=0.5),
        RMCHeadConfig(steps=3, tolerance=0),
        RMCHeadConfig(tolerance=100),
    ],
)
def test_heads_equal_one_by_one_training_with_torch(config: RMCHeadConfig, bias: bool) -> None:
    """A batch in which rows converge at different steps, at once, or never."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(12, 4, bias=bias).requires_grad_(False)
    centres = torch.randn(4, 12, generator=generator)
    labels = torch.randint(4, (9, 30), generator=generator)
    noise = torch.linspace(0, 2, 9)[:, None, None] * torch.randn(9, 30, 12, generator=generator)
    features = centres[labels] + noise
    labels[8] = head(features[8]).argmax(1)
    fit = fit_heads(features, labels, head, config, Budget())
    queries = torch.randn(9, 12, generator=generator)
    logits = fit.logits(queries)
    for row in range(9):
        tuned, steps, reason = slow_head_fit(features[row], labels[row], head, config)
        torch.testing.assert_close(logits[row], tuned(queries[row].double()), rtol=0, atol=1e-6)
        assert (fit.adaptations[row].steps, fit.adaptations[row].stop_reason) == (steps, reason)


def test_predictions_equal_the_slow_loop(resources: Resources, clean: torch.Tensor, attacked: torch.Tensor) -> None:
    images = torch.cat([clean[:6], attacked[:14]])
    prediction, config = predict("rmc", resources, images), RMCHeadConfig()
    steps = []
    with torch.no_grad():
        embedding = resources.classifier.embed(images)
    for row, image in enumerate(embedding):
        ids = resources.index.search(image[None], config.neighbors).ids[0]
        neighborhood, adaptation = prediction.neighborhoods[row], prediction.adaptations[row]
        assert neighborhood is not None
        assert adaptation is not None
        assert torch.equal(neighborhood.ids, ids)
        tuned, wanted_steps, reason = slow_head_fit(
            resources.exemplars.features[ids], resources.exemplars.labels[ids], resources.classifier.head, config
        )
        scores = tuned(image.double()).softmax(0).float()
        torch.testing.assert_close(prediction.scores[row], scores, rtol=0, atol=1e-6)
        assert (adaptation.steps, adaptation.stop_reason) == (wanted_steps, reason)
        steps.append(wanted_steps)
    assert len(set(steps)) > 2  # the batch really did end at different times


def test_a_large_request_is_fitted_in_parts_with_the_same_answers(
    resources: Resources, attacked: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predict("rmc", resources, attacked[:20])
    monkeypatch.setattr(rmc_head, "_NUMBERS_AT_A_TIME", 250_000)  # seven images at a time
    parts = predict("rmc", resources, attacked[:20])
    torch.testing.assert_close(parts.scores, whole.scores, rtol=0, atol=1e-6)
    assert parts.adaptations == whole.adaptations


def test_a_network_without_a_head_says_what_to_use_instead(resources: Resources) -> None:
    headless = build_classifier("squeezenet1_1", num_classes=10, image_shape=(3, 32, 32))
    with pytest.raises(ModelError, match="use rmc:scope=all"):
        build_defence("rmc", replace(resources, classifier=headless))


# All weights


def slow_all(
    resources: Resources, image: torch.Tensor, *, neighbors: int, rate: float, epochs: int, patience: int
) -> tuple[torch.Tensor, int, str]:
    """The published procedure with one batch an epoch, so that the order of the exemplars does not matter."""
    classifier, exemplars = resources.classifier, resources.exemplars
    with torch.no_grad():
        ids = resources.index.search(classifier.embed(image[None]), neighbors).ids[0]
    inputs, labels = classifier.normalise(exemplars.pixels(ids).float() / 255), exemplars.labels[ids]
    nearest = neighbors // 5
    network = deepcopy(classifier.network).requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)

    def held_out() -> float:
        with torch.no_grad():
            return F.cross_entropy(network(inputs[:nearest]), labels[:nearest]).item()

    best, weights, waited, epoch, reason = held_out(), deepcopy(network.state_dict()), 0, 0, "max_steps"
    while epoch < epochs:
        epoch += 1
        optimizer.zero_grad()
        F.cross_entropy(network(inputs[nearest:]), labels[nearest:]).backward()
        optimizer.step()
        loss = held_out()
        if loss < best:
            best, weights, waited = loss, deepcopy(network.state_dict()), 0
        else:
            waited += 1
        if waited == patience:
            reason = "patience"
            break
    network.load_state_dict(weights)
    with torch.no_grad():
        return network(classifier.normalise(image[None]))[0].softmax(0), epoch, reason


@pytest.mark.parametrize(("rate", "epochs"), [(5e-4, 3), (3e-2, 12)])
def test_all_weights_equal_the_slow_procedure(
    resources: Resources, clean: torch.Tensor, attacked: torch.Tensor, rate: float, epochs: int
) -> None:
    """In float64, where rounding cannot hide a difference."""
    exact = replace(resources, classifier=deepcopy(resources.classifier).double())
    images = torch.cat([clean[:1], attacked[:3]]).double()
    options = f"neighbors=20,learning_rate={rate},epochs={epochs},batch_size=64,patience=2"
    prediction = predict(f"rmc:scope=all,{options}", exact, images)
    reasons, moved = set(), 0
    for row, image in enumerate(images):
        scores, steps, reason = slow_all(exact, image, neighbors=20, rate=rate, epochs=epochs, patience=2)
        torch.testing.assert_close(prediction.scores[row].double(), scores, rtol=0, atol=1e-6)
        adaptation = prediction.adaptations[row]
        assert adaptation is not None
        assert (adaptation.steps, adaptation.stop_reason) == (steps, reason)
        reasons.add(reason)
        moved += not torch.allclose(prediction.scores[row], prediction.base_scores[row], atol=1e-3)
    assert moved >= 2
    assert reasons == ({"patience"} if epochs == 12 else {"max_steps"})


SMALL_ALL = "rmc:scope=all,neighbors=40,epochs=3,batch_size=8,learning_rate=0.001"


def test_all_weights_are_reproducible_from_the_seed(resources: Resources, attacked: torch.Tensor) -> None:
    first, again = (predict(SMALL_ALL, resources, attacked[:3]) for _ in range(2))
    assert torch.equal(first.scores, again.scores)
    other = build_defence(SMALL_ALL, resources).predict(
        attacked[:3], generator=torch.Generator().manual_seed(4), budget=Budget()
    )
    assert not torch.equal(first.scores, other.scores)  # another order of the exemplars


# The budget


@pytest.mark.parametrize("text", ["rmc:tolerance=0,steps=40", SMALL_ALL])
@pytest.mark.parametrize("checks", [2, 5, 11])
def test_a_caller_who_leaves_stops_the_work_within_a_step(
    resources: Resources, attacked: torch.Tensor, text: str, checks: int
) -> None:
    prediction = predict(text, resources, attacked[:1], Budget(cancelled=allow(checks)))
    (adaptation,) = prediction.adaptations
    assert adaptation is not None
    assert adaptation.stop_reason == "cancelled"
    assert adaptation.steps == checks - 1  # one look before the start, one before each step
    assert torch.isfinite(prediction.scores).all()


def test_an_image_that_was_begun_is_answered_and_one_that_was_not_is_not(
    resources: Resources, attacked: torch.Tensor
) -> None:
    """12 steps an image: after 15 looks at the budget the second is on its way, the third was never begun."""
    prediction = predict(SMALL_ALL, resources, attacked[:2], Budget(cancelled=allow(15)))
    first, second = (adaptation for adaptation in prediction.adaptations if adaptation is not None)
    assert (first.steps, first.stop_reason) == (12, "max_steps")
    assert second.steps < 12
    assert second.stop_reason == "cancelled"
    with pytest.raises(BudgetExceededError, match="cancelled"):
        predict(SMALL_ALL, resources, attacked[:3], Budget(cancelled=allow(15)))


@pytest.mark.parametrize("text", ["none", "webnn", "deepnn", "rmc", SMALL_ALL])
def test_no_answer_is_made_after_the_deadline(resources: Resources, clean: torch.Tensor, text: str) -> None:
    with pytest.raises(BudgetExceededError, match="deadline") as caught:
        predict(text, resources, clean[:1], Budget(deadline=time.monotonic() - 1))
    assert caught.value.reason == "deadline"
    with pytest.raises(BudgetExceededError, match="cancelled"):
        predict(text, resources, clean[:1], Budget(cancelled=allow(0)))


@pytest.mark.parametrize(
    "text", ["rmc:tolerance=0,steps=10000,neighbors=64", "rmc:scope=all,epochs=1000,patience=1000,batch_size=8"]
)
def test_a_deadline_on_the_way_ends_with_what_there_is(resources: Resources, attacked: torch.Tensor, text: str) -> None:
    started = time.monotonic()
    prediction = predict(text, resources, attacked[:1], Budget(deadline=started + 0.3))
    (adaptation,) = prediction.adaptations
    assert adaptation is not None
    assert adaptation.stop_reason == "deadline"
    assert 0 < adaptation.steps < 10_000
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("text", ["rmc:tolerance=0,steps=20", SMALL_ALL])
@pytest.mark.parametrize("ceiling", [0, 1, 4, 7])
def test_the_step_ceiling_holds_for_each_image(
    resources: Resources, attacked: torch.Tensor, text: str, ceiling: int
) -> None:
    prediction = predict(text, resources, attacked[:3], Budget(max_steps=ceiling))
    assert [(a.steps, a.stop_reason) for a in prediction.adaptations if a] == [(ceiling, "max_steps")] * 3
    if ceiling == 0:
        torch.testing.assert_close(prediction.scores, prediction.base_scores)


def test_a_ceiling_above_the_plan_changes_nothing(resources: Resources, attacked: torch.Tensor) -> None:
    for text in ("rmc", SMALL_ALL):
        plain = predict(text, resources, attacked[:3])
        assert torch.equal(predict(text, resources, attacked[:3], Budget(max_steps=10_000)).scores, plain.scores)


def test_an_empty_fit_is_no_error() -> None:
    head = nn.Linear(3, 2).requires_grad_(False)
    fit = fit_heads(torch.zeros(0, 5, 3), torch.zeros(0, 5, dtype=torch.int64), head, RMCHeadConfig(), Budget())
    assert isinstance(fit, HeadFit)
    assert fit.adaptations == ()


# What it is for


def test_recovers_most_of_what_a_static_attack_takes(
    resources: Resources, clean: torch.Tensor, attacked: torch.Tensor, labels: torch.Tensor
) -> None:
    def right(text: str, images: torch.Tensor) -> float:
        return float((predict(text, resources, images).scores.argmax(1) == labels).double().mean())

    base, base_attacked = right("none", clean), right("none", attacked)
    rmc, rmc_attacked = right("rmc", clean), right("rmc", attacked)
    assert base > 0.95
    assert base_attacked < 0.2
    assert rmc_attacked >= base_attacked + 0.5
    assert rmc >= base - 0.05


def test_an_attacker_who_knows_the_defence_does_better(
    resources: Resources, attacked: torch.Tensor, clean: torch.Tensor, labels: torch.Tensor
) -> None:
    """The surrogate is a path to the defended answer: PGD along it beats the static attack. No gain is for free."""
    defence, count = build_defence("rmc", resources), 25
    budget, generator = Budget(), torch.Generator().manual_seed(0)
    found = parse_attack("pgd10", epsilon=Epsilon(32)).run(
        lambda images: defence.surrogate(images, generator=generator, budget=budget),
        (clean[:count] * 255).round().to(torch.uint8),
        labels[:count],
        generator=generator,
    )
    static, adaptive = (
        float((predict("rmc", resources, images).scores.argmax(1) == labels[:count]).double().mean())
        for images in (attacked[:count], to_images(found))
    )
    assert adaptive <= static - 0.2
