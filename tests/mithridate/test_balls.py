"""Where an attack may go: what can be sent, exactly within the radius."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mithridate.attacks.balls import Norm, ball_around
from mithridate.types import Epsilon, to_images, to_pixels


def random_pixels(seed: int, count: int = 4, shape: tuple[int, int, int] = (3, 8, 8)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-60, 316, (count, *shape), generator=generator).clamp(0, 255).to(torch.uint8)


def square_levels(found: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """``[N]``: the square of the L2 distance in levels, in whole numbers."""
    return (found.long() - pixels.long()).square().flatten(1).sum(1)


@settings(max_examples=150, deadline=None)
@given(levels=st.integers(0, 255), stretch=st.floats(0, 3), seed=st.integers(0, 2**32))
def test_what_is_sent_lies_in_the_l2_ball(levels: int, stretch: float, seed: int) -> None:
    """In whole levels, not to a rounding; and as near to what was wanted as the ball allows."""
    pixels, generator = random_pixels(seed), torch.Generator().manual_seed(seed)
    ball = ball_around(pixels, norm="l2", epsilon=Epsilon(levels))
    change = torch.randn(pixels.shape, generator=generator)
    points = to_images(pixels) + stretch * levels / 255 * change / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    points = ball.onto(points)
    sent = ball.sent(points)
    assert (square_levels(sent, pixels) <= levels**2).all()
    off = (255 * points - sent).abs().flatten(1).amax(1)
    assert off.max() < 1.001
    fits = square_levels(to_pixels(points), pixels) <= levels**2
    assert (off[fits] < 0.501).all()  # then it is the nearest level


def test_l2_rounding_gives_up_little_of_the_radius() -> None:
    """Rounded towards the clean image alone, a change of 2 levels a pixel would lose a fifth of its length."""
    pixels = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    ball = ball_around(pixels, norm="l2", epsilon=Epsilon(128))
    sent = ball.sent(ball.start(torch.Generator().manual_seed(0)))
    lengths = square_levels(sent, pixels).double().sqrt()
    assert lengths.max() <= 128
    assert lengths.min() > 127.5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_start_is_drawn_for_each_image_from_its_seed(norm: Norm) -> None:
    pixels = random_pixels(0)
    ball = ball_around(pixels, norm=norm, epsilon=Epsilon(40))
    first, again, other = (ball.start(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert ((first != other).flatten(1).sum(1) > 10).all()
    assert torch.equal(ball.only(torch.tensor([2])).clean, to_images(pixels[2:3]))


def test_the_steepest_move_has_length_one_however_small_the_slope() -> None:
    """The squares of 1e-30 are 0 in float32; what temperature leaves of a gradient is often as small."""
    ball = ball_around(random_pixels(0, 3), norm="l2", epsilon=Epsilon(40))
    slope = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    slope[1] *= 1e-30
    slope[2] = 0
    lengths = ball.steepest(slope).flatten(1).norm(dim=1)
    assert lengths.tolist() == pytest.approx([1, 1, 0], abs=1e-5)
