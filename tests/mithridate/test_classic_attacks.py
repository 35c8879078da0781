"""What the attacks without a radius have in common: they return what can be sent, repeatably, and survive anything."""

from __future__ import annotations

import pytest
import torch

from mithridate.attacks import JSMA, Attack, CarliniWagner, DeepFool, OnePixel
from tests.mithridate.attack_helpers import answers, distances, linear, noisy, random_pixels, run

ATTACKS = [
    OnePixel(population=12, generations=6),
    JSMA(gamma=0.5),
    DeepFool(),
    CarliniWagner(steps=40, searches=5, initial_c=0.1),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_only_ever_shows_and_returns_what_can_be_sent(attack: Attack) -> None:
    forward, _, _ = linear(0)
    pixels = random_pixels(1, 6)
    before, seen = pixels.clone(), []

    def recorded(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.detach().clone())
        return forward(images)

    found = run(attack, recorded, pixels, answers(forward, pixels))
    assert found.dtype == torch.uint8
    assert found.shape == pixels.shape
    assert torch.equal(pixels, before)
    for images in seen:
        levels = images.double() * 255
        assert (levels - levels.round()).abs().max() < 1e-4
        assert levels.min() >= 0
        assert levels.max() <= 255.001


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_the_seed_decides_and_nothing_else(attack: Attack) -> None:
    forward, _, _ = linear(2)
    pixels = random_pixels(3, 6)
    labels = answers(forward, pixels)
    first = run(attack, forward, pixels, labels, seed=1)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert torch.equal(run(attack, forward, pixels, labels, seed=1), first)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("attack", [a for a in ATTACKS if not isinstance(a, OnePixel)], ids=repr)
def test_an_image_is_attacked_the_same_alone(attack: Attack) -> None:
    forward, _, _ = linear(4)
    pixels = random_pixels(5, 5)
    labels = answers(forward, pixels)
    together = run(attack, forward, pixels, labels)
    alone = torch.cat([run(attack, forward, pixels[i : i + 1], labels[i : i + 1]) for i in range(5)])
    assert (together.int() - alone.int()).abs().max() <= 1  # products of other sizes round otherwise


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_images_that_are_misread_already_are_left_misread(attack: Attack) -> None:
    forward, _, _ = linear(6)
    pixels = random_pixels(7, 6)
    wrong = (answers(forward, pixels) + 1) % 4
    found = run(attack, forward, pixels, wrong)
    assert not (answers(forward, found) == wrong).any()
    if not isinstance(attack, JSMA):  # which goes for its target
        assert torch.equal(found, pixels)


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_survives_a_network_without_slope_and_one_that_gives_nan(attack: Attack) -> None:
    pixels, labels = random_pixels(0, 3), torch.zeros(3, dtype=torch.int64)
    flat = torch.tensor([[1.0, 0.0, 0.0]])
    for factor in (0.0, torch.nan):
        found = run(attack, lambda x, factor=factor: x.flatten(1)[:, :3] * factor + flat, pixels, labels)
        assert found.dtype == torch.uint8
        if not isinstance(attack, OnePixel):  # without a slope or an answer nothing is better than the image
            assert torch.equal(found, pixels)


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_no_images(attack: Attack) -> None:
    forward, _, _ = linear(0)
    assert len(run(attack, forward, random_pixels(0, 0), torch.zeros(0, dtype=torch.int64))) == 0


@pytest.mark.parametrize("kind", [DeepFool, CarliniWagner])
def test_checks_ask_a_random_network_more_than_once(kind: type[DeepFool] | type[CarliniWagner]) -> None:
    """What one lucky draw misreads is misread by chance: with more checks the points hold up against fresh draws."""
    plain, _, _ = linear(8)
    pixels = random_pixels(9, 32)
    labels = answers(plain, pixels)
    options = {"steps": 30, "searches": 3, "initial_c": 1.0} if kind is CarliniWagner else {}
    share, far = {}, {}
    for checks in (1, 8):
        found = run(kind(checks=checks, **options), noisy(plain, 1, 1.0), pixels, labels)
        fresh = noisy(plain, 2, 1.0)
        share[checks] = torch.stack([answers(fresh, found) != labels for _ in range(20)]).double().mean()
        far[checks] = distances(found, pixels).mean()
    assert share[8] > share[1] + 0.05
    assert far[8] > far[1]
