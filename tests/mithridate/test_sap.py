"""SAP as it is served and as it is attacked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Request, Resources, build_defence, defence_name
from mithridate.defenses.averaging import Draws
from mithridate.defenses.networks import BaseNetwork
from mithridate.defenses.pruned_network import ChangedTrunk
from mithridate.defenses.pruning import prune
from mithridate.defenses.randomness import pass_generators, row_seeds
from mithridate.defenses.sampled import Sampled
from mithridate.defenses.sap import Pruner
from mithridate.errors import BudgetExceededError, ModelError, OptionError
from mithridate.models import build_classifier
from mithridate.types import Images, to_images


@pytest.fixture(scope="module")
def images(digits_test: LabelledImages) -> Images:
    return to_images(torch.from_numpy(digits_test.images[:6]))


def build(options: str, resources: Resources) -> Sampled:
    defence = build_defence(f"sap:{options}" if options else "sap", resources)
    assert isinstance(defence, Sampled)
    return defence


def trunk(defence: Sampled) -> ChangedTrunk:
    assert isinstance(defence.averaging.sampler, Pruner)
    return defence.averaging.sampler.trunk


def ask(defence: Sampled, images: Images, seed: int = 3, budget: Budget | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return defence.predict(images, generator=generator, budget=budget or Budget()).scores


@pytest.mark.parametrize("sampling", ["multinomial", "binomial"])
@torch.no_grad()
def test_equals_one_pass_after_the_other(
    resources: Resources, images: Images, sampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network as its author wrote it, with pruning patched in behind every ReLU."""
    defence, request = build(f"passes=5,sampling={sampling}", resources), torch.Generator().manual_seed(3)
    seed, total = int(torch.randint(2**62, (), generator=request)), torch.zeros(6, 10, dtype=torch.float64)
    relu = F.relu
    for number in range(5):
        own = pass_generators(row_seeds([seed] * 6, images), [number])
        monkeypatch.setattr(
            F,
            "relu",
            lambda x, *_, g=own, **__: prune(relu(x), fraction=1, sampling=sampling, generators=g),  # type: ignore[arg-type]
        )
        total += resources.classifier(images).double().softmax(1)
    monkeypatch.undo()
    torch.testing.assert_close(ask(defence, images).double(), total / 5, rtol=0, atol=1e-5)


@torch.no_grad()
def test_equals_torchvisions_network_with_its_one_relu_in_place(
    resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_classifier("resnet18", num_classes=5, image_shape=(3, 64, 64))
    defence = build("passes=2", dataclasses.replace(resources, classifier=made))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    seed, total = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3))), torch.zeros(2, 5).double()
    for number in range(2):
        own = pass_generators(row_seeds([seed] * 2, images), [number])
        monkeypatch.setattr(
            nn.ReLU, "forward", lambda _, x, g=own: prune(x.relu(), fraction=1, sampling="multinomial", generators=g)
        )
        total += made(images).double().softmax(1)
    monkeypatch.undo()
    torch.testing.assert_close(ask(defence, images).double(), total / 2, rtol=0, atol=1e-5)


