"""Weights that are held constant: they answer as the defence does where they were adapted, and have true gradients."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from index_builder.build import BuildPlan, build_bundle
from mithridate.attacks import parse_attack
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Resources, build_defence, head_ridge
from mithridate.defenses.head_ridge import FittedHeads
from mithridate.defenses.rmc import RMC
from mithridate.types import Epsilon, Images, to_images

RIDGE, ADAM = "rmc:gate=0", "rmc:solver=adam,gate=0"
TAIL = "rmc:scope=tail,gate=0,epochs=2,held_out=0,precision=float32"
ALL = "rmc:scope=all,gate=0,epochs=1,held_out=0,precision=float32"
PLAIN = (RIDGE, "rmc:gate=0,held_out=0", "rmc:temperature=0,gate=0", ADAM, TAIL, ALL)


@pytest.fixture(scope="module")
def composed(
    tmp_path_factory: pytest.TempPathFactory,
    digits_bundle: Path,
    manipulated_bundle: Path,
    digits_train: LabelledImages,
) -> Resources:
    """With a tail and a PRM."""
    out = tmp_path_factory.mktemp("held") / "digits"
    data = replace(digits_train, images=digits_train.images[:300], labels=digits_train.labels[:300])
    model = digits_bundle / "model.safetensors"
    build_bundle(BuildPlan(data=data, out=out, model=model, tail_layer="auto", attacks=("pgd2",), epsilon=Epsilon(32)))
    return replace(Resources.load(Bundle.open(out)), prms=tuple(Bundle.open(manipulated_bundle).prms()))


@pytest.fixture(scope="module")
def images(composed: Resources, digits_test: LabelledImages) -> Images:
    """Five digits, attacked, so that adaptation changes most of their answers."""
    pixels, labels = torch.from_numpy(digits_test.images[:5]), torch.from_numpy(digits_test.labels[:5])
    attack = parse_attack("pgd10", epsilon=Epsilon(32))
    return to_images(attack.run(composed.classifier, pixels, labels, generator=drawn()))


def drawn(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(text: str, resources: Resources) -> RMC:
    defence = build_defence(text, resources)
    assert isinstance(defence, RMC)
    return defence


def close(found: torch.Tensor, wanted: torch.Tensor, within: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=within)


@pytest.mark.parametrize("text", PLAIN)
def test_held_weights_answer_as_the_defence_does_where_they_were_adapted(
    text: str, composed: Resources, images: Images
) -> None:
    defence = made(text, composed)
    before = {name: value.clone() for name, value in composed.classifier.state_dict().items()}
    answer = defence.predict(images, generator=drawn(), budget=Budget())
    held = defence.hold(images, generator=drawn())
    found = defence.held_logits(images, [held], generator=drawn(9))
    assert found.shape == (5, 2, 10)
    close(found[:, 0].softmax(1), answer.base_scores)
    close(found[:, 1].softmax(1), answer.scores)
    assert (answer.scores - answer.base_scores).abs().max() > 0.05, "nothing was adapted: the test says nothing"
    assert held.adapted.tolist() == [fate is not None and fate.weights == "adapted" for fate in answer.adaptations]
    assert all(torch.equal(value, before[name]) for name, value in composed.classifier.state_dict().items())
    again = defence.predict(images, generator=drawn(), budget=Budget())
    assert torch.equal(again.scores, answer.scores), "holding has left something behind"


@pytest.mark.parametrize(
    "text", ["prm:shift=none+rmc:gate=0", "rmc:gate=0+sap", TAIL + "+sap", "prm:shift=none+rmc:gate=0+sap"]
)
def test_with_other_stages_they_are_what_the_surrogate_is_there(text: str, composed: Resources, images: Images) -> None:
    """At the images themselves the surrogate adapts to the same, and draws the same where the seed is the same."""
    defence = made(text, composed)
    with torch.no_grad():
        wanted = defence.surrogate(images, generator=drawn(), budget=Budget())
        found = defence.held_logits(images, [defence.hold(images, generator=drawn())], generator=drawn())
    close(found[:, 1].softmax(1), wanted.softmax(1), 1e-4)


@pytest.mark.parametrize("text", ["prm+rmc", "rmc+sap", "prm+rmc+sap", ALL + "+sap"])
def test_random_stages_are_drawn_afresh_from_the_seed(text: str, composed: Resources, images: Images) -> None:
    defence, few = made(text, composed), images[:2].clone().requires_grad_()
    held = [defence.hold(few.detach(), generator=drawn()) for _ in range(2)]
    for models in ([], held):
        found = defence.held_logits(few, models, generator=drawn())
        assert found.shape == (2, 1 + len(models), 10)
        assert torch.equal(found, defence.held_logits(few, models, generator=drawn()))
        assert not torch.equal(found, defence.held_logits(few, models, generator=drawn(4)))
    (slope,) = torch.autograd.grad(found[:, 2].logsumexp(1).sum() - found[:, 0, 0].sum(), few)
    assert slope.isfinite().all()
    assert (slope.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("text", [RIDGE, ADAM, TAIL, ALL])
def test_gradients_are_the_numeric_ones(text: str, composed: Resources, images: Images) -> None:
    exact = replace(composed, classifier=deepcopy(composed.classifier).double())
    defence, few = made(text, exact), images[:2].double()
    held = [defence.hold(few, generator=drawn())]

    def values(points: torch.Tensor) -> torch.Tensor:
        return defence.held_logits(points, held, generator=drawn())

    point = (few + 0.01 * torch.randn(few.shape, generator=drawn(), dtype=few.dtype)).requires_grad_()
    direction = torch.randn(few.shape, generator=drawn(1), dtype=few.dtype)
    weights = torch.randn(values(point).shape, generator=drawn(2), dtype=few.dtype)
    (slope,) = torch.autograd.grad((values(point) * weights).sum(), point)
    with torch.no_grad():
        rise = values(point + 1e-6 * direction) - values(point - 1e-6 * direction)
    numeric, exactly = (rise * weights).sum() / 2e-6, (slope * direction).sum()
    assert float(exactly) == pytest.approx(float(numeric), rel=1e-3)


@pytest.mark.parametrize("text", [RIDGE, ADAM, TAIL, ALL])
def test_several_are_each_as_if_alone_and_parts_are_as_in_the_whole(
    text: str, composed: Resources, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_ridge, "_NUMBERS_AT_A_TIME", 40_000)  # so that a batch is fitted in several parts
    defence = made(text, composed)
    first, second = (defence.hold(points, generator=drawn()) for points in (images, 1 - images))
    with torch.no_grad():
        both = defence.held_logits(images, [first, second], generator=drawn())
        for number, one in enumerate((first, second)):
            alone = defence.held_logits(images, [one], generator=drawn())
            close(both[:, [0, 1 + number]], alone)
        assert (both[:, 1] - both[:, 2]).abs().max() > 1e-2
        for start, stop in ((0, 2), (1, 4), (4, 5)):
            part = [one.rows(start, stop) for one in (first, second)]
            close(defence.held_logits(images[start:stop], part, generator=drawn()), both[start:stop], 1e-4)


def test_an_image_without_neighbours_keeps_the_base_model(composed: Resources, images: Images) -> None:
    defence = made("rmc:radius=1e-6,gate=0", composed)
    held = defence.hold(images, generator=drawn())
    assert not held.adapted.any()
    found = defence.held_logits(images, [held], generator=drawn())
    assert torch.equal(found[:, 1], found[:, 0])


@pytest.mark.parametrize(("neighbors", "bias"), [(6, True), (40, True), (40, False)])
def test_a_fit_is_all_said_by_its_linear_map(neighbors: int, bias: bool) -> None:
    """Both forms of the solution (more neighbours than features, or fewer), and an image whose fit has failed."""
    generator, width, classes = drawn(), 12, 4
    head = torch.nn.Linear(width, classes, bias=bias).double()
    fitted = FittedHeads(
        head=head,
        inputs=torch.randn(3, neighbors, width + 1, generator=generator, dtype=torch.float64),
        missing=0.3 * torch.randn(3, neighbors, classes, generator=generator, dtype=torch.float64),
        weights=torch.rand(3, neighbors, generator=generator, dtype=torch.float64).requires_grad_(),
        solved=torch.tensor([True, False, True]),
        one=float(bias),
        penalty=1e-3,
    )
    points = 3 * torch.randn(3, 7, width, generator=generator, dtype=torch.float64)
    held = fitted.held()
    close(held(points), fitted(points), 1e-9)
    close(held.rows(1, 3)(points[1:3]), fitted(points)[1:3], 1e-9)
    close(held(points)[1].softmax(1), head(points[1]).softmax(1), 1e-2)
    assert not held.weight.requires_grad


def test_what_searches_is_the_embedding_behind_the_transform(composed: Resources, images: Images) -> None:
    few = images[:2].clone().requires_grad_()
    plain = made("rmc", composed).embed(few, generator=drawn())
    assert torch.equal(plain, composed.classifier.embed(few))
    still = made("prm:shift=none+rmc", composed)
    assert still.first is not None
    seen = still.first.apply(few, (0, 0))
    close(still.embed(few, generator=drawn()), composed.classifier.embed(seen))
    moved = made("prm+rmc", composed).embed(few, generator=drawn())
    (slope,) = torch.autograd.grad(moved.square().sum(), few)
    assert (slope.flatten(1).abs().amax(1) > 0).all()


def test_it_says_where_the_base_model_may_answer(composed: Resources) -> None:
    free = "held_out=0,gate=0"
    assert not made(f"rmc:{free}", composed).answers_as_base
    for text in ("rmc", "rmc:gate=0", f"rmc:{free},mix=0.3", "rmc:gate=0.1,held_out=0"):
        assert made(text, composed).answers_as_base, text
