"""DeepFool against the closed form of a linear model, and against foolbox."""

from __future__ import annotations

import warnings

import pytest
import torch

from mithridate.attacks import DeepFool
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources
from mithridate.types import to_images
from tests.mithridate.attack_helpers import answers, border_distances, distances, linear, random_pixels, run


def test_is_the_closed_form_on_a_linear_model() -> None:
    forward, weight, bias = linear(0)
    pixels = random_pixels(1, 40)
    labels = answers(forward, pixels)
    found = run(DeepFool(), forward, pixels, labels)
    assert not (answers(forward, found) == labels).any()
    wanted, made = border_distances(weight, bias, pixels), distances(found, pixels)
    assert (made >= 0.999 * wanted).all()
    far = wanted > 0.08  # where rounding, a thousandth a value, hardly matters
    assert int(far.sum()) > 15
    assert (made[far] / wanted[far] - 1.02).abs().max() < 0.05


def test_goes_on_where_rounding_undoes_a_step() -> None:
    """A border a fifth of a level away: the first step rounds to nothing."""
    pixels = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)

    def forward(images: torch.Tensor) -> torch.Tensor:
        ahead = (100.2 / 255 - images).flatten(1).sum(1)
        return torch.stack([ahead, torch.zeros_like(ahead)], 1)

    found = run(DeepFool(overshoot=0), forward, pixels, torch.zeros(1, dtype=torch.int64))
    assert answers(forward, found).tolist() == [1]
    assert (found.int() - 100).abs().max() == 1


def test_as_near_as_foolbox(resources: Resources, digits_test: LabelledImages) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foolbox = pytest.importorskip("foolbox", exc_type=ImportError)
    pixels, labels = torch.from_numpy(digits_test.images[:64]), torch.from_numpy(digits_test.labels[:64])
    kept = answers(resources.classifier, pixels) == labels
    pixels, labels = pixels[kept], labels[kept]
    model = foolbox.PyTorchModel(resources.classifier.eval(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.L2DeepFoolAttack(steps=50, overshoot=0.02, candidates=10)
    _, theirs, fooled = attack(model, to_images(pixels), labels, epsilons=None)
    assert bool(fooled.all())
    found = run(DeepFool(), resources.classifier, pixels, labels)
    assert not (answers(resources.classifier, found) == labels).any()
    assert distances(found, pixels).median() <= 1.05 * (theirs - to_images(pixels)).flatten(1).norm(dim=1).median()
