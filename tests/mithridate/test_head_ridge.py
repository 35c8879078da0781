"""The closed form equals the normal equations, written out, and is as smooth as it says."""

from __future__ import annotations

import pytest
import torch
from head_helpers import slow_ridge
from hypothesis import given, settings
from hypothesis import strategies as st

from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Resources, build_defence
from mithridate.defenses.head_ridge import RidgeConfig, _positive, fit_at
from mithridate.errors import OptionError
from mithridate.types import to_images

CLASSES = 3


def draw(count: int, width: int, *, batch: int = 4, kind: str = "soft", seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Inputs ``[B, K, D]``, targets ``[B, K, C]``, weights ``[B, K]`` summing to 1, points ``[B, D]``."""
    generator = torch.Generator().manual_seed(seed)
    inputs = 3 * torch.randn(batch, count, width, generator=generator, dtype=torch.float64) + 1
    targets = torch.rand(batch, count, CLASSES, generator=generator, dtype=torch.float64) - 0.5
    weights = torch.rand(batch, count, generator=generator, dtype=torch.float64)
    if kind == "equal":
        weights = torch.ones_like(weights)
    if kind == "zeros":
        weights[:, 1::2] = 0
    points = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return inputs, targets, weights / weights.sum(1, keepdim=True), points


@pytest.mark.parametrize(("count", "width"), [(40, 6), (6, 40), (12, 12), (9, 1), (1, 9), (1, 1)])
@pytest.mark.parametrize("kind", ["equal", "soft", "zeros"])
@pytest.mark.parametrize("penalty", [1e-6, 1e-3, 10.0])
def test_equals_the_normal_equations(count: int, width: int, kind: str, penalty: float) -> None:
    inputs, targets, weights, points = draw(count, width, kind=kind)
    several = torch.randn(4, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    single, many = fit_at(inputs, targets, weights, points, penalty), fit_at(inputs, targets, weights, several, penalty)
    assert single.shape == (4, CLASSES)
    assert many.shape == (4, 5, CLASSES)
    for row in range(4):
        problem = inputs[row], targets[row], weights[row]
        wanted = slow_ridge(*problem, points[row], penalty)
        torch.testing.assert_close(single[row], wanted, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(many[row], slow_ridge(*problem, several[row], penalty), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("count", "width"), [(11, 12), (12, 12), (13, 12)])
def test_both_forms_meet_where_they_change_over(count: int, width: int) -> None:
    """One more neighbour that counts for nothing turns the K x K problem into the D x D one, and changes no answer."""
    inputs, targets, weights, points = draw(count, width)
    more = [torch.cat([part, torch.ones_like(part[:, :3])], 1) for part in (inputs, targets)]
    padded = torch.cat([weights, torch.zeros(4, 3, dtype=torch.float64)], 1)
    wanted = fit_at(inputs, targets, weights, points, 1e-3)
    torch.testing.assert_close(fit_at(*more, padded, points, 1e-3), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("count", "width"), [(9, 4), (4, 9), (5, 5)])
@pytest.mark.parametrize("several", [False, True])
def test_is_smooth_in_query_and_soft_weights(count: int, width: int, several: bool) -> None:
    inputs, targets, _, points = draw(count, width, batch=2)
    generator = torch.Generator().manual_seed(1)
    if several:
        points = torch.randn(2, 3, width, generator=generator, dtype=torch.float64)
    heights = torch.randn(2, count, generator=generator, dtype=torch.float64)

    def answer(points: torch.Tensor, heights: torch.Tensor) -> torch.Tensor:
        return fit_at(inputs, targets, heights.softmax(1), points, 0.01)

    assert torch.autograd.gradcheck(answer, (points.requires_grad_(), heights.requires_grad_()))


@pytest.mark.parametrize(("count", "width"), [(9, 4), (4, 9)])
def test_a_neighbour_without_weight_leaves_the_gradient_finite(count: int, width: int) -> None:
    """Cut off by the radius, or so far away that its weight rounds to 0."""
    inputs, targets, weights, points = draw(count, width, kind="zeros")
    weights.requires_grad_()
    fit_at(inputs, targets, weights, points, 0.01).square().sum().backward()
    assert weights.grad is not None
    assert torch.isfinite(weights.grad).all()
    counting = weights.detach() > 0
    assert (weights.grad[counting] != 0).all()

    def answer(counted: torch.Tensor) -> torch.Tensor:
        everyone = torch.zeros_like(weights.detach()).masked_scatter(counting, counted)
        return fit_at(inputs, targets, everyone, points, 0.01)

    assert torch.autograd.gradcheck(answer, weights.detach()[counting].requires_grad_())


@pytest.mark.parametrize(("count", "width"), [(20, 5), (5, 20)])
def test_a_strong_penalty_leaves_nothing_of_the_fit(count: int, width: int) -> None:
    inputs, targets, weights, points = draw(count, width)
    assert fit_at(inputs, targets, weights, points, 1e-6).abs().max() > 1e-2
    assert fit_at(inputs, targets, weights, points, 1e9).abs().max() < 1e-7


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(12, 5), (5, 12), (7, 7)]),
    penalties=st.tuples(st.floats(-8, 8), st.floats(-8, 8)).map(sorted),
)
def test_the_fitted_map_shrinks_as_the_penalty_grows(seed: int, shape: tuple[int, int], penalties: list[float]) -> None:
    """At the unit vectors the fit shows its matrix: its length falls with the penalty, its error on the data rises."""
    inputs, targets, weights, _ = draw(*shape, batch=1, seed=seed)
    units = torch.eye(shape[1], dtype=torch.float64)[None]
    maps = [fit_at(inputs, targets, weights, units, 10**exponent) for exponent in penalties]
    errors = [((inputs @ fitted - targets).square().sum(-1) * weights).sum() for fitted in maps]
    assert maps[1].norm() <= maps[0].norm() * (1 + 1e-6)
    assert errors[1] >= errors[0] * (1 - 1e-6)


@pytest.mark.parametrize(("count", "width"), [(20, 5), (5, 20)])
@pytest.mark.parametrize("penalty", [1e-9, 1e-3])
def test_degenerate_features_break_nothing(count: int, width: int, penalty: float) -> None:
    inputs, targets, weights, points = draw(count, width)
    cases = {
        "nothing": torch.zeros_like(inputs),
        "constant": torch.full_like(inputs, 2.0),
        "one point": inputs[:, :1].expand_as(inputs),
        "one feature": torch.cat([inputs[..., :1], torch.zeros_like(inputs[..., 1:])], -1),
        "twins": torch.cat([inputs[..., :1], inputs[..., :1], inputs[..., 2:]], -1),
        "small": 1e-4 * inputs,
        "large": 1e12 * inputs,
    }
    for what, degenerate in cases.items():
        fitted = fit_at(degenerate, targets, weights, points, penalty)
        assert torch.isfinite(fitted).all(), what
        if what == "nothing":
            assert not fitted.any()
        at_itself = fit_at(degenerate, targets, weights, degenerate, penalty)
        assert at_itself.abs().max() <= 2, what  # shares are at most 0.5 here: no wild swings where there is data
    mean = (targets * weights[..., None]).sum(1)
    fitted = fit_at(cases["constant"], targets, weights, cases["constant"][:, 0], penalty)
    torch.testing.assert_close(fitted, mean, rtol=0, atol=2 * penalty + 1e-5)  # the mean is all there is to learn


@pytest.mark.parametrize(("count", "width"), [(20, 5), (5, 20)])
def test_rows_have_nothing_to_do_with_each_other(count: int, width: int) -> None:
    """Nor does one that is not a number: in a batch it is somebody else's."""
    inputs, targets, weights, points = draw(count, width)
    wanted = torch.cat(
        [fit_at(*(part[row : row + 1] for part in (inputs, targets, weights, points)), 1e-3) for row in range(4)]
    )
    torch.testing.assert_close(fit_at(inputs, targets, weights, points, 1e-3), wanted, rtol=0, atol=1e-12)
    for spoilt in (inputs, weights, points):
        spoilt[2] = torch.nan
        fitted = fit_at(inputs, targets, weights, points, 1e-3)
        torch.testing.assert_close(fitted[[0, 1, 3]], wanted[[0, 1, 3]], rtol=0, atol=1e-12)
        assert not torch.isfinite(fitted[2]).any()


@pytest.mark.parametrize(
    "options", [{"anchor": 0}, {"anchor": 1e10}, {"anchor": float("nan")}, {"held_out": -0.1}, {"held_out": 1}]
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=rf"rmc: {next(iter(options))}=.* is out of range; allowed: "):
        RidgeConfig(**options)


# Scores


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_rounding_negative_shares_off_leaves_a_sure_answer_sure(classes: int) -> None:
    shares = torch.full((1, classes), 1e-3 / (classes - 1), dtype=torch.float64)
    shares[0, 0] = 0.999
    scores = _positive(shares).log().softmax(1)
    assert float((scores - shares).abs().max()) < 0.01
    assert scores.argmax() == 0


def test_shares_far_from_anything_keep_rank_and_slope() -> None:
    shares = torch.tensor([[-1e8, -1e6, -1.0, -1e-3, 0.0, 1e-3, 1.0, 1e6]], dtype=torch.float64, requires_grad=True)
    rounded = _positive(shares)
    assert (rounded.diff(dim=1) > 0).all()
    assert (rounded > 0).all()
    wanted = (shares.detach()[:, 3:] + (shares.detach()[:, 3:].square() + (1e-2 / 8) ** 2).sqrt()) / 2
    torch.testing.assert_close(rounded.detach()[:, 3:], wanted, rtol=1e-9, atol=0)
    (slope,) = torch.autograd.grad(rounded.log().sum(), shares)
    assert torch.isfinite(slope).all()
    assert (slope > 0).all()
    assert torch.autograd.gradcheck(
        _positive, (torch.linspace(-0.1, 0.1, 9, dtype=torch.float64)[None].requires_grad_(),)
    )


def test_between_parts_of_a_batch_the_budget_is_looked_at(
    resources: Resources, digits_test: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mithridate.defenses.head_ridge._NUMBERS_AT_A_TIME", 1)  # an image a part
    fits: list[int] = []
    monkeypatch.setattr("mithridate.defenses.head_ridge.fit_at", lambda *parts: (fits.append(1), fit_at(*parts))[1])
    looks = iter([False] * 4)  # before the run, and before and after an image
    images = to_images(torch.from_numpy(digits_test.images[:6]))
    budget = Budget(cancelled=lambda: next(looks, True))
    answer = build_defence("rmc:held_out=0", resources).predict(images, generator=torch.Generator(), budget=budget)
    assert len(fits) == 2
    assert [fate.stop_reason for fate in answer.adaptations if fate] == ["converged", *["cancelled"] * 5]
    assert torch.equal(answer.scores[2:], answer.base_scores[2:])
