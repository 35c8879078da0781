"""Carlini and Wagner's attack: near the closed form of a linear model, no worse than foolbox, and nothing is frozen."""

from __future__ import annotations

import warnings

import pytest
import torch

from mithridate.attacks import CarliniWagner, DeepFool
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources
from mithridate.types import to_images
from tests.mithridate.attack_helpers import answers, border_distances, distances, linear, random_pixels, run


@pytest.mark.parametrize("classes", [2, 4])
def test_is_near_the_closed_form_on_a_linear_model(classes: int) -> None:
    """With several classes the nearest need not be the one whose scores are nearest, which the attack goes for."""
    forward, weight, bias = linear(0, classes)
    pixels = random_pixels(1, 40)
    labels = answers(forward, pixels)
    found = run(CarliniWagner(), forward, pixels, labels)
    assert not (answers(forward, found) == labels).any()
    wanted, made = border_distances(weight, bias, pixels), distances(found, pixels)
    assert (made >= wanted * 0.999).all()
    far = wanted > 0.08  # nearer than that, rounding is most of it
    assert int(far.sum()) > 15
    share = 1.0 if classes == 2 else 0.7
    assert (made[far] < 1.02 * wanted[far]).double().mean() >= share


def test_black_and_white_pixels_move() -> None:
    forward, _, _ = linear(2)
    pixels = ((random_pixels(3, 10) > 127) * 255).to(torch.uint8)
    labels = answers(forward, pixels)
    found = run(CarliniWagner(), forward, pixels, labels)
    assert not (answers(forward, found) == labels).any()
    assert distances(found, pixels).median() <= distances(run(DeepFool(), forward, pixels, labels), pixels).median()


def test_kappa_buys_confidence_with_distance() -> None:
    forward, _, _ = linear(4)
    pixels = random_pixels(5, 10)
    labels = answers(forward, pixels)
    near, sure = (run(CarliniWagner(initial_c=0.1, kappa=kappa), forward, pixels, labels) for kappa in (0.0, 2.0))
    logits = forward(to_images(sure))
    lead = logits.scatter(1, labels[:, None], -torch.inf).amax(1) - logits.gather(1, labels[:, None])[:, 0]
    assert lead.min() >= 2
    assert (distances(sure, pixels) > distances(near, pixels)).all()


def test_no_farther_than_foolbox_and_deepfool(resources: Resources, digits_test: LabelledImages) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foolbox = pytest.importorskip("foolbox", exc_type=ImportError)
    pixels, labels = torch.from_numpy(digits_test.images[:32]), torch.from_numpy(digits_test.labels[:32])
    kept = answers(resources.classifier, pixels) == labels
    pixels, labels = pixels[kept], labels[kept]
    model = foolbox.PyTorchModel(resources.classifier.eval(), bounds=(0, 1), device="cpu")
    settings = {"steps": 100, "stepsize": 0.01, "initial_const": 0.1, "binary_search_steps": 6}
    _, theirs, _ = foolbox.attacks.L2CarliniWagnerAttack(**settings)(model, to_images(pixels), labels, epsilons=None)
    found = run(CarliniWagner(steps=100, searches=6, initial_c=0.1), resources.classifier, pixels, labels)
    assert not (answers(resources.classifier, found) == labels).any()
    made = distances(found, pixels).median()
    assert made <= 1.05 * (theirs - to_images(pixels)).flatten(1).norm(dim=1).median()
    assert made <= distances(run(DeepFool(), resources.classifier, pixels, labels), pixels).median()
