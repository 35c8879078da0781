"""What the neighbours say equals a count by hand; an attack that knows them gets further than one that does not."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mithridate.attacks import parse_attack
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Defence, Prediction, Request, Resources, build_defence, parse_defence
from mithridate.defenses import neighbor_vote as module
from mithridate.defenses.neighbor_vote import NeighborVote, NeighborVoteConfig
from mithridate.errors import BudgetExceededError, MithridateError, ModelError, OptionError
from mithridate.models import build_classifier
from mithridate.neighbors import METRICS, NeighborIndex
from mithridate.types import Epsilon, to_images

RADIUS = Epsilon(32)
SAYS = [f"scores={s},weights={w}" for s in ("vote", "softmax") for w in ("uniform", "cbw-e", "cbw-d")]
EVERY = [f"{kind}:{say}" for kind in ("webnn", "deepnn") for say in SAYS]


@pytest.fixture(scope="module")
def pixels(digits_test: LabelledImages) -> torch.Tensor:
    return torch.from_numpy(digits_test.images[:60])


@pytest.fixture(scope="module")
def labels(digits_test: LabelledImages) -> torch.Tensor:
    return torch.from_numpy(digits_test.labels[:60])


@pytest.fixture(scope="module")
def attacked(resources: Resources, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """PGD-20 on the base model, which knows nothing of the defence."""
    attack = parse_attack("pgd20", epsilon=RADIUS)
    return attack.run(resources.classifier, pixels, labels, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def images(pixels: torch.Tensor, attacked: torch.Tensor) -> torch.Tensor:
    """Clean and attacked ones in turn."""
    return to_images(torch.where((torch.arange(60) % 2 == 0)[:, None, None, None], pixels, attacked))


def predict(defence: Defence, images: torch.Tensor, budget: Budget | None = None) -> Prediction:
    return defence.predict(images, generator=torch.Generator().manual_seed(3), budget=budget or Budget())


def ascend(defence: Defence) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda images: defence.surrogate(images, generator=torch.Generator(), budget=Budget())


# What the neighbours say, slowly


def slow_softmax(features: list[float], resources: Resources) -> list[float]:
    head = resources.classifier.head
    rows = zip(head.weight.tolist(), head.bias.tolist(), strict=True)
    logits = [sum(w * f for w, f in zip(row, features, strict=True)) + bias for row, bias in rows]
    powers = [math.exp(z - max(logits)) for z in logits]
    return [p / sum(powers) for p in powers]


def slow_weight(softmax: list[float], weights: str, power: float, top: int) -> float:
    if weights == "cbw-e":
        negative_entropy = sum(s * math.log(s) for s in softmax if s > 0)
        return abs(math.log(len(softmax)) + negative_entropy) ** power
    if weights == "cbw-d":
        best = sorted(softmax, reverse=True)
        return sum((best[0] - best[m]) ** power for m in range(1, top + 1) if m < len(best))
    return 1.0


def slow_neighbors(resources: Resources, embedding: torch.Tensor, kind: str, count: int) -> list[int]:
    """Ids of the nearest, by float64 distances to each one."""
    exemplars = resources.exemplars
    total = exemplars.clean_count if kind == "deepnn" else len(exemplars)
    points = resources.index.embeddings(torch.arange(total)).double()
    distances = (points - embedding.double()).square().sum(1).tolist()
    return sorted(range(total), key=lambda i: (distances[i], i))[:count]


def slow_answer(resources: Resources, embedding: torch.Tensor, kind: str, config: NeighborVoteConfig) -> list[float]:
    exemplars, shares, total = resources.exemplars, [0.0] * 10, 0.0
    for i in slow_neighbors(resources, embedding, kind, config.neighbors):
        softmax = slow_softmax(exemplars.features[i].tolist(), resources)
        weight = slow_weight(softmax, config.weights, config.power, config.top)
        for c in range(10):
            said = softmax[c] if config.scores == "softmax" else float(int(exemplars.labels[i]) == c)
            shares[c] += weight * said
        total += weight
    return [share / total for share in shares]


@pytest.mark.parametrize(
    "options",
    [
        *SAYS,
        "neighbors=1",
        "neighbors=7,scores=softmax,weights=cbw-d,top=1",
        "scores=softmax,weights=cbw-e,power=1",
        "weights=cbw-d,top=3,power=0.5",
        "weights=cbw-e,power=20",
        "neighbors=2,weights=cbw-d,power=0",
    ],
)
@pytest.mark.parametrize("kind", ["webnn", "deepnn"])
def test_an_answer_equals_one_by_hand(resources: Resources, images: torch.Tensor, kind: str, options: str) -> None:
    defence = build_defence(f"{kind}:{options}", resources)
    assert isinstance(defence, NeighborVote)
    prediction = predict(defence, images[:12])
    with torch.no_grad():
        embeddings = resources.classifier.embed(images[:12])
    wanted = [slow_answer(resources, e, kind, defence.config) for e in embeddings]
    torch.testing.assert_close(prediction.scores, torch.tensor(wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("neighbors", [1, 4, 64])
@pytest.mark.parametrize("kind", ["webnn", "deepnn"])
def test_votes_are_counted_whole(resources: Resources, images: torch.Tensor, kind: str, neighbors: int) -> None:
    prediction = predict(build_defence(f"{kind}:neighbors={neighbors}", resources), images[:25])
    with torch.no_grad():
        embeddings = resources.classifier.embed(images[:25])
    tied = 0
    for row, embedding in enumerate(embeddings):
        nearest = slow_neighbors(resources, embedding, kind, neighbors)
        votes = Counter(int(resources.exemplars.labels[i]) for i in nearest)
        assert [round(float(s) * neighbors) for s in prediction.scores[row]] == [votes[c] for c in range(10)]
        assert prediction.scores[row].argmax() == min(votes, key=lambda c: (-votes[c], c))
        tied += sorted(votes.values())[-2:] == [votes.most_common(1)[0][1]] * 2
        seen = prediction.neighborhoods[row]
        assert seen is not None
        assert seen.ids.tolist() == nearest
        assert seen.label_counts == dict(votes)
        assert list(seen.label_counts.values()) == sorted(votes.values(), reverse=True)
        adversarial = sum(i >= resources.exemplars.clean_count for i in nearest)
        assert seen.adversarial_fraction == pytest.approx(adversarial / neighbors)
    assert tied or neighbors != 4 or kind == "deepnn"  # the case of equal votes does occur


def test_deepnn_asks_clean_exemplars_only(resources: Resources, images: torch.Tensor) -> None:
    clean, everyone = (predict(build_defence(kind, resources), images) for kind in ("deepnn", "webnn"))
    assert all(n is not None and n.adversarial_fraction == 0 for n in clean.neighborhoods)
    assert any(n is not None and n.adversarial_fraction > 0 for n in everyone.neighborhoods)


def test_every_option_says_something_of_its_own(resources: Resources, images: torch.Tensor) -> None:
    answers = [predict(build_defence(text, resources), images).scores for text in EVERY]
    for one, other in itertools.combinations(answers, 2):
        assert (one - other).abs().max() > 1e-3


def test_where_no_neighbour_has_any_weight_all_count_alike(
    resources: Resources, digits_bundle: Path, images: torch.Tensor
) -> None:
    blank = Bundle.open(digits_bundle).classifier()
    with torch.no_grad():
        blank.head.weight.zero_()
        blank.head.bias.zero_()
    undecided = replace(resources, classifier=blank)
    for scores in ("vote", "softmax"):
        weighted, plain = (
            predict(build_defence(f"webnn:scores={scores},weights={w}", undecided), images)
            for w in ("cbw-d", "uniform")
        )
        assert torch.equal(weighted.scores, plain.scores)
    assert (plain.scores == 0.1).all()


@pytest.mark.parametrize("scores", ["vote", "softmax"])
def test_scores_too_many_to_be_kept_are_computed_where_they_are_needed(
    resources: Resources, images: torch.Tensor, scores: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"webnn:scores={scores},weights=cbw-d"
    kept = predict(build_defence(text, resources), images[:10]).scores
    monkeypatch.setattr("mithridate.defenses.exemplar_scores._NUMBERS_KEPT", 0)
    torch.testing.assert_close(predict(build_defence(text, resources), images[:10]).scores, kept, rtol=0, atol=1e-6)


# Whoever else is asking


@pytest.mark.parametrize("text", EVERY)
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(
    resources: Resources, images: torch.Tensor, text: str
) -> None:
    defence, order = build_defence(text, resources), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    together, shuffled = predict(defence, images[:40]), predict(defence, images[order])
    alone = torch.cat([predict(defence, image[None]).scores for image in images[:40]])
    assert (alone - together.scores).abs().max() <= 1e-4
    assert (shuffled.scores - together.scores[order]).abs().max() <= 1e-4
    assert torch.equal(alone.argmax(1), together.scores.argmax(1))


@pytest.mark.parametrize("text", ["webnn", "deepnn:scores=softmax,weights=cbw-e"])
def test_an_ended_budget_ends_one_request_and_not_its_neighbours(
    resources: Resources, images: torch.Tensor, text: str
) -> None:
    defence = build_defence(text, resources)
    budgets = [Budget(), Budget(cancelled=lambda: True), Budget(deadline=0.0), Budget(max_steps=1)]
    parts = [images[:3], images[3:5], images[5:6], images[6:10]]
    requests = [
        Request(images=part, generator=torch.Generator().manual_seed(9), budget=budget)
        for part, budget in zip(parts, budgets, strict=True)
    ]
    outcomes = defence.predict_together(requests)
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == [None, "cancelled", "deadline", None]
    for number in (0, 3):
        outcome = outcomes[number]
        assert isinstance(outcome, Prediction)
        torch.testing.assert_close(outcome.scores, predict(defence, parts[number]).scores, rtol=0, atol=1e-4)
        assert len(outcome.neighborhoods) == len(parts[number])
    for budget in budgets[1:3]:
        with pytest.raises(BudgetExceededError):
            predict(defence, parts[1], budget)
        with pytest.raises(BudgetExceededError):
            defence.surrogate(parts[1], generator=torch.Generator(), budget=budget)


# The attacker's path


@pytest.mark.parametrize("text", [*EVERY, "webnn:neighbors=1", "deepnn:neighbors=256,scores=softmax"])
def test_the_surrogate_says_what_the_defence_says(resources: Resources, images: torch.Tensor, text: str) -> None:
    defence = build_defence(text, resources)
    answered, logits = predict(defence, images).scores, ascend(defence)(images).detach()
    best = answered.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-2  # of two classes with equal votes it may name the other
    assert clear.float().mean() > 0.9
    assert torch.equal(logits.argmax(1)[clear], answered.argmax(1)[clear])
    torch.testing.assert_close(logits.softmax(1).float(), answered, rtol=0, atol=0.6 / defence.config.neighbors)


@pytest.mark.parametrize("text", [*EVERY, "webnn:neighbors=1", "deepnn:neighbors=1"])
def test_the_surrogate_is_never_flat(
    resources: Resources, images: torch.Tensor, labels: torch.Tensor, text: str
) -> None:
    """Neither where all voters agree nor at an exemplar itself: the attack would stop before it began."""
    defence = build_defence(text, resources)
    at_exemplars = to_images(resources.exemplars.pixels(torch.arange(40)))
    asked = torch.cat([images, at_exemplars]).requires_grad_()
    unanimous = predict(defence, asked.detach()).scores.amax(1) > 0.999
    assert unanimous.float().mean() > 0.1
    logits = ascend(defence)(asked)
    classes = torch.cat([labels, resources.exemplars.labels[:40]])
    losses = torch.nn.functional.cross_entropy(logits, classes, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), asked)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    assert logits.softmax(1).topk(2, dim=1).values[:, 1].min() > 1e-8  # and the next class has its share in it
    assert all(parameter.grad is None for parameter in resources.classifier.parameters())


@pytest.mark.parametrize("text", EVERY[::2])  # every kind, every way to score, every weight
def test_an_attack_on_the_surrogate_beats_one_on_the_base_model(
    resources: Resources, pixels: torch.Tensor, labels: torch.Tensor, attacked: torch.Tensor, text: str
) -> None:
    defence = build_defence(text, resources)
    attack = parse_attack("pgd20", epsilon=RADIUS)
    found = attack.run(ascend(defence), pixels, labels, generator=torch.Generator().manual_seed(7))
    right = [
        int((predict(defence, to_images(tried)).scores.argmax(1) == labels).sum())
        for tried in (pixels, attacked, found)
    ]
    assert (found.int() - pixels.int()).abs().max() <= RADIUS.levels
    assert right[0] > 55
    assert right[2] <= 6
    assert right[2] < right[1] - 20 or right[1] <= 6  # some options leave nothing to a static attack
    if text == "webnn:scores=vote,weights=uniform":
        assert right[1] > 30


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_a_path_for_the_attacker(
    resources: Resources, images: torch.Tensor, labels: torch.Tensor, metric: str
) -> None:
    points = resources.index.embeddings(torch.arange(len(resources.exemplars))).numpy()
    elsewhere = replace(resources, index=NeighborIndex.build(points, metric=metric))
    for text in ("webnn", "webnn:neighbors=1", "deepnn:scores=softmax,weights=cbw-d"):
        defence, asked = build_defence(text, elsewhere), images[:20].clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(ascend(defence)(asked), labels[:20], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, asked)
        assert torch.isfinite(gradient).all()
        assert (gradient.flatten(1).abs().amax(1) > 0).all()


def slow_soft_logits(
    distances: torch.Tensor, labels: list[int], weights: list[float], says: torch.Tensor | None, voters: int
) -> torch.Tensor:
    """One image; differentiable as the module is: scale and floor are constants."""
    known = distances.tolist()
    scale = module._SURROGATE_TEMPERATURE * sum(known[:voters]) / voters
    heights = [-(d - min(known)) / scale + math.log(w) for d, w in zip(distances, weights, strict=True)]
    logits = []
    for c in range(4):
        if says is None:
            terms = [h.exp() for h, label in zip(heights, labels, strict=True) if label == c]
            terms.append(torch.tensor(math.exp(min(h.item() for h in heights) - 1), dtype=torch.float64))
        else:
            terms = [h.exp() * said for h, said in zip(heights, says[:, c], strict=True)]
        logits.append(torch.stack(terms).sum().log())
    return torch.stack(logits)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_soft_nearness_equals_one_by_hand(softmax: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SURROGATE_GAP", 1e9)
    generator = torch.Generator().manual_seed(seed)
    distances = (torch.rand(3, 9, generator=generator, dtype=torch.float64) + 0.5).sort(1).values.requires_grad_()
    labels = torch.randint(3, (3, 9), generator=generator)  # class 3 has no exemplar
    weights = torch.rand(3, 9, generator=generator, dtype=torch.float64) + 0.1
    says = torch.rand(3, 9, 4, generator=generator, dtype=torch.float64).softmax(2) if softmax else None
    opinions = module._Opinions(labels=labels, weights=weights, classes=4, softmax=says)
    logits = module._soft_logits(module._nearness(distances, 5), opinions)
    wanted = torch.stack(
        [
            slow_soft_logits(
                distances[b], labels[b].tolist(), weights[b].tolist(), None if says is None else says[b], 5
            )
            for b in range(3)
        ]
    )
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-9)
    by_hand, by_module = (torch.autograd.grad((z * z.detach()).sum(), distances)[0] for z in (wanted, logits))
    torch.testing.assert_close(by_module, by_hand, rtol=1e-9, atol=1e-9)


# Names and refusals


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("webnn:neighbors=70000", ["a neighbour vote: neighbors=70000 is out of range; allowed: 1 to 65536"]),
        ("deepnn:neighbors=0", ["neighbors=0 is out of range"]),
        ("webnn:scores=label", ["webnn: scores='label' is not known; allowed: vote, softmax"]),
        ("deepnn:weights=cbw", ["deepnn: weights='cbw' is not known; allowed: uniform, cbw-e, cbw-d"]),
        ("webnn:power=-1", ["power=-1.0 is out of range; allowed: 0 to 20"]),
        ("webnn:power=nan", ["power=nan is out of range"]),
        ("webnn:top=0", ["top=0 is out of range; allowed: 1 to 65536"]),
        ("webnn:weight=cbw-d", ["unknown option of webnn 'weight'", "did you mean 'weights'"]),
    ],
)
def test_an_option_that_does_not_exist_is_refused(text: str, parts: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        parse_defence(text)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize("options", ["scores=softmax", "weights=cbw-e", "weights=cbw-d"])
def test_a_network_without_a_head_is_told_what_it_can_have(resources: Resources, options: str) -> None:
    headless = replace(resources, classifier=build_classifier("squeezenet1_1", num_classes=10, image_shape=(3, 32, 32)))
    with pytest.raises(ModelError, match=r"^squeezenet1_1 does not end in a linear layer.*scores=vote.*uniform$"):
        build_defence(f"webnn:{options}", headless)
    assert build_defence("webnn", headless).name == "webnn"
    assert issubclass(ModelError, MithridateError)


def test_a_name_leads_back_to_the_same_defence(resources: Resources) -> None:
    names = {
        "webnn:scores=vote,weights=uniform,neighbors=64": "webnn",
        "deepnn:weights=cbw-d,neighbors=50,scores=softmax": "deepnn:neighbors=50,scores=softmax,weights=cbw-d",
        "webnn:top=3,power=1": "webnn:power=1.0,top=3",
    }
    for text, name in names.items():
        defence = build_defence(text, resources)
        assert defence.name == name
        assert build_defence(name, resources) == defence
