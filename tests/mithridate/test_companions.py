"""Random resizing, the vote of a region, pixel deflection: what each pass sees, and what is made of the passes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Prediction, Resources, build_defence, defence_name
from mithridate.defenses.averaging import Draws
from mithridate.defenses.networks import BaseNetwork
from mithridate.defenses.pixel_deflection import PixelDeflectionConfig, deflect, denoise
from mithridate.defenses.randomization import RandomizationConfig, Resizer, canvas_of
from mithridate.defenses.region import Surroundings
from mithridate.defenses.sampled import Sampled
from mithridate.errors import BudgetExceededError, ModelError, OptionError
from mithridate.models import Classifier
from mithridate.types import Images, to_images

TEXTS = [
    "randomization:fill=0,passes=9",
    "region:passes=50",
    "pixel-deflection:deflections=2,window=1,passes=2,sigma=0.01",
    "sap:passes=3",
]


@pytest.fixture(scope="module")
def images(digits_test: LabelledImages) -> Images:
    return to_images(torch.from_numpy(digits_test.images[:6]))


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]


def build(text: str, resources: Resources) -> Sampled:
    defence = build_defence(text, resources)
    assert isinstance(defence, Sampled)
    return defence


def ask(text: str, resources: Resources, images: Images, seed: int = 3, budget: Budget | None = None) -> Prediction:
    generator = torch.Generator().manual_seed(seed)
    return build(text, resources).predict(images, generator=generator, budget=budget or Budget())


# What they all keep


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_is_the_same_alone_in_a_batch_and_in_pieces(
    resources: Resources, images: Images, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.random.get_rng_state()
    together = ask(text, resources, images).scores
    assert torch.equal(ask(text, resources, images).scores, together)
    for row in range(6):
        alone = ask(text, resources, images[row : row + 1]).scores[0]
        torch.testing.assert_close(alone, together[row], rtol=0, atol=1e-5)
    assert not torch.equal(ask(text, resources, images, seed=4).scores, together)
    monkeypatch.setattr("mithridate.defenses.averaging._BYTES_AT_A_TIME", 1)
    torch.testing.assert_close(ask(text, resources, images).scores, together, rtol=0, atol=1e-5)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("text", TEXTS)
def test_scores_sum_to_one_and_the_base_is_told(resources: Resources, images: Images, text: str) -> None:
    prediction = ask(text, resources, images)
    torch.testing.assert_close(prediction.scores.sum(1), torch.ones(6))
    torch.testing.assert_close(prediction.base_scores, resources.classifier(images).softmax(1), rtol=0, atol=1e-6)
    if not text.startswith("randomization"):  # eight pixels at nine are another image to a network trained on eight
        assert (prediction.scores.argmax(1) == prediction.base_scores.argmax(1)).double().mean() >= 0.5


@pytest.mark.parametrize("text", TEXTS)
def test_attackers_get_a_slope_fresh_draws_and_the_budgets_word(
    resources: Resources, images: Images, text: str
) -> None:
    defence, point, generator = build(text, resources), images.clone().requires_grad_(), torch.Generator()
    first, second = (defence.surrogate(point, generator=generator, budget=Budget()) for _ in range(2))
    assert not torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first[:, 0].sum(), point)
    assert torch.isfinite(gradient).all()
    assert gradient.flatten(1).any(1).all()
    with pytest.raises(BudgetExceededError):
        defence.surrogate(point, generator=generator, budget=Budget(cancelled=lambda: True))


@pytest.mark.parametrize("text", ["region:passes=1000000", "randomization:passes=100000"])
def test_a_budget_that_ends_between_two_runs_ends_it(resources: Resources, images: Images, text: str) -> None:
    looks = iter([False] * 3)
    with pytest.raises(BudgetExceededError) as caught:
        ask(text, resources, images, budget=Budget(cancelled=lambda: next(looks, True)))
    assert caught.value.reason == "cancelled"


# Random size and place


def slow_resize(image: torch.Tensor, size: int, top: int, left: int, canvas: int, fill: float) -> torch.Tensor:
    small = F.interpolate(image[None], size=(size, size), mode="nearest")[0]
    out = torch.full((image.shape[0], canvas, canvas), fill)
    out[:, top : top + size, left : left + size] = small
    return out


@pytest.mark.parametrize(("side", "mode"), [(32, "grow"), (32, "keep"), (8, "grow"), (13, "keep")])
def test_the_image_is_somewhere_on_the_canvas_at_a_published_size(resources: Resources, side: int, mode: str) -> None:
    image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(1))
    config = RandomizationConfig(size=mode, fill=0.25)  # type: ignore[arg-type]
    resizer = object.__new__(Resizer)  # without the network that would have to take it
    object.__setattr__(resizer, "config", config)
    moved = resizer.apply(image.expand(400, -1, -1, -1), generators(400))
    canvas = canvas_of(side) if mode == "grow" else side
    sizes = range(side, canvas) if mode == "grow" else range(math.ceil(0.9 * side), side + 1)
    assert moved.shape == (400, 3, canvas, canvas)
    seen = set()
    possible = {
        (size, top, left): slow_resize(image, size, top, left, canvas, 0.25)
        for size in sizes
        for top in range(canvas - size + 1)
        for left in range(canvas - size + 1)
    }
    for found in moved[:150]:
        fits = [key for key, wanted in possible.items() if torch.equal(found, wanted)]
        assert len(fits) == 1
        seen.add(fits[0])
    assert {size for size, _, _ in seen} == set(sizes)
    assert len(seen) > min(20, len(possible) // 2)


def test_the_published_sizes() -> None:
    assert (canvas_of(299), canvas_of(32), canvas_of(224)) == (331, 36, 248)


def test_a_network_of_one_size_is_told_what_to_use(resources: Resources) -> None:
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    fixed = replace(resources, classifier=Classifier(flat, resources.classifier.spec))
    with pytest.raises(ModelError, match="does not take images larger than 8 pixels; use randomization:size=keep"):
        build("randomization", fixed)
    build("randomization:size=keep", fixed)


# The region


def test_a_region_is_the_vote_of_points_of_its_cube(resources: Resources, images: Images) -> None:
    seen: list[torch.Tensor] = []
    sampler = build("region:radius=0.1,passes=20", resources).averaging.sampler
    assert isinstance(sampler, Surroundings)
    with torch.no_grad():
        hook = resources.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits = sampler.begin(images, BaseNetwork(classifier=resources.classifier))(
            Draws(rows=range(6), passes=range(300))
        )
        hook.remove()
    away = seen[0] - images.repeat_interleave(300, 0)
    assert seen[0].min() == 0
    assert seen[0].max() == 1
    assert 0.099 < away.abs().max() <= 0.1 + 1e-6
    free = (images > 0.1) & (images < 0.9)
    inner = away[free.repeat_interleave(300, 0)]
    # Uniform: mean 0 and variance r^2 / 3; six standard errors.
    assert abs(float(inner.mean())) <= 6 * 0.1 / math.sqrt(3 * len(inner))
    assert float(inner.var()) == pytest.approx(0.1**2 / 3, rel=6 * math.sqrt(0.8 / len(inner)))
    votes = F.one_hot(logits.argmax(1), 10).view(6, 300, 10).double().mean(1)
    scores = ask("region:radius=0.1,passes=300", resources, images).scores.double()
    assert ((scores * 300).round() - scores * 300).abs().max() < 1e-4  # whole votes
    assert (scores - votes).abs().max() < 0.25


def test_grey_and_colour_images_have_the_authors_radius(resources: Resources) -> None:
    sampler = build("region", resources).averaging.sampler
    assert isinstance(sampler, Surroundings)
    assert sampler.radius == 0.3
    assert build("region", resources).name == "region"
    assert build("region:radius=0.3", resources).name == "region:radius=0.3"


# Deflection


def test_deflection_is_the_loop_one_would_write(resources: Resources) -> None:
    config = PixelDeflectionConfig(deflections=40, window=2)
    images = torch.rand(3, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    found = deflect(images, config, generators(3))
    for image, result, generator in zip(images, found, generators(3), strict=True):
        slow, draws = image.clone(), torch.rand(5, 40, generator=generator, dtype=torch.float64).numpy()
        for number in range(40):
            channel, y, x = (int(share * side) for share, side in zip(draws[:3, number], (3, 7, 9), strict=True))
            rows = [row for row in range(7) if abs(row - y) <= 2]
            columns = [column for column in range(9) if abs(column - x) <= 2]
            row, column = rows[int(draws[3, number] * len(rows))], columns[int(draws[4, number] * len(columns))]
            slow[channel, y, x] = slow[channel, row, column].clone()
        assert torch.equal(result, slow)
        assert not torch.equal(result, image)


@pytest.mark.parametrize("channels", [1, 3])
def test_wavelets_take_noise_away(channels: int) -> None:
    y, x = np.mgrid[0:32, 0:32] / 32
    smooth = torch.from_numpy(0.5 + 0.3 * np.sin(3 * x + 2 * y)).float().expand(1, channels, 32, 32)
    noisy = (smooth + 0.04 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    clean = denoise(noisy, 0.04)
    assert clean.dtype == noisy.dtype
    assert (clean - smooth).square().mean() < 0.5 * (noisy - smooth).square().mean()
    assert denoise(noisy, 0.0) is noisy


def test_backward_deflection_is_the_identity(resources: Resources, images: Images) -> None:
    defence, point = build("pixel-deflection:deflections=20,window=2", resources), images.clone().requires_grad_()
    draws = Draws(rows=range(6), passes=range(1))
    run = defence.averaging.sampler.begin_attack(point, BaseNetwork(classifier=resources.classifier))
    (gradient,) = torch.autograd.grad(run(draws)[:, 0].sum(), point)
    with torch.no_grad():
        moved = denoise(deflect(images, PixelDeflectionConfig(deflections=20, window=2), draws.generators), 0.04)
    moved.requires_grad_()
    (wanted,) = torch.autograd.grad(resources.classifier(moved)[:, 0].sum(), moved)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


# Names


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("region:passes=0", "region: passes=0 is out of range"),
        ("region:radius=2", "region: radius=2.0 is out of range"),
        ("randomization:size=shrink", "size='shrink' is not known; allowed: grow, keep"),
        ("randomization:fill=2", "fill=2.0 is out of range"),
        ("pixel-deflection:window=0", "window=0 is out of range"),
        ("pixel-deflection:sigma=-1", "sigma=-1.0 is out of range"),
        ("pixel-deflections", "did you mean 'pixel-deflection'"),
    ],
)
def test_what_is_wrong_is_said(resources: Resources, text: str, part: str) -> None:
    with pytest.raises(OptionError) as caught:
        build_defence(text, resources)
    assert part in str(caught.value)


@pytest.mark.parametrize("text", ["randomization", "region", "pixel-deflection:deflections=20", "region:radius=0.1"])
def test_a_name_leads_back(resources: Resources, text: str) -> None:
    assert build(text, resources).name == text == defence_name(text, resources)
