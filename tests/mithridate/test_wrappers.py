"""EOT and BPDA: the gradients they promise, and defences that fall to them."""

from __future__ import annotations

import pytest
import torch

from mithridate.attacks import PGD, Forward
from mithridate.attacks.wrappers import expectation, straight_through
from mithridate.types import Epsilon, to_images
from tests.mithridate.attack_helpers import answers, linear, random_pixels, run


def random_network(generator: torch.Generator) -> Forward:
    """Its weights are drawn anew at each call."""
    _, weight, _ = linear(0)

    def call(images: torch.Tensor) -> torch.Tensor:
        drawn = weight + 2 * torch.randn(weight.shape, generator=generator)
        return (images.flatten(1) - 0.5) @ drawn.T

    return call


def slope_of(forward: Forward, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    point = images.clone().requires_grad_()
    out = forward(point)
    (slope,) = torch.autograd.grad(out[:, 1].sum() - 2 * out[:, 3].sum(), point)
    return out.detach(), slope


def test_an_expectation_is_the_log_of_the_mean_probability() -> None:
    images, generator = to_images(random_pixels(1, 5)), torch.Generator().manual_seed(3)
    forward = random_network(generator)
    point = images.clone().requires_grad_()
    mean = torch.stack([forward(point).softmax(1) for _ in range(6)]).mean(0).log()
    (wanted,) = torch.autograd.grad(mean[:, 1].sum() - 2 * mean[:, 3].sum(), point)
    for given in (None, generator):
        generator.manual_seed(3)
        out, slope = slope_of(expectation(forward, copies=6, generator=given), images)
        assert torch.allclose(out, mean.detach(), atol=1e-5)
        assert torch.allclose(slope, wanted, atol=1e-4)


def test_what_is_drawn_next_does_not_depend_on_the_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    forward = expectation(random_network(generator), copies=4, generator=generator)
    images = to_images(random_pixels(1, 2))
    slope_of(forward, images)
    after = generator.get_state()
    generator.manual_seed(3)
    with torch.no_grad():
        forward(images)
    assert torch.equal(generator.get_state(), after)


def test_memory_does_not_grow_with_the_copies() -> None:
    """With the generator at hand; counted in what autograd keeps at most of one call's activations."""

    def kept(copies: int) -> int:
        generator = torch.Generator().manual_seed(0)
        wide = torch.nn.Linear(48, 4096)

        def forward(images: torch.Tensor) -> torch.Tensor:
            hidden = wide(images.flatten(1) + 0.1 * torch.randn(len(images), 48, generator=generator)).tanh()
            return hidden.view(len(hidden), 4, -1).sum(2)

        held, most = 0, 0

        class Kept:
            def __init__(self, tensor: torch.Tensor) -> None:
                nonlocal held, most
                self.tensor = tensor
                held += tensor.numel()
                most = max(most, held)

            def __del__(self) -> None:
                nonlocal held
                held -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            slope_of(expectation(forward, copies=copies, generator=generator), to_images(random_pixels(0, 64)))
        return most

    assert kept(16) < 1.2 * kept(2)


def test_an_attack_on_the_mean_goes_where_one_draw_does_not_show() -> None:
    pixels, generator = random_pixels(2, 16), torch.Generator().manual_seed(0)
    forward = random_network(generator)
    many = expectation(forward, copies=400)
    labels = answers(many, pixels)
    attack = PGD(epsilon=Epsilon(10), steps=1, step_size=10 / 255, random_start=False)
    chances = {}
    for name, seen in (("one draw", forward), ("mean", expectation(forward, copies=30, generator=generator))):
        found = run(attack, seen, pixels, labels)
        with torch.no_grad():
            chances[name] = float(many(to_images(found)).gather(1, labels[:, None]).exp().mean())
    assert chances["mean"] < chances["one draw"] - 0.05


def test_bpda_breaks_a_quantiser() -> None:
    """Which has no gradient at all: without it no step is taken."""
    plain, _, _ = linear(4)
    pixels = random_pixels(4, 24)

    def quantise(images: torch.Tensor) -> torch.Tensor:
        return (images * 15).round() / 15

    def defended(images: torch.Tensor) -> torch.Tensor:
        return plain(quantise(images))

    labels = answers(defended, pixels)
    attack = PGD(epsilon=Epsilon(24), steps=10, step_size=8 / 255, random_start=False)
    assert torch.equal(run(attack, defended, pixels, labels), pixels)
    through = straight_through(quantise, lambda images: images)
    for forward in (lambda images: plain(through(images)), straight_through(defended, plain)):
        assert torch.equal(forward(to_images(pixels)), defended(to_images(pixels)))  # its own values, to the bit
        assert (answers(defended, run(attack, forward, pixels, labels)) != labels).float().mean() > 0.9


def test_what_cannot_be_wrapped_is_refused() -> None:
    forward, _, _ = linear(0)
    with pytest.raises(ValueError, match="at least 1 copy; seen: 0"):
        expectation(forward, copies=0)
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\] for \[2, 4\]"):
        straight_through(forward, lambda images: images)(to_images(random_pixels(0, 2)))
