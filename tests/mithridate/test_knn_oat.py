"""The negative control does what its authors describe, keeps to its budget, and fails as they say it does."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mithridate.attacks import parse_attack
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Prediction, Request, Resources, build_defence, parse_defence
from mithridate.defenses.knn_oat import KNNOAT, KNNOATConfig
from mithridate.errors import BudgetExceededError, OptionError
from mithridate.types import Epsilon, to_images

SMALL = "knn-oat:neighbors=24,attack=pgd2,epsilon=16/255,learning_rate=0.001,epochs=2,batch_size=10"
STEPS = 6  # two epochs of 10 + 10 + 4 neighbours
LOOKS = 4  # at the budget in a step: at each of the attack's three points and before the update


@pytest.fixture(scope="module")
def pixels(digits_test: LabelledImages) -> torch.Tensor:
    return torch.from_numpy(digits_test.images[:30])


@pytest.fixture(scope="module")
def labels(digits_test: LabelledImages) -> torch.Tensor:
    return torch.from_numpy(digits_test.labels[:30])


@pytest.fixture(scope="module")
def attacked(resources: Resources, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """PGD-20 on the base model, which knows nothing of the defence."""
    attack = parse_attack("pgd20", epsilon=Epsilon(32))
    return to_images(attack.run(resources.classifier, pixels, labels, generator=torch.Generator().manual_seed(7)))


def predict(text: str, resources: Resources, images: torch.Tensor, budget: Budget | None = None) -> Prediction:
    defence = build_defence(text, resources)
    return defence.predict(images, generator=torch.Generator().manual_seed(3), budget=budget or Budget())


def leaves_after(looks: int) -> Callable[[], bool]:
    """A caller who is gone after so many looks at the budget."""
    left = iter([False] * looks)
    return lambda: next(left, True)


def slow_adaptation(resources: Resources, image: torch.Tensor, config: KNNOATConfig, seed: int) -> nn.Module:
    """The authors' four steps, one after the other, for one image ``[1, C, H, W]``."""
    classifier, exemplars = resources.classifier, resources.exemplars
    with torch.no_grad():
        query = classifier.embed(image).double()
    points = resources.index.embeddings(torch.arange(exemplars.clean_count)).double()  # of the training set
    distances = (points - query).square().sum(1).tolist()
    nearest = torch.tensor(sorted(range(len(distances)), key=lambda i: (distances[i], i))[: config.neighbors])
    clean, labels = exemplars.pixels(nearest), exemplars.labels[nearest]

    generator = torch.Generator().manual_seed(seed)
    network = deepcopy(classifier.network).requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    attack = parse_attack(config.attack, epsilon=Epsilon.parse(config.epsilon))
    for _ in range(config.epochs):
        order = torch.randperm(len(nearest), generator=generator)
        for start in range(0, len(nearest), config.batch_size):
            rows = order[start : start + config.batch_size]
            now = deepcopy(network)
            copies = attack.run(
                lambda x, now=now: now(classifier.normalise(x)), clean[rows], labels[rows], generator=generator
            )
            optimizer.zero_grad()
            on_clean = F.cross_entropy(network(classifier.normalise(to_images(clean[rows]))), labels[rows])
            on_copies = F.cross_entropy(network(classifier.normalise(to_images(copies))), labels[rows])
            (0.5 * on_clean + 0.5 * on_copies).backward()
            optimizer.step()
    return network


@pytest.mark.parametrize("text", [SMALL, "knn-oat:neighbors=5,attack=fgsm,epsilon=32/255,epochs=3,learning_rate=0.001"])
def test_an_answer_equals_the_published_steps_by_hand(resources: Resources, attacked: torch.Tensor, text: str) -> None:
    """In the scores, and in the logits: where all neighbours agree any training gives nearly the same scores."""
    prediction, defence = predict(text, resources, attacked[:6]), build_defence(text, resources)
    assert isinstance(defence, KNNOAT)
    logits = defence.surrogate(attacked[:6], generator=torch.Generator().manual_seed(3), budget=Budget()).detach()
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3)))
    moved = 0.0
    for row in range(6):
        image = resources.classifier.normalise(attacked[row : row + 1])
        network = slow_adaptation(resources, attacked[row : row + 1], defence.config, seed)
        with torch.no_grad():
            wanted, base = network(image)[0], resources.classifier.network(image)[0]
        torch.testing.assert_close(prediction.scores[row], wanted.softmax(0), rtol=0, atol=1e-4)
        torch.testing.assert_close(logits[row], wanted, rtol=0, atol=1e-3)
        moved = max(moved, float((wanted - base).abs().max()))
    assert moved > 0.3


def test_only_clean_exemplars_are_asked(resources: Resources, attacked: torch.Tensor) -> None:
    prediction = predict(SMALL, resources, attacked[:5])
    for neighborhood, adaptation in zip(prediction.neighborhoods, prediction.adaptations, strict=True):
        assert neighborhood is not None
        assert neighborhood.adversarial_fraction == 0
        assert len(neighborhood.ids) == 24
        assert adaptation is not None
        assert (adaptation.steps, adaptation.stop_reason, adaptation.weights) == (STEPS, "max_steps", "adapted")


def test_it_is_no_defence_for_a_service(resources: Resources) -> None:
    defence = build_defence(SMALL, resources)
    assert isinstance(defence, KNNOAT)
    assert defence.offline
    assert not defence.batches


