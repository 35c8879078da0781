"""Intervals and percentiles: known numbers, and what must hold for any."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mithridate.evaluation import Interval, percentile, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (8, 10, 0.490162, 0.943318),
        (1, 10, 0.017876, 0.404150),
        (50, 100, 0.403832, 0.596168),
        (81, 263, 0.255272, 0.366230),  # Newcombe 1998, table I
        (15, 148, 0.062386, 0.160533),
        (0, 20, 0.0, 0.161125),
        (1, 29, 0.006113, 0.171755),
    ],
)
def test_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx(Interval(low, high), abs=1e-4)


counts = st.integers(0, 10_000).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials)))


@given(counts)
def test_the_interval_holds_the_share_and_stays_in_range(count: tuple[int, int]) -> None:
    successes, trials = count
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= high <= 1
    assert not trials or low <= successes / trials <= high
    assert (low == 0) == (successes == 0)
    assert (high == 1) == (successes == trials)


@given(counts)
def test_failures_mirror_successes(count: tuple[int, int]) -> None:
    successes, trials = count
    low, high = wilson_interval(successes, trials)
    assert wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(counts.filter(lambda count: count[1] > 0))
def test_more_successes_move_it_up_and_more_trials_narrow_it(count: tuple[int, int]) -> None:
    successes, trials = count
    low, high = wilson_interval(successes, trials)
    if successes < trials:
        higher = wilson_interval(successes + 1, trials)
        assert higher.low > low
        assert higher.high >= high
    twice = wilson_interval(2 * successes, 2 * trials)
    assert twice.high - twice.low < high - low


def test_the_ends_solve_the_score_equation() -> None:
    """Wilson 1927: at either end the observed share lies 1.96 standard errors of that end away."""
    for successes, trials in [(3, 17), (90, 200), (999, 1000)]:
        for end in wilson_interval(successes, trials):
            error = abs(successes / trials - end) / math.sqrt(end * (1 - end) / trials)
            assert error == pytest.approx(1.959963984540054)


def test_impossible_counts_are_refused() -> None:
    assert wilson_interval(0, 0) == (0, 1)
    for successes, trials in [(-1, 5), (6, 5), (0, -1)]:
        with pytest.raises(ValueError, match="successes in"):
            wilson_interval(successes, trials)


@given(st.lists(st.floats(allow_nan=False), min_size=1), st.integers(1, 1000))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], per_mille: int) -> None:
    found = percentile(values, per_mille / 1000)
    assert found in values
    assert 1000 * sum(value <= found for value in values) >= per_mille * len(values)
    assert 1000 * sum(value < found for value in values) < per_mille * len(values)


def test_percentiles_of_a_hundred() -> None:
    """Also where the product is a little more than whole in binary: 0.07 * 100 = 7.000000000000001."""
    values = list(range(100, 0, -1))
    assert [percentile(values, share / 100) for share in range(1, 101)] == list(range(1, 101))
    assert percentile(values, 1e-9) == 1
    assert percentile([3.0], 0.5) == 3.0
    assert math.isnan(percentile([], 0.5))


@pytest.mark.parametrize("share", [0, -0.1, 1.01, 50, math.nan])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="not in"):
        percentile([1.0], share)


def test_statistics_do_not_import_torch() -> None:
    code = "import sys, mithridate.evaluation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
