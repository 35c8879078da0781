"""Every image draws for itself, wherever it stands."""

from __future__ import annotations

import torch

from mithridate.defenses.randomness import pass_generators, row_seeds


def test_an_image_draws_the_same_wherever_it_stands_and_unlike_any_other() -> None:
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    together = row_seeds((7,) * 5, images)
    assert len(set(together)) == 5
    assert [row_seeds((7,), image[None])[0] for image in images] == list(together)
    assert row_seeds((7,) * 5, images.flip(0)) == together[::-1]
    assert row_seeds((7,) * 5, images.double().requires_grad_()) == together
    assert not set(row_seeds((8,) * 5, images)) & set(together)
    nearly = images.clone()
    nearly[0, 0, 0, 0] += 1 / 255
    assert row_seeds((7,), nearly[:1])[0] != together[0]


def test_any_request_seed_will_do() -> None:
    image = torch.zeros(1, 1, 2, 2)
    seeds = [row_seeds((seed,), image)[0] for seed in (0, 1, -1, 2**62 - 1, 2**63)]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    image = image.expand(2, -1, -1, -1)
    draws = [float(torch.rand((), generator=g)) for g in pass_generators(row_seeds((1, 2), image), range(3))]
    assert len(set(draws)) == 6
    later = [float(torch.rand((), generator=g)) for g in pass_generators(row_seeds((1, 2), image), range(1, 3))]
    assert later == [*draws[1:3], *draws[4:]]  # a pass draws the same whatever is run beside it