def test_it_fails_where_rmc_does_not(
    resources: Resources, pixels: torch.Tensor, labels: torch.Tensor, attacked: torch.Tensor
) -> None:
    """The clean neighbours of an attacked image are of a wrong class, and it learns that class from them."""
    text = "knn-oat:neighbors=64,attack=pgd3,epsilon=32/255,learning_rate=0.001,epochs=1"
    clean = predict(text, resources, to_images(pixels))
    assert int((clean.scores.argmax(1) == labels).sum()) >= 27
    control, rmc = (predict(name, resources, attacked).scores.argmax(1) for name in (text, "rmc"))
    assert int((control == labels).sum()) <= int((rmc == labels).sum()) - 6
    neighborhoods = predict(text, resources, attacked, Budget(max_steps=1)).neighborhoods
    majority = torch.tensor([max(n.label_counts, key=n.label_counts.__getitem__) for n in neighborhoods if n])
    assert (majority == labels).float().mean() < 0.3
    assert (majority == control).float().mean() > 0.6


# Budgets


@pytest.mark.parametrize("steps", [1, 4, 100])
def test_a_ceiling_on_steps_is_kept(resources: Resources, attacked: torch.Tensor, steps: int) -> None:
    for adaptation in predict(SMALL, resources, attacked[:2], Budget(max_steps=steps)).adaptations:
        assert adaptation is not None
        assert (adaptation.steps, adaptation.stop_reason) == (min(steps, STEPS), "max_steps")


@pytest.mark.parametrize("looks", range(1, 12))
def test_a_caller_who_leaves_ends_it_within_a_step(resources: Resources, attacked: torch.Tensor, looks: int) -> None:
    budget = Budget(cancelled=leaves_after(looks))
    prediction = predict(SMALL, resources, attacked[:2], budget)
    first, second = prediction.adaptations
    assert first is not None
    assert second is not None
    done = (looks - 1) // LOOKS  # one look was before the start
    assert (first.steps, first.stop_reason) == (done, "cancelled")
    assert first.weights == ("adapted" if done else "base")
    assert (second.steps, second.stop_reason, second.weights) == (0, "cancelled", "base")
    kept = slice(0 if not done else 1, 2)
    assert torch.equal(prediction.scores[kept], prediction.base_scores[kept])
    if done:
        ceiling = predict(SMALL, resources, attacked[:1], Budget(max_steps=done))
        torch.testing.assert_close(prediction.scores[:1], ceiling.scores, rtol=0, atol=1e-5)


def test_an_ended_budget_ends_one_request_and_not_its_neighbours(resources: Resources, attacked: torch.Tensor) -> None:
    budgets = [Budget(cancelled=lambda: True), Budget(max_steps=2), Budget(deadline=0.0), Budget()]
    requests = [
        Request(images=attacked[i : i + 1], generator=torch.Generator().manual_seed(3), budget=budget)
        for i, budget in enumerate(budgets)
    ]
    outcomes = build_defence(SMALL, resources).predict_together(requests)
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == ["cancelled", None, "deadline", None]
    for i in (1, 3):
        outcome, alone = outcomes[i], predict(SMALL, resources, attacked[i : i + 1], budgets[i])
        assert isinstance(outcome, Prediction)
        assert outcome.adaptations == alone.adaptations
        torch.testing.assert_close(outcome.scores, alone.scores, rtol=0, atol=1e-4)
    with pytest.raises(BudgetExceededError):
        predict(SMALL, resources, attacked[:1], budgets[0])


# The attacker's path


def test_the_surrogate_is_the_adapted_network(resources: Resources, attacked: torch.Tensor) -> None:
    defence, asked = build_defence(SMALL, resources), attacked[:3].clone().requires_grad_()
    logits = defence.surrogate(asked, generator=torch.Generator().manual_seed(3), budget=Budget())
    torch.testing.assert_close(
        logits.detach().softmax(1), predict(SMALL, resources, attacked[:3]).scores, rtol=0, atol=1e-4
    )
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), asked)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3)))
    for row in range(3):
        again = attacked[row : row + 1].clone().requires_grad_()
        assert isinstance(defence, KNNOAT)
        network = slow_adaptation(resources, again.detach(), defence.config, seed)
        (wanted,) = torch.autograd.grad(network(resources.classifier.normalise(again))[:, 0].sum(), again)
        torch.testing.assert_close(gradient[row], wanted[0], rtol=0, atol=1e-2 * wanted.abs().max().item())


# Names and refusals


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("knn-oat:neighbors=0", ["knn-oat: neighbors=0 is out of range; allowed: 1 to 65536"]),
        ("knn-oat:epsilon=0.03", ["epsilon '0.03' is not a whole number of levels; write it as k/255"]),
        ("knn-oat:epsilon=300/255", ["epsilon 300/255 is out of range"]),
        ("knn-oat:attack=cw", ["unknown attack 'cw'; allowed: fgsm, or pgdN"]),
        ("knn-oat:learning_rate=0", ["learning_rate=0.0 is out of range"]),
        ("knn-oat:epochs=0", ["epochs=0 is out of range; allowed: 1 to 1000"]),
        ("knn-oat:batch_size=0", ["batch_size=0 is out of range"]),
        ("knn-oat:steps=3", ["unknown option of knn-oat 'steps'"]),
    ],
)
def test_an_option_that_does_not_exist_is_refused(text: str, parts: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        parse_defence(text)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_a_name_leads_back_to_the_same_defence(resources: Resources) -> None:
    names = {
        "knn-oat": "knn-oat",
        "knn-oat:epsilon=08/255,attack=pgd10": "knn-oat",
        "knn-oat:epochs=2,attack=fgsm,epsilon=4/255": "knn-oat:attack=fgsm,epsilon=4/255,epochs=2",
    }
    for text, name in names.items():
        defence = build_defence(text, resources)
        assert defence.name == name
        assert build_defence(name, resources) == defence
