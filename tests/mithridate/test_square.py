"""Square: as strong as another implementation, windows as published, and a random defence judged by its mean."""

from __future__ import annotations

import torch
from pyautoattack.square import SquareAttack

from mithridate.attacks.black_box import Square
from mithridate.attacks.in_process import InProcessOracle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources, build_defence
from mithridate.types import Epsilon, to_images
from tests.mithridate.attack_helpers import answers, linear, noisy, random_pixels
from tests.mithridate.black_box_helpers import Books

EPSILON = Epsilon(6)


def test_windows_shrink_as_published_for_any_budget() -> None:
    shape = torch.Size((1, 3, 32, 32))
    for budget in (1000, 10_000):
        spent = torch.tensor([0, 10, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]) * budget // 10_000
        spent += (budget < 10_000) * torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
        sides = Square(epsilon=EPSILON)._sides(spent, budget, shape)
        assert sides.tolist() == [29, 29, 20, 14, 10, 7, 5, 4, 3, 2, 1]


def test_a_point_differs_from_the_best_so_far_by_one_square_at_the_border_of_the_ball() -> None:
    forward, _, _ = linear(2)
    pixels = random_pixels(2, 1)
    oracle = Books(lambda images: forward(images) * 0 + torch.tensor([0.0, 1.0, 0.0, 0.0]), track="scores")
    Square(epsilon=EPSILON).run(oracle, pixels, torch.tensor([1]), seed=0, budget=60)
    image, stripes, *others = (torch.tensor(list(point), dtype=torch.int64).view(3, 4, 4) for point in oracle.of(0))
    assert ((stripes - image).abs() == EPSILON.levels).all()
    assert (stripes - image == (stripes - image)[:, :1]).all()
    for point in others:  # nothing is ever better, so all are squares in the stripes
        changed = (point != stripes).any(0)
        assert ((point - image).abs() == EPSILON.levels).all()
        down, across = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        new = (point - image)[:, down[0] : down[-1] + 1, across[0] : across[-1] + 1]
        assert new.flatten(1).unique(dim=1).shape[1] == 1
    assert len(others) > 30


def test_repeats_are_queries_and_their_mean_decides() -> None:
    forward, _, _ = linear(6)
    pixels = random_pixels(6, 40)
    labels = answers(forward, pixels)
    stood = []
    for repeats in (1, 8):
        attack = Square(epsilon=EPSILON, random=True, repeats=repeats)
        oracle = Books(noisy(forward, 1, 2.0), track="scores")
        result = attack.run(oracle, pixels, labels, seed=0, budget=300)
        assert oracle.counts(40) == [300] * 40
        stood.append(int((answers(forward, result.pixels) == labels).sum()))
    assert stood[1] < stood[0]
    row = oracle.of(0)
    assert len(set(row[1:9])) == 1
    assert len(set(row[9:17])) == 1


def test_no_weaker_than_another_implementation(resources: Resources, digits_test: LabelledImages) -> None:
    pixels, labels = torch.from_numpy(digits_test.images[:60]), torch.from_numpy(digits_test.labels[:60])
    theirs = SquareAttack(resources.classifier, norm="Linf", n_queries=150, eps=24 / 255, seed=0, device="cpu")
    fooled = resources.classifier(theirs.perturb(to_images(pixels), labels)).argmax(1) != labels
    ours = Square(epsilon=Epsilon(24)).run(
        InProcessOracle(build_defence("none", resources), classes=10), pixels, labels, seed=0, budget=150
    )
    assert 15 < int(fooled.sum()) <= int((ours.broken_at > 0).sum()) < 60
