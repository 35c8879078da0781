"""Losses: the published formulas, and a direction uphill however large or small the logits are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mithridate.attacks.losses import LOSSES, Loss, cross_entropy, dlr, margin, targeted_dlr


def random_logits(seed: int, classes: int, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(count, classes, generator=generator)
    return logits, torch.randint(classes, (count,), generator=generator)


def towards_the_next(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Targeted DLR as an untargeted loss, for tests of all losses."""
    return targeted_dlr(logits, labels, (labels + 1) % logits.shape[1])


ALL: dict[str, Loss] = {**LOSSES, "targeted": towards_the_next}


def uphill(loss: Loss, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    point = logits.clone().requires_grad_()
    value = loss(point, labels)
    (slope,) = torch.autograd.grad(value.sum(), point)
    return value.detach(), slope


def test_cross_entropy_is_the_usual_one() -> None:
    logits, labels = random_logits(0, 7)
    value, slope = uphill(cross_entropy, logits, labels)
    wanted, wanted_slope = uphill(lambda z, y: F.cross_entropy(z.double(), y, reduction="none"), logits, labels)
    assert torch.allclose(value, wanted)
    assert torch.allclose(slope, wanted_slope, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_the_ratios_are_the_published_ones(classes: int) -> None:
    logits, labels = random_logits(1, classes, 40)
    target = (labels + 1) % classes
    for row, (scores, y, t) in enumerate(zip(logits.double().tolist(), labels.tolist(), target.tolist(), strict=True)):
        ranked = sorted(scores, reverse=True)
        lead = max(s for i, s in enumerate(scores) if i != y) - scores[y]
        assert margin(logits, labels)[row] == pytest.approx(lead)
        ratio = lead / (ranked[0] - ranked[2]) if classes > 2 else lead
        assert dlr(logits, labels)[row] == pytest.approx(ratio)
        aimed = scores[t] - scores[y]
        aimed = aimed / (ranked[0] - (ranked[2] + ranked[3]) / 2) if classes > 3 else aimed
        assert targeted_dlr(logits, labels, target)[row] == pytest.approx(aimed)


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("name", ["margin", "dlr", "targeted"])
def test_a_temperature_changes_no_direction(name: str, classes: int) -> None:
    """What hides the gradient of cross-entropy hides nothing from these."""
    logits, _ = random_logits(2, classes, 40)
    labels = logits.argmax(1)
    _, plain = uphill(ALL[name], logits, labels)
    for scale in (1e-3, 1e3, 1e6):
        _, slope = uphill(ALL[name], scale * logits, labels)
        assert torch.allclose(F.normalize(slope, eps=1e-30), F.normalize(plain, eps=1e-30), atol=1e-4)
        assert (slope != 0).any(1).all()


def test_cross_entropy_of_a_network_that_is_sure_points_away_from_the_true_class() -> None:
    """From 17 logits on, float32 says that p is 1: the true class then has no gradient, only the others have."""
    logits, labels = torch.tensor([[60.0, 0.0, 5.0]]), torch.tensor([0])
    value, slope = uphill(cross_entropy, logits, labels)
    assert value > 0
    assert slope[0, 0] < 0
    assert slope[0, 0] == pytest.approx(-float(slope[0, 1:].sum()))


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(
        st.one_of(
            st.floats(-1e4, 1e4, width=32),
            st.sampled_from([-torch.inf, -3e38, -1e20, -1e5, 0.0, 1e5, 1e20, 3e38, torch.inf]),
        ),
        min_size=2,
        max_size=7,
    ),
    label=st.integers(0, 6),
    name=st.sampled_from(sorted(ALL)),
)
def test_neither_loss_nor_gradient_is_ever_nan(scores: list[float], label: int, name: str) -> None:
    logits, labels = torch.tensor([scores]), torch.tensor([label % len(scores)])
    value, slope = uphill(ALL[name], logits, labels)
    assert value.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("name", sorted(ALL))
def test_classes_of_no_probability_are_as_if_they_were_not_there(name: str) -> None:
    """Votes are log-probabilities: -inf for every class that no neighbour has."""
    some = torch.tensor([[3.0, 1.0, 0.5, 0.2, -1.0]]).log_softmax(1)
    none = torch.full((1, 3), -torch.inf)
    value, slope = uphill(ALL[name], torch.cat([some, none], 1), torch.tensor([0]))
    wanted, wanted_slope = uphill(ALL[name], some, torch.tensor([0]))
    if name == "ce":
        assert value == pytest.approx(float(wanted), abs=0.02)  # each counts a little less than the last that has some
    else:
        assert torch.allclose(value, wanted)
        assert torch.allclose(slope[:, :5], wanted_slope)
    assert (slope[:, 5:] == 0).all()


@pytest.mark.parametrize("name", sorted(ALL))
def test_what_is_nan_in_one_row_stays_there(name: str) -> None:
    logits, labels = random_logits(3, 5)
    alone, _ = uphill(ALL[name], logits[1:], labels[1:])
    logits[0, 2] = torch.nan
    value, slope = uphill(ALL[name], logits, labels)
    assert value[0].isnan()
    assert torch.equal(value[1:], alone)
    assert slope[1:].isfinite().all()