def test_an_answer_is_the_same_alone_in_a_batch_and_in_pieces(
    resources: Resources, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    defence = build("passes=12", resources)
    together = ask(defence, images)
    for row in range(6):
        torch.testing.assert_close(ask(defence, images[row : row + 1])[0], together[row], rtol=0, atol=1e-5)
    monkeypatch.setattr("mithridate.defenses.averaging._BYTES_AT_A_TIME", 64 * 5 * max(trunk(defence).sizes))
    assert defence.averaging._rows_at_a_time == 5
    torch.testing.assert_close(ask(defence, images), together, rtol=0, atol=1e-5)
    assert torch.equal(ask(defence, images), ask(defence, images))
    assert not torch.equal(ask(defence, images, seed=4), ask(defence, images))


def test_images_of_a_request_and_requests_draw_for_themselves(resources: Resources, images: Images) -> None:
    defence = build("passes=2", resources)
    requests = [Request(images=images, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    outcomes = [outcome for outcome in defence.predict_together(requests) if not isinstance(outcome, Exception)]
    assert torch.equal(outcomes[0].scores, ask(defence, images, 3))
    assert torch.equal(outcomes[1].scores, ask(defence, images, 4))
    state = torch.random.get_rng_state()
    ask(defence, images)
    assert torch.equal(state, torch.random.get_rng_state())


def test_scores_are_means_of_softmax_and_the_base_is_told(resources: Resources, images: Images) -> None:
    prediction = build("passes=30", resources).predict(
        images, generator=torch.Generator().manual_seed(0), budget=Budget()
    )
    torch.testing.assert_close(prediction.scores.sum(1), torch.ones(6))
    torch.testing.assert_close(prediction.base_scores, resources.classifier(images).softmax(1), rtol=0, atol=1e-6)
    assert set(prediction.seconds) == {"embed", "predict"}
    many, few = (ask(build(f"passes={passes}", resources), images) for passes in (400, 1))
    longer = ask(build("passes=400", resources), images, seed=9)
    assert (many - longer).abs().max() < 0.1 < (few - many).abs().max()  # 400 passes: an error of at most 0.025


def test_a_large_fraction_prunes_nothing_and_a_layer_can_be_chosen(resources: Resources, images: Images) -> None:
    base = resources.classifier(images).softmax(1)
    torch.testing.assert_close(ask(build("passes=1,fraction=1000", resources), images), base, rtol=0, atol=0.02)
    names = trunk(build("", resources)).names
    last = ask(build(f"passes=1,layers={names[-1]}", resources), images)
    assert not torch.allclose(last, base, atol=1e-3)
    assert not torch.allclose(last, ask(build("passes=1", resources), images), atol=1e-3)
    both = build(f"layers={names[0]}/{names[1]}", resources)
    assert trunk(both).names == names[:2]


def test_a_budget_that_ends_between_two_runs_ends_it(resources: Resources, images: Images) -> None:
    defence, looks = build("passes=100000", resources), iter([False] * 3)
    with pytest.raises(BudgetExceededError) as caught:
        ask(defence, images, budget=Budget(cancelled=lambda: next(looks, True)))
    assert caught.value.reason == "cancelled"
    free = Request(images=images, generator=torch.Generator().manual_seed(3))
    gone = Request(images=images, generator=torch.Generator(), budget=Budget(deadline=0.0))
    first, second = build("passes=2", resources).predict_together([gone, free])
    assert isinstance(first, BudgetExceededError)
    assert not isinstance(second, Exception)


# Attackers


@pytest.mark.parametrize("backward", ["straight-through", "masked", "vanilla"])
def test_the_surrogate_is_pruned_forward_and_differentiable(
    resources: Resources, images: Images, backward: str
) -> None:
    defence, point = build(f"backward={backward},attack_passes=4", resources), images.clone().requires_grad_()
    logits = defence.surrogate(point, generator=torch.Generator().manual_seed(3), budget=Budget())
    served = ask(build("passes=4", resources), images)
    torch.testing.assert_close(logits.softmax(1).float(), served, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), point)
    assert torch.isfinite(gradient).all()
    assert gradient.flatten(1).any(1).all()


def test_the_vanilla_gradient_is_the_unpruned_networks(resources: Resources, images: Images) -> None:
    """The loss is taken where the pruned passes are, its slope goes back through the unpruned network (BPDA)."""
    defence, classifier = build("backward=vanilla,attack_passes=2", resources), resources.classifier
    point = images.clone().requires_grad_()
    logits = defence.surrogate(point, generator=torch.Generator().manual_seed(3), budget=Budget())
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), point)

    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3)))
    with torch.no_grad():
        answered = defence.averaging.sampler.begin(images, BaseNetwork(classifier=classifier))(
            Draws(rows=row_seeds([seed] * 6, images), passes=range(2))
        )
    leaf = answered.double().requires_grad_()
    (slope,) = torch.autograd.grad(leaf.log_softmax(1).view(6, 2, 10).logsumexp(1)[:, 1].sum(), leaf)
    again = images.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(classifier(again), again, slope.view(6, 2, 10).sum(1).float())
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5)


def test_every_call_draws_anew(resources: Resources, images: Images) -> None:
    defence, generator = build("attack_passes=2", resources), torch.Generator().manual_seed(0)
    first, second = (defence.surrogate(images, generator=generator, budget=Budget()) for _ in range(2))
    assert not torch.equal(first, second)
    with pytest.raises(BudgetExceededError):
        defence.surrogate(images, generator=generator, budget=Budget(cancelled=lambda: True))


# Names


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sap:passes=0", ["sap: passes=0 is out of range; allowed: 1 to 100000"]),
        ("sap:fraction=0", ["fraction=0.0 is out of range"]),
        ("sap:sampling=poisson", ["sampling='poisson' is not known; allowed: multinomial, binomial"]),
        ("sap:steps=3", ["unknown option of sap 'steps'"]),
        ("sap:layers=stem_2/relux", ["the network has no activation function 'relux'; allowed: "]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(resources: Resources, text: str, parts: Sequence[str]) -> None:
    with pytest.raises(OptionError) as caught:
        build_defence(text, resources)
    assert all(part in str(caught.value) for part in parts)


def test_a_name_leads_back(resources: Resources) -> None:
    for text in ("sap", "sap:passes=3", "sap:fraction=2.0,sampling=binomial,layers=stem_2"):
        assert build(text.partition(":")[2], resources).name == text == defence_name(text, resources)


def test_a_network_without_a_linear_end_is_refused(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.classifier, "_head", (None,))
    with pytest.raises(ModelError, match="does not end in a linear layer"):
        build_defence("sap", resources)
