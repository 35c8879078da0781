"""Where the gradient is, which pixels are chosen by it, and what an attack on those alone can do."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mithridate.attacks import PGD, parse_attack
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Resources, build_defence
from mithridate.errors import OptionError
from mithridate.evaluation.pixel_report import PixelPlan, PixelReport, measure_pixels, prm_text
from mithridate.evaluation.pixel_robustness import (
    by_gradient,
    first_pixels,
    input_gradient,
    masked_attacks,
    overlap,
    share_count,
)
from mithridate.models import PRM, PRMSpec, build_prm
from mithridate.models.prm import VARIANTS, lattice
from mithridate.types import Epsilon, Labels, Pixels, to_images

STILL = PGD(epsilon=Epsilon(24), steps=4, step_size=0.04, random_start=False)
"""Draws nothing: an image is attacked the same alone and in a batch."""


def fresh(variant: str) -> PRM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        spec = PRMSpec(variant=variant, size="small", image_shape=(1, 8, 8))
        return build_prm(spec).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def digits(digits_test: LabelledImages) -> tuple[Pixels, Labels]:
    return torch.from_numpy(digits_test.images[:40]), torch.from_numpy(digits_test.labels[:40])


def with_prm(resources: Resources, variant: str = "v0") -> Resources:
    return replace(resources, prms=(fresh(variant),))


def measured(resources: Resources, digits: tuple[Pixels, Labels], **plan: object) -> PixelReport:
    options: dict = {"attack": STILL, "lambdas": (0.0, 0.5, 1.0), "shares": (0.0, 0.25, 0.75, 1.0), **plan}
    return measure_pixels(resources, *digits, PixelPlan(**options))


# The gradient


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_mean_gradient_is_that_of_one_image_after_another(batch_size: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 3, 4))
        pixels = torch.randint(0, 256, (20, 3, 6, 5), dtype=torch.uint8)
    labels, total, right = torch.arange(20) % 4, torch.zeros(6, 5, dtype=torch.float64), []
    for image, label in zip(to_images(pixels), labels, strict=True):
        point = image.clone().requires_grad_()
        logits = network(point[None])
        F.cross_entropy(logits, label[None]).backward()
        assert point.grad is not None
        for channel in point.grad:
            total += channel.abs() / 3 / 20
        right.append(bool(logits.argmax() == label))
    found = input_gradient(network, pixels, labels, batch_size=batch_size)
    torch.testing.assert_close(found.mean, total, rtol=1e-5, atol=0)
    assert found.right.tolist() == right


def test_an_image_that_the_model_is_sure_of_counts_too() -> None:
    """In float32 its loss is exactly 0, and so is the gradient: a model would look robust for being sure."""
    pixels, labels = torch.full((1, 1, 1, 2), 128, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    found = input_gradient(lambda images: images.flatten(1) * torch.tensor([60.0, -2.0]), pixels, labels)
    assert 0 < float(found.mean[0, 0]) < 1e-7


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_lambda_1_the_gradient_is_the_lattice(
    resources: Resources, digits: tuple[Pixels, Labels], variant: str
) -> None:
    report = measured(with_prm(resources, variant), digits, shares=(0.0,))
    gradient = report.manipulated[1.0]
    assert report.iou(gradient) == 1
    assert not gradient.mean[~lattice(variant, 8, 8)].any()
    assert report.iou(report.base) < 0.7
    torch.testing.assert_close(report.manipulated[0.0].mean, report.base.mean, rtol=1e-4, atol=1e-9)


def test_the_accuracies_are_those_of_the_served_defence(resources: Resources, digits: tuple[Pixels, Labels]) -> None:
    manipulated = with_prm(resources)
    report = measured(manipulated, digits, shares=(0.0,))
    models = {"none": report.base, **{prm_text(value, 0): found for value, found in report.manipulated.items()}}
    for text, found in models.items():
        answer = build_defence(text, manipulated).predict(
            to_images(digits[0]), generator=torch.Generator(), budget=Budget()
        )
        assert torch.equal(answer.scores.argmax(1) == digits[1], found.right), text


# Which pixels are chosen


@settings(max_examples=80, deadline=None)
@given(values=st.lists(st.integers(0, 3), min_size=1, max_size=12), columns=st.integers(1, 3), data=st.data())
def test_exactly_so_many_are_chosen_and_none_is_larger(values: list[int], columns: int, data: st.DataObject) -> None:
    """Few values, so many are equal: what a threshold would take all of, or none."""
    gradient = torch.tensor(values, dtype=torch.float64).repeat(columns, 1)
    count = data.draw(st.integers(0, gradient.numel()))
    order = by_gradient(gradient)
    top = first_pixels(order, count, gradient.shape)
    bottom = first_pixels(order.flip(0), gradient.numel() - count, gradient.shape)
    assert top.shape == gradient.shape
    assert int(top.sum()) == count
    assert torch.equal(top, ~bottom), "from both ends, every pixel once"
    if 0 < count < gradient.numel():
        assert gradient[top].min() >= gradient[~top].max()
    assert torch.equal(by_gradient(gradient), order)


def test_equal_pixels_are_taken_in_the_order_of_reading() -> None:
    gradient = torch.tensor([[1.0, 2.0], [2.0, 2.0]])
    assert first_pixels(by_gradient(gradient), 2, (2, 2)).tolist() == [[False, True], [True, False]]


@given(a=st.sets(st.integers(0, 8)), b=st.sets(st.integers(0, 8)))
def test_overlap_is_intersection_over_union(a: set[int], b: set[int]) -> None:
    masks = [torch.tensor([place in places for place in range(9)]).view(3, 3) for places in (a, b)]
    assert overlap(*masks) == (len(a & b) / len(a | b) if a | b else 1)


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.05, 51), (0.25, 256), (0.0004, 0), (0.0005, 1), (1, 1024)])
def test_shares_are_counted_in_pixels(share: float, count: int) -> None:
    assert share_count(share, 1024) == count


# What an attack on them can do


@pytest.mark.parametrize("kind", ["trained", "bumpy"])
def test_masked_attacks_are_those_on_one_image_after_another(
    resources: Resources, digits: tuple[Pixels, Labels], kind: str
) -> None:
    """Nothing off the mask changes, an image that fell stays fallen, and 0 and 1 are no attack and the whole one.

    On the bumpy model an attack on more pixels often does worse, and what fell would stand again.
    """
    pixels, labels = digits[0][:10], digits[1][:10] % (2 if kind == "bumpy" else 10)
    forward, shares = resources.classifier if kind == "trained" else bumpy, (1.0, 0.0, 0.2, 0.6)
    top = by_gradient(input_gradient(forward, pixels, labels).mean)
    orders = {"top": top, "bottom": top.flip(0)}
    found = masked_attacks(forward, pixels, labels, attack=STILL, orders=orders, shares=shares, batch_size=5)
    rose = False
    for number in range(10):
        image, label = pixels[number : number + 1], labels[number : number + 1]
        fell = {"top": False, "bottom": False}
        for share in sorted(shares):
            for name, order in orders.items():
                mask = first_pixels(order, share_count(share, 64), (8, 8))
                moved = STILL.run(forward, image, label, generator=torch.Generator(), mask=mask)
                assert torch.equal(moved[..., ~mask], image[..., ~mask])
                with torch.no_grad():
                    falls = bool(forward(to_images(moved)).argmax(1) != label)
                rose |= fell[name] and not falls
                fell[name] |= falls
            if share == 1:
                fell = dict.fromkeys(fell, any(fell.values()))
            for name in orders:
                assert bool(found[name][share][number]) != fell[name], (number, share, name)
    counts = {name: [int(right.sum()) for right in by_share.values()] for name, by_share in found.items()}
    assert rose or (kind == "trained" and counts["top"][0] > counts["top"][1] > counts["top"][-1]), "this shows nothing"
    assert counts["top"] != counts["bottom"]
    assert list(found["top"]) == sorted(shares)


def bumpy(images: torch.Tensor) -> torch.Tensor:
    weight = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    return (3 * images.flatten(1) @ weight).sin()


def test_where_nothing_stands_there_is_nothing_to_attack(resources: Resources, digits: tuple[Pixels, Labels]) -> None:
    """Not every defence takes an empty batch."""
    wrong = (digits[1] + 1) % 10
    report = measured(
        with_prm(resources), (digits[0][:4], wrong[:4]), attack=parse_attack("fgsm", epsilon=Epsilon(255))
    )
    assert not any(right.any() for orders in report.attacks.values() for right in orders["top"].values())


def test_at_lambda_1_only_the_lattice_can_be_attacked(resources: Resources, digits: tuple[Pixels, Labels]) -> None:
    still = PGD(epsilon=Epsilon(64), steps=5, step_size=0.1, random_start=False)  # else another try may find more
    report = measured(with_prm(resources), digits, attack=still)
    right = report.manipulated[1.0].right
    of_prm = report.attacks[prm_text(1.0, 0)]
    assert torch.equal(of_prm["bottom"][0.75], right), "three quarters of all pixels, and none of them is read"
    assert torch.equal(of_prm["top"][0.25], of_prm["top"][0.75])
    assert int(of_prm["top"][0.25].sum()) < int(right.sum())
    assert set(report.attacks) == {"none", prm_text(1.0, 0)}


def test_a_seed_repeats_and_another_draws_other_pixels(resources: Resources, digits: tuple[Pixels, Labels]) -> None:
    plan = {"attack": parse_attack("pgd2", epsilon=Epsilon(32)), "lambdas": (1.0,), "shares": (0.3,)}
    first, again, other = (measured(with_prm(resources), digits, seed=seed, **plan).summary() for seed in (3, 3, 4))
    assert json.dumps(first, allow_nan=False) == json.dumps(again)
    assert first["gradients"] == other["gradients"]
    assert first["masked"] != other["masked"]


# What is reported


def test_without_a_prm_there_is_the_gradient_of_the_base_model(
    resources: Resources, digits: tuple[Pixels, Labels]
) -> None:
    report = measured(resources, digits)
    assert not report.manipulated
    assert not report.attacks
    (row,) = report.summary()["gradients"]
    assert row["mean_gradient"] > 0
    assert "iou" not in row
    with pytest.raises(ValueError, match="no lattice"):
        report.iou(report.base)


def test_every_number_says_of_how_many(resources: Resources, digits: tuple[Pixels, Labels]) -> None:
    steps: list[tuple[str, int, int]] = []
    plan = PixelPlan(attack=STILL, lambdas=(1.0, 0.5), shares=(0.0, 0.25), attacked=10, batch_size=16)
    report = measure_pixels(with_prm(resources, "v1"), *digits, plan, progress=lambda *step: steps.append(step))
    found = report.summary()
    assert found["prm"] == {"module": 0, "variant": "v1", "lattice_share": 0.5, "iou_by_chance": pytest.approx(1 / 3)}
    assert [row["lambda"] for row in found["gradients"]] == [None, 1.0, 0.5]
    assert {row["images"] for row in found["gradients"]} == {40}
    assert {row["images"] for row in found["masked"]} == {10}
    assert {row["defense"] for row in found["masked"]} == {"none", "prm:lambda=1,shift=none,module=0"}
    for row in (*found["gradients"], *found["masked"]):
        assert row["interval"][0] <= row["accuracy"] == row["correct"] / row["images"] <= row["interval"][1]
    assert {count for row in found["masked"] if row["share"] == 0.25 for count in [row["count"]]} == {16}
    for phase, total in (("input gradients", 9), ("masked attacks", 12)):
        assert [step for step in steps if step[0] == phase] == [(phase, n + 1, total) for n in range(total)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lambdas": (0.0, 1.5)}, r"lambda 1.5 is out of range; allowed: 0 to 1"),
        ({"lambdas": (float("nan"),)}, "lambda nan is out of range"),
        ({"lambdas": ()}, "no lambda"),
        ({"shares": (0.5, 0.5)}, "a share is there twice in 0.5, 0.5"),
        ({"module": 1}, "module=1 is not there; the bundle has 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    resources: Resources, digits: tuple[Pixels, Labels], options: dict, says: str
) -> None:
    with pytest.raises(OptionError, match=says):
        measured(with_prm(resources), digits, **options)
