"""JSMA: the best pair is that of the whole table of pairs, and no more features move than allowed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mithridate.attacks import JSMA
from mithridate.attacks.white_box.jsma import best_pairs
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources
from tests.mithridate.attack_helpers import answers, linear, random_pixels, run


@settings(max_examples=80, deadline=None)
@given(
    features=st.integers(2, 40),
    levels=st.sampled_from([2, 5, 1000]),
    free=st.floats(0.2, 1),
    tilt=st.floats(-2, 2),
    seed=st.integers(0, 2**32),
)
def test_the_best_pair_is_that_of_the_whole_table(
    features: int, levels: int, free: float, tilt: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gain = (torch.randn(4, features, generator=generator) * levels).round() / levels  # few levels: many ties
    loss = (torch.randn(4, features, generator=generator) * levels).round() / levels + tilt * gain
    may = torch.rand(4, features, generator=generator) < free
    pairs, possible = best_pairs(gain, loss, may)
    more, less = (part[:, :, None] + part[:, None, :] for part in (gain, loss))
    both = may[:, :, None] & may[:, None, :] & ~torch.eye(features, dtype=torch.bool)
    table = torch.where(both & (more > 0) & (less < 0), -more * less, 0.0).flatten(1)
    assert torch.equal(possible, table.amax(1) > 0)
    chosen = table.gather(1, (pairs[:, :1] * features + pairs[:, 1:]))[:, 0]
    assert torch.allclose(chosen[possible], table.amax(1)[possible])


@pytest.mark.parametrize("theta", [1.0, -1.0, 0.3])
def test_moves_no_more_features_than_allowed_and_only_one_way(theta: float) -> None:
    forward, _, _ = linear(0)
    pixels = random_pixels(1, 20)
    labels = answers(forward, pixels)
    for gamma in (0.0, 0.1, 0.5):
        found = run(JSMA(theta=theta, gamma=gamma), forward, pixels, labels)
        moved = found.int() - pixels.int()
        assert (moved != 0).flatten(1).sum(1).max() <= gamma * 48
        assert (moved * (1 if theta > 0 else -1)).min() >= 0
    if theta == 1:
        assert set(found[moved != 0].tolist()) <= {255}


def test_reaches_the_target_it_is_given(resources: Resources, digits_test: LabelledImages) -> None:
    pixels, labels = torch.from_numpy(digits_test.images[:40]), torch.from_numpy(digits_test.labels[:40])
    pixels, labels = pixels[labels != 3], labels[labels != 3]
    found = run(JSMA(gamma=0.5, target=3), resources.classifier, pixels, labels)
    assert (answers(resources.classifier, found) == 3).double().mean() > 0.8
    usual = run(JSMA(), resources.classifier, pixels, labels)
    assert (answers(resources.classifier, usual) == labels).double().mean() < 0.5
    assert (usual != pixels).flatten(1).sum(1).max() <= 6
