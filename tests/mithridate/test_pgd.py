"""PGD: what it returns can be sent, lies in the ball, and is the best of what it saw."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mithridate.attacks import PGD, parse_attack
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources
from mithridate.errors import OptionError
from mithridate.types import Epsilon, to_images

Forward = Callable[[torch.Tensor], torch.Tensor]


def linear(seed: int, classes: int = 4, shape: tuple[int, ...] = (1, 3, 3)) -> tuple[Forward, torch.Tensor]:
    """A linear model and its weights ``[classes, pixels]``."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, int(np.prod(shape)), generator=generator)
    return lambda images: images.flatten(1) @ weight.to(images).T, weight


def random_pixels(seed: int, count: int, shape: tuple[int, ...] = (1, 3, 3)) -> torch.Tensor:
    """Levels of all kinds, the two ends often."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(-60, 316, (count, *shape), generator=generator)
    return pixels.clamp(0, 255).to(torch.uint8)


def run(attack: PGD, forward: Forward, pixels: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return attack.run(forward, pixels, labels, generator=torch.Generator().manual_seed(seed))


def rank(forward: Forward, pixels: torch.Tensor, labels: torch.Tensor) -> list[tuple[bool, float]]:
    """How good each point is for the attacker: misclassified first, then the loss."""
    with torch.no_grad():
        logits = forward(to_images(pixels))
    losses = F.cross_entropy(logits, labels, reduction="none")
    return list(zip((logits.argmax(1) != labels).tolist(), losses.tolist(), strict=True))


def recorded(forward: Forward, seen: list[torch.Tensor]) -> Forward:
    def call(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.detach().clone())
        return forward(images)

    return call


@settings(max_examples=60, deadline=None)
@given(
    levels=st.integers(0, 255),
    steps=st.integers(1, 6),
    step_size=st.floats(0, 0.3),
    random_start=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_stays_in_the_ball_and_in_the_image(
    levels: int, steps: int, step_size: float, random_start: bool, seed: int
) -> None:
    forward, _ = linear(seed)
    pixels, labels = random_pixels(seed, 5), torch.arange(5) % 4
    attack = PGD(epsilon=Epsilon(levels), steps=steps, step_size=step_size, random_start=random_start)
    seen: list[torch.Tensor] = []
    found = run(attack, recorded(forward, seen), pixels, labels, seed)
    assert found.dtype == torch.uint8
    assert (found.int() - pixels.int()).abs().max() <= levels
    assert len(seen) == steps + 1
    for images in seen:  # the network is shown nothing but what can be sent
        shown = images.double() * 255
        assert (shown - shown.round()).abs().max() < 1e-4
        assert shown.round().min() >= 0
        assert shown.round().max() <= 255
        assert (shown.round() - pixels.double()).abs().max() <= levels


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 8), random_start=st.booleans(), seed=st.integers(0, 2**32))
def test_returns_the_best_point_it_visited(steps: int, random_start: bool, seed: int) -> None:
    """Not the last: on a bumpy loss the last is often worse. Without a random start, never worse than the image."""
    plain, _ = linear(seed)

    def forward(images: torch.Tensor) -> torch.Tensor:
        return (5 * plain(images)).sin()

    pixels, labels = random_pixels(seed, 4), torch.arange(4)
    attack = PGD(epsilon=Epsilon(40), steps=steps, step_size=0.05, random_start=random_start)
    seen: list[torch.Tensor] = []
    found = run(attack, recorded(forward, seen), pixels, labels, seed)
    visited = [(images * 255).round().to(torch.uint8) for images in seen]
    ranks = [rank(forward, point, labels) for point in visited]
    returned = rank(forward, found, labels)
    for image in range(4):
        assert any(torch.equal(found[image], point[image]) for point in visited)
        best_wrong, best_loss = max(row[image] for row in ranks)
        assert returned[image][0] == best_wrong
        assert returned[image][1] == pytest.approx(best_loss, abs=1e-4)
    if not random_start:
        assert all(after >= before for after, before in zip(returned, rank(forward, pixels, labels), strict=True))


def reference(
    weight: torch.Tensor, image: torch.Tensor, label: int, start: np.ndarray, epsilon: float, steps: int, size: float
) -> np.ndarray:
    """PGD on one image as one would write it down, in float64, with the gradient by hand."""
    matrix, clean = weight.double().numpy(), image.double().numpy().ravel() / 255
    low, high = np.maximum(clean - epsilon, 0), np.minimum(clean + epsilon, 1)
    point = np.clip(clean + start, low, high)
    best, best_rank = None, (-1, 0.0)
    for step in range(steps + 1):
        sent = np.round(point * 255) / 255
        logits = matrix @ sent
        chances = np.exp(logits - logits.max())
        chances /= chances.sum()
        here = (int(logits.argmax() != label), -np.log(chances[label]))
        if best is None or here > best_rank:
            best, best_rank = sent, here
        gradient = (chances - np.eye(len(logits))[label]) @ matrix
        if step < steps:
            point = np.clip(point + size * np.sign(gradient), low, high)
    assert best is not None
    return np.round(best * 255).astype(np.uint8).reshape(image.shape)


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize(
    ("levels", "steps", "levels_a_step"), [(8, 10, 1.73), (1, 7, 0.37), (64, 5, 30.3), (255, 3, 99.1)]
)
def test_equals_a_slow_loop_over_images(random_start: bool, levels: int, steps: int, levels_a_step: float) -> None:
    forward, weight = linear(3)
    pixels, labels = random_pixels(4, 12), torch.arange(12) % 4
    attack = PGD(epsilon=Epsilon(levels), steps=steps, step_size=levels_a_step / 255, random_start=random_start)
    found = run(attack, forward, pixels, labels, seed=5)
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(5)).double().numpy()
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        start = (2 * noise[index].ravel() - 1) * levels / 255 if random_start else np.zeros(9)
        wanted = reference(weight, image, int(label), start, levels / 255, steps, levels_a_step / 255)
        assert np.array_equal(found[index].numpy(), wanted), index


def test_steps_below_one_level_add_up() -> None:
    """The published PGD-100 moves 0.032 levels a step at epsilon 2/255; rounding each step would stay where it is."""
    forward, _ = linear(0)
    pixels, labels = torch.full((6, 1, 3, 3), 100, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
    published = parse_attack("pgd100", epsilon=Epsilon(2))
    assert published.step_size * 255 < 0.05
    assert published.random_start
    still = PGD(epsilon=Epsilon(2), steps=100, step_size=published.step_size, random_start=False)
    for attack in (published, still):
        found = run(attack, forward, pixels, labels)
        gain = [
            after[1] - before[1]
            for after, before in zip(rank(forward, found, labels), rank(forward, pixels, labels), strict=True)
        ]
        assert min(gain) > 0
    moved = (run(still, forward, pixels, labels).int() - 100).abs()
    assert moved.double().mean() > 1.9  # it reaches the corner of the ball


def test_epsilon_zero_returns_the_image() -> None:
    forward, _ = linear(0)
    pixels, labels = random_pixels(0, 3), torch.zeros(3, dtype=torch.int64)
    for name in ("fgsm", "pgd10", "pgd3"):
        assert torch.equal(run(parse_attack(name, epsilon=Epsilon(0)), forward, pixels, labels), pixels)


def test_the_seed_decides_and_nothing_else() -> None:
    forward, _ = linear(1, shape=(3, 5, 5))
    pixels, labels = random_pixels(1, 8, (3, 5, 5)), torch.arange(8) % 4
    attack, before = parse_attack("pgd5", epsilon=Epsilon(8)), pixels.clone()
    first = run(attack, forward, pixels, labels, seed=1)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert torch.equal(run(attack, forward, pixels, labels, seed=1), first)
    assert not torch.equal(run(attack, forward, pixels, labels, seed=2), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(pixels, before)


def test_a_model_that_gives_nan_leaves_the_image_as_it_is() -> None:
    pixels, labels = random_pixels(0, 2), torch.zeros(2, dtype=torch.int64)
    found = run(parse_attack("pgd3", epsilon=Epsilon(8)), lambda x: x.flatten(1)[:, :4] * torch.nan, pixels, labels)
    assert torch.equal(found, pixels)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(4, 5), (1, 4, 5), (3, 4, 5), (6, 1, 4, 5), (5,), (1, 1)]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    random_start=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_nothing_changes_off_the_mask(shape: tuple[int, ...], share: float, random_start: bool, seed: int) -> None:
    """Neither what is returned nor what the network is ever shown; the start included."""
    forward, _ = linear(seed, shape=(3, 4, 5))
    pixels, labels = random_pixels(seed, 6, (3, 4, 5)), torch.arange(6) % 4
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    attack, seen = PGD(epsilon=Epsilon(40), steps=4, step_size=0.05, random_start=random_start), []
    found = attack.run(
        recorded(forward, seen), pixels, labels, generator=torch.Generator().manual_seed(seed), mask=mask
    )
    off = ~mask.broadcast_to(pixels.shape)
    for point in (found, *((images * 255).round().to(torch.uint8) for images in seen)):
        assert torch.equal(point[off], pixels[off])
    if share == 1:
        assert torch.equal(found, run(attack, forward, pixels, labels, seed)), "a full mask is no mask"
        assert not torch.equal(found, pixels)


def test_a_masked_attack_is_the_attack_on_a_model_of_these_pixels_alone() -> None:
    """In the loop, not afterwards: an unmasked attack that is cut at its end would have taken other steps."""
    _, weight = linear(2, shape=(1, 4, 4))
    mask = torch.rand(4, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    pixels, labels = random_pixels(2, 8, (1, 4, 4)), torch.arange(8) % 4
    attack = PGD(epsilon=Epsilon(60), steps=9, step_size=0.06, random_start=False)

    def whole(images: torch.Tensor) -> torch.Tensor:
        return (3 * images.flatten(1) @ weight.T).sin()  # bumpy: what is best here depends on all the others

    found = attack.run(whole, pixels, labels, generator=torch.Generator(), mask=mask)
    rest = torch.where(mask, 0, to_images(pixels)).flatten(1) @ weight.T  # what the fixed pixels say, a constant

    def reduced(images: torch.Tensor) -> torch.Tensor:
        return (3 * (images.flatten(1) @ weight[:, mask.flatten()].T + rest)).sin()

    few = attack.run(reduced, pixels[:, :, mask][:, :, None], labels, generator=torch.Generator())
    assert torch.equal(found[:, :, mask], few[:, :, 0])


@pytest.mark.parametrize(
    ("mask", "says"),
    [(torch.ones(3, 3), "bool; seen: torch.float32"), (torch.ones(2, 3, dtype=torch.bool), r"\[2, 3\] does not fit")],
)
def test_what_is_no_mask_is_refused(mask: torch.Tensor, says: str) -> None:
    forward, _ = linear(0)
    pixels, labels = random_pixels(0, 2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=says):
        parse_attack("pgd3", epsilon=Epsilon(8)).run(forward, pixels, labels, generator=torch.Generator(), mask=mask)


def test_leaves_no_gradients_behind(resources: Resources, digits_test: LabelledImages) -> None:
    pixels, labels = torch.from_numpy(digits_test.images[:8]), torch.from_numpy(digits_test.labels[:8])
    run(parse_attack("pgd3", epsilon=Epsilon(8)), resources.classifier, pixels, labels)
    assert all(parameter.grad is None for parameter in resources.classifier.parameters())


def test_breaks_an_undefended_model(resources: Resources, digits_test: LabelledImages) -> None:
    pixels, labels = torch.from_numpy(digits_test.images[:200]), torch.from_numpy(digits_test.labels[:200])
    share = {}
    for name in ("fgsm", "pgd10"):
        found = run(parse_attack(name, epsilon=Epsilon(32)), resources.classifier, pixels, labels)
        share[name] = 1 - sum(wrong for wrong, _ in rank(resources.classifier, found, labels)) / 200
    assert share["pgd10"] < 0.2
    assert share["pgd10"] <= share["fgsm"]


@pytest.mark.parametrize(
    ("name", "levels", "expected"),
    [
        ("fgsm", 8, PGD(epsilon=Epsilon(8), steps=1, step_size=8 / 255, random_start=False)),
        ("pgd10", 16, PGD(epsilon=Epsilon(16), steps=10, step_size=0.01)),
        ("pgd30", 16, PGD(epsilon=Epsilon(16), steps=30, step_size=0.005)),
        ("pgd100", 16, PGD(epsilon=Epsilon(16), steps=100, step_size=0.001)),
        ("pgd10", 8, PGD(epsilon=Epsilon(8), steps=10, step_size=0.005)),
        ("pgd20", 8, PGD(epsilon=Epsilon(8), steps=20, step_size=1 / 255)),
        ("pgd10000", 1, PGD(epsilon=Epsilon(1), steps=10_000, step_size=2.5 / 255 / 10_000)),
    ],
)
def test_names_and_published_step_sizes(name: str, levels: int, expected: PGD) -> None:
    attack = parse_attack(name, epsilon=Epsilon(levels))
    assert (attack.epsilon, attack.steps, attack.random_start) == (
        expected.epsilon,
        expected.steps,
        expected.random_start,
    )
    assert attack.step_size == pytest.approx(expected.step_size)
    assert attack.name == name


@pytest.mark.parametrize(
    "name", ["", "pgd", "pgd0", "pgd10001", "pgd-5", "pgd1.5", "PGD10", " pgd10", "pgd10 ", "apgd", "pgd010", "pgd٣"]
)
def test_unknown_attacks_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=r"unknown attack.*allowed: fgsm, or pgdN"):
        parse_attack(name, epsilon=Epsilon(8))


@pytest.mark.parametrize(
    "text", ["8", "8/256", "0.03", "-1/255", "256/255", "999/255", "8/255x", "1e1/255", "", "/255"]
)
def test_an_epsilon_that_is_not_a_number_of_levels_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="255"):
        Epsilon.parse(text)


def test_epsilon_is_read_as_it_is_written() -> None:
    for levels in range(256):
        assert Epsilon.parse(str(Epsilon(levels))) == Epsilon(levels)
    assert Epsilon.parse(" 8 / 255 ").value == 8 / 255
