"""Training: reaches what it should, gives the same weights again, and adversarial training is worth its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from index_builder.training import TrainingPlan, accuracy, train_classifier
from mithridate.attacks import parse_attack
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.errors import ModelError, OptionError
from mithridate.models import Classifier
from mithridate.types import Epsilon


@pytest.fixture(scope="module")
def few(digits_train: LabelledImages) -> LabelledImages:
    return LabelledImages(
        images=digits_train.images[:200], labels=digits_train.labels[:200], classes=digits_train.classes, spec="few"
    )


def weights(classifier: Classifier) -> list[bytes]:
    return [value.numpy().tobytes() for value in classifier.network.state_dict().values()]


def under_attack(classifier: Classifier, data: LabelledImages, count: int = 200) -> float:
    """Accuracy under PGD-10 at 24/255."""
    attack = parse_attack("pgd10", epsilon=Epsilon(24))
    pixels, labels = torch.from_numpy(data.images[:count]), torch.from_numpy(data.labels[:count])
    found = attack.run(classifier, pixels, labels, generator=torch.Generator().manual_seed(0)).numpy()
    attacked = LabelledImages(images=found, labels=data.labels[:count], classes=data.classes, spec="attacked")
    return accuracy(classifier, attacked)


def test_the_default_plan_learns_the_digits(digits_bundle: Path, digits_test: LabelledImages) -> None:
    """The bundle that the other tests use was trained with it."""
    assert accuracy(Bundle.open(digits_bundle).classifier(), digits_test) >= 0.97


def test_same_seed_same_weights_whatever_was_drawn_before(few: LabelledImages) -> None:
    plan = TrainingPlan(epochs=2, seed=5, flip=True)
    torch.manual_seed(1)
    first, state = train_classifier(few, plan), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert weights(train_classifier(few, plan)) == weights(first)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # and nobody else's draws change
    assert weights(train_classifier(few, TrainingPlan(epochs=2, seed=6, flip=True))) != weights(first)


def test_what_comes_out_is_frozen_and_in_evaluation_mode(few: LabelledImages) -> None:
    for adversarial in (None, "n-fgsm", "pgd"):
        model = train_classifier(few, TrainingPlan(epochs=1, adversarial=adversarial, epsilon=Epsilon(8)))
        assert not any(module.training for module in model.network.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model.spec.image_shape == (1, 8, 8)


def test_progress_counts_every_step_to_the_end(few: LabelledImages) -> None:
    seen: list[tuple[str, int, int]] = []
    train_classifier(
        few,
        TrainingPlan(epochs=3, batch_size=64),
        progress=lambda phase, done, total: seen.append((phase, done, total)),
    )
    assert [done for _, done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1] == ("train", len(seen), len(seen))


@pytest.mark.parametrize(("count", "expected"), [(10, 40), (1438, 40), (10_000, 20), (50_000, 4), (10**7, 4)])
def test_epochs_are_chosen_by_the_size_of_the_data(count: int, expected: int) -> None:
    assert TrainingPlan().resolved_epochs(count) == expected
    assert TrainingPlan(epochs=7).resolved_epochs(count) == 7


def test_data_smaller_than_a_batch_trains(few: LabelledImages) -> None:
    tiny = LabelledImages(images=few.images[:3], labels=few.labels[:3], classes=few.classes, spec="tiny")
    model = train_classifier(tiny, TrainingPlan(epochs=30, learning_rate=0.05, shift=0))
    assert accuracy(model, tiny) == 1


def test_adversarial_training_withstands_what_plain_training_does_not(
    digits_bundle: Path, digits_train: LabelledImages, digits_test: LabelledImages
) -> None:
    data = LabelledImages(
        images=digits_train.images[:800], labels=digits_train.labels[:800], classes=digits_train.classes, spec="some"
    )
    plain = under_attack(Bundle.open(digits_bundle).classifier(), digits_test)
    for kind, epochs in (("n-fgsm", 6), ("pgd", 3)):
        plan = TrainingPlan(epochs=epochs, batch_size=64, adversarial=kind, epsilon=Epsilon(24))
        model = train_classifier(data, plan)
        assert accuracy(model, digits_test) > 0.75, kind
        assert under_attack(model, digits_test) > plain + 0.25, kind


def test_adversarial_training_is_reproducible(few: LabelledImages) -> None:
    for kind in ("n-fgsm", "pgd"):
        plan = TrainingPlan(epochs=1, adversarial=kind, epsilon=Epsilon(16))
        assert weights(train_classifier(few, plan)) == weights(train_classifier(few, plan))


def test_images_are_shifted_with_zeros_and_mirrored(few: LabelledImages) -> None:
    from index_builder.training import augment

    generator = torch.Generator().manual_seed(0)
    images = torch.arange(1, 65, dtype=torch.float32).view(1, 1, 8, 8).expand(300, -1, -1, -1)
    moved = augment(images, 2, flip=True, generator=generator)
    padded = np.pad(images[0, 0].numpy(), 2)
    windows = [padded[top : top + 8, left : left + 8] for top in range(5) for left in range(5)]
    allowed = {w.tobytes() for w in windows} | {w[:, ::-1].tobytes() for w in windows}
    seen = {image[0].contiguous().numpy().tobytes() for image in moved}
    assert seen <= allowed
    assert len(seen) > 40  # nearly all of the 50
    still = augment(images, 0, flip=False, generator=generator)
    assert torch.equal(still, images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0 is out of range"),
        ({"epochs": 10_001}, "epochs=10001 is out of range"),
        ({"learning_rate": 0.0}, "learning rate 0 is out of range"),
        ({"learning_rate": float("nan")}, "learning rate nan is out of range"),
        ({"batch_size": 1}, "batch size 1 is too small"),
        ({"adversarial": "fgsm"}, "unknown adversarial training 'fgsm'; allowed: n-fgsm, pgd"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrainingPlan(**options)


def test_a_network_that_cannot_take_the_images_is_refused(few: LabelledImages) -> None:
    with pytest.raises(ModelError, match="alexnet cannot take 1x8x8 images"):
        train_classifier(few, TrainingPlan(arch="alexnet", epochs=1))
