"""Stochastic activation pruning of one layer against ten lines of float64, and its means and variances."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mithridate.defenses.pruning import Sampling, keep_probabilities, prune

SAMPLINGS: tuple[Sampling, ...] = ("multinomial", "binomial")
DRAWN = 10_000


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]


def by_hand(layer: np.ndarray, draws: int, random: np.random.Generator) -> np.ndarray:
    """The published operator: draw, keep what was drawn, divide by the probability of having been drawn."""
    shares = np.abs(layer) / np.abs(layer).sum()
    out = np.zeros_like(layer)
    for j in set(random.choice(len(layer), size=draws, p=shares).tolist()):
        out[j] = layer[j] / (1 - (1 - shares[j]) ** draws)
    return out


def a_layer(count: int = 24) -> torch.Tensor:
    """Of all sizes and signs, a third of it 0."""
    layer = torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer *= torch.logspace(-2, 0.5, count, dtype=torch.float64)
    layer[::3] = 0
    return layer


def drawn(layer: torch.Tensor, sampling: Sampling, fraction: float, count: int = DRAWN) -> torch.Tensor:
    return prune(layer.expand(count, -1), fraction=fraction, sampling=sampling, generators=generators(count))


@pytest.mark.parametrize("fraction", [0.5, 1.0, 2.0])
def test_what_is_kept_is_what_the_loop_keeps_and_worth_as_much(fraction: float) -> None:
    """Whatever is kept has the loop's value; means and variances agree with the loop's within six standard errors:
    a false alarm in 1e6 runs at 24 numbers and three fractions."""
    layer, random = a_layer(), np.random.default_rng(0)
    draws = round(fraction * len(layer))
    slow = np.stack([by_hand(layer.numpy(), draws, random) for _ in range(DRAWN)])
    for sampling in SAMPLINGS:
        fast = drawn(layer, sampling, fraction).numpy()
        for j in range(len(layer)):
            values = set(np.unique(fast[:, j]).tolist())
            assert len(values - {0.0}) <= 1
            for value in values - {0.0}:
                assert value == pytest.approx(slow[:, j].max() if layer[j] > 0 else slow[:, j].min(), rel=1e-12)
        error = np.sqrt((fast.var(0) + slow.var(0)) / DRAWN) + 1e-12
        assert (np.abs(fast.mean(0) - slow.mean(0)) <= 6 * error).all()
        kept, wanted = (fast != 0).mean(0), (slow != 0).mean(0)
        spread = np.sqrt(_error_of_variance(fast) ** 2 + _error_of_variance(slow) ** 2)
        assert (np.abs(fast.var(0) - slow.var(0)) <= 6 * spread + 1e-12).all()
        assert (np.abs(kept - wanted) <= 6 * np.sqrt((kept * (1 - kept) + wanted * (1 - wanted)) / DRAWN) + 1e-12).all()


def _error_of_variance(values: np.ndarray) -> np.ndarray:
    """Standard error of each column's variance, from its fourth central moment."""
    fourth = ((values - values.mean(0)) ** 4).mean(0)
    found: np.ndarray = np.sqrt(np.maximum(fourth - values.var(0) ** 2, 0) / len(values))
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_the_mean_does_not_change(sampling: Sampling, fraction: float) -> None:
    """Six standard errors from the formula's own variance h^2 (1 - q) / q."""
    layer = a_layer()
    keep = keep_probabilities(layer.abs() / layer.abs().sum(), round(fraction * len(layer)))
    found = drawn(layer, sampling, fraction)
    error = torch.where(keep > 0, layer.square() * (1 - keep) / keep.clamp_min(1e-300), 0).div(DRAWN).sqrt()
    assert ((found.mean(0) - layer).abs() <= 6 * error + 1e-12).all()


def test_only_the_multinomial_draws_hold_each_other_down() -> None:
    """The number of kept ones varies less: the only difference between the two."""
    layer = torch.ones(16, dtype=torch.float64)
    spread = {sampling: float((drawn(layer, sampling, 1.0) != 0).sum(1).double().var()) for sampling in SAMPLINGS}
    assert spread["multinomial"] < 0.6 * spread["binomial"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_shares_of_large_layers(dtype: torch.dtype) -> None:
    """In float32 1 - (1 - p)^r is 0 at p = 1e-8, and 19 % wrong at 1e-7."""
    for share in (1e-10, 1e-8, 1e-7, 1e-4, 0.5, 1 - 1e-6):
        for draws in (1, 163_840, 802_816):
            wanted = -math.expm1(draws * math.log1p(-share))
            found = float(keep_probabilities(torch.tensor([share], dtype=dtype), draws))
            assert found == pytest.approx(wanted, rel=2e-2 if share > 0.9 and draws == 1 else 1e-4)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_eight_hundred_thousand_activations(sampling: Sampling) -> None:
    """As in a ResNet-50's first layer. The sum over all stays what it was within six standard errors."""
    layer = torch.randn(1, 802_816, generator=torch.Generator().manual_seed(11)).relu()
    layer[0, :1000] *= 1e-4
    found = prune(layer, fraction=1, sampling=sampling, generators=generators(1))
    assert torch.isfinite(found).all()
    shares = layer.double() / layer.double().sum()
    keep = keep_probabilities(shares, 802_816)
    kept = (found != 0).double()
    error = float((keep * (1 - keep)).sum().sqrt())
    assert abs(float(kept.sum() - keep.sum())) <= 6 * error
    variance = torch.where(keep > 0, layer.double().square() * (1 - keep) / keep.clamp_min(1e-300), 0).sum()
    assert abs(float(found.double().sum() - layer.double().sum())) <= 6 * float(variance.sqrt())


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_rows_of_nothing_of_one_number_and_of_no_number(sampling: Sampling, dtype: torch.dtype) -> None:
    rows = torch.zeros(5, 3, 2, dtype=dtype)
    rows[1, 2, 1] = -3  # all of the sum: it is drawn for certain, and worth what it is
    rows[2] = torch.tensor([[1, 2], [3, 4], [5, 6]])
    rows[3, 0, 0], rows[4, 0, 0] = float("nan"), float("inf")
    found = prune(rows, fraction=1, sampling=sampling, generators=generators(5))
    assert found.dtype == dtype
    assert torch.equal(found[:2], rows[:2])
    assert torch.isfinite(found[2]).all()
    assert found[3].isnan().any()
    assert not found[4].isfinite().all()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_mask_and_scale_are_constants_of_the_backward_pass(sampling: Sampling) -> None:
    layer = a_layer().expand(6, -1).clone().requires_grad_()
    found = prune(layer, fraction=1, sampling=sampling, generators=generators(6))
    (gradient,) = torch.autograd.grad(found.sum(), layer)
    keep = keep_probabilities(layer.detach().abs() / layer.detach().abs().sum(1, keepdim=True), layer.shape[1])
    wanted = torch.where(found != 0, 1 / keep, 0)
    torch.testing.assert_close(gradient, torch.where(layer == 0, gradient, wanted))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_row_draws_from_its_own_generator_alone(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))

    def ask(which: Sequence[int]) -> torch.Tensor:
        own = [generators(5)[row] for row in which]
        return prune(rows[list(which)], fraction=1, sampling=sampling, generators=own)

    together = ask(range(5))
    for order in ((3,), (4, 1), (2, 3, 0, 1, 4)):
        assert torch.equal(ask(order), together[list(order)])
    monkeypatch.setattr("mithridate.defenses.pruning._NUMBERS_AT_A_TIME", 50)  # a row at a time
    assert torch.equal(ask(range(5)), together)
