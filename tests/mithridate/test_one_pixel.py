"""One Pixel: it changes one, finds the one that matters, and stops when it has."""

from __future__ import annotations

import torch

from mithridate.attacks import OnePixel
from mithridate.attacks.white_box.one_pixel import painted
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources
from tests.mithridate.attack_helpers import answers, linear, random_pixels, run


def test_changes_one_pixel_only(resources: Resources, digits_test: LabelledImages) -> None:
    pixels, labels = torch.from_numpy(digits_test.images[:60]), torch.from_numpy(digits_test.labels[:60])
    found = run(OnePixel(population=20, generations=8), resources.classifier, pixels, labels)
    assert (found != pixels).any(1).flatten(1).sum(1).max() <= 1
    before, after = (answers(resources.classifier, some) == labels for some in (pixels, found))
    assert after.sum() < before.sum()
    assert not (after & ~before).any()


def test_paints_the_pixel_and_colour_of_the_genes() -> None:
    pixels = random_pixels(0, 2)
    found = painted(pixels, torch.tensor([[0.0, 0.99, 0.0, 0.5, 1.0], [0.5, 0.25, 1.0, 1.0, 1.0]]))
    assert found[0, :, 0, 3].tolist() == [0, 128, 255]
    assert found[1, :, 2, 1].tolist() == [255, 255, 255]
    assert (found != pixels).any(1).flatten(1).sum(1).tolist() == [1, 1]


def test_finds_the_one_pixel_that_matters() -> None:
    """Only pixel (2, 1) has a say, and only if nearly white: one random trial in some 28,000."""
    pixels = torch.full((8, 3, 4, 4), 20, dtype=torch.uint8)

    def forward(images: torch.Tensor) -> torch.Tensor:
        white = images[:, :, 2, 1].mean(1)
        return torch.stack([torch.full_like(white, 0.95), white], 1)

    labels = torch.zeros(8, dtype=torch.int64)
    found = run(OnePixel(population=100, generations=60), forward, pixels, labels)
    assert (answers(forward, found) == 1).all()
    assert (found[:, :, 2, 1] > 200).all()


def test_stops_an_image_that_has_fallen_and_asks_in_bounded_calls() -> None:
    pixels, calls = random_pixels(1, 5), []

    def forward(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        changed = (images * 255).round().to(torch.uint8).flatten(1).double().std(1)
        return torch.stack([torch.zeros(len(images)), (changed - changed.mean()).float()], 1)

    def unmoved(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return torch.tensor([1.0, 0.0]).expand(len(images), 2)

    attack = OnePixel(population=30, generations=50, rows_a_call=64)
    run(attack, forward, pixels, torch.zeros(5, dtype=torch.int64))
    assert max(calls) <= 64
    assert sum(calls) < 5 * 30 * 5  # nowhere near 51 generations
    calls.clear()
    run(OnePixel(population=30, generations=4, rows_a_call=64), unmoved, pixels, torch.zeros(5, dtype=torch.int64))
    assert sum(calls) == 5 + 5 * 30 * 5


def test_works_on_scores_alone() -> None:
    """A network that gives no gradient, and is never asked for one."""
    plain, _, _ = linear(3)
    pixels = random_pixels(4, 6)

    def forward(images: torch.Tensor) -> torch.Tensor:
        assert not images.requires_grad
        return plain(images).softmax(1).log()

    labels = answers(plain, pixels)
    found = run(OnePixel(population=20, generations=10), forward, pixels, labels)
    assert (answers(plain, found) != labels).any()
