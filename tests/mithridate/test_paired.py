"""Defence against base: exact tests against slow ones, intervals that keep what they promise, no gain by chance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from mithridate.evaluation.paired import compare, is_gain, is_harm, mcnemar, tango_interval, worst_case

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_a_sign_test(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_thousands_of_images() -> None:
    assert mcnemar(5000, 5000) == 1
    assert mcnemar(10_000, 0) == 0
    assert mcnemar(520, 480) == pytest.approx(binomtest(520, 1000).pvalue, rel=1e-9)


def test_the_interval_is_that_of_images_drawn_again() -> None:
    """Against the slow way: draw the images themselves, with replacement, and take the mean each time."""
    generator = np.random.default_rng(5)
    defence, base = generator.random(200) < 0.5, generator.random(200) < 0.4
    found = compare(list(defence), list(base), seed=0)
    change = defence.astype(float) - base.astype(float)
    slow = [change[generator.integers(0, 200, 200)].mean() for _ in range(10_000)]
    assert found.interval == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.006)
    assert found.difference == pytest.approx(change.mean())


@settings(deadline=None)
@given(pairs, st.integers(0, 10))
def test_whatever_the_images(answers: list[tuple[bool, bool]], seed: int) -> None:
    defence, base = zip(*answers, strict=True)
    found, mirrored = compare(defence, base, seed=seed), compare(base, defence, seed=seed)
    assert -1 <= found.interval[0] <= found.difference <= found.interval[1] <= 1
    assert found.interval[0] < found.interval[1]  # never so sure as to have no width
    assert mirrored.p == found.p
    assert (mirrored.gained, mirrored.lost, mirrored.difference) == (found.lost, found.gained, -found.difference)
    assert found == compare(defence, base, seed=seed)
    assert not (is_gain(found) and is_harm(found))
    assert not is_gain(found) or found.p <= 0.05


def test_nothing_changed_is_no_certainty() -> None:
    """Tango 1998: z^2 / (n + z^2), so 200 images alike leave room for 1.9 points either way."""
    found = compare([True] * 200, [True] * 200, seed=0)
    assert found.interval == pytest.approx((-0.018845, 0.018845), abs=1e-6)
    assert not is_gain(found)
    assert not is_harm(found)


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 1, 44), (3, 0, 10), (7, 2, 50), (0, 0, 30)])
def test_the_ends_of_the_score_interval_solve_its_equation(gained: int, lost: int, n: int) -> None:
    """Tango 1998: at either end the observed difference lies 1.96 standard errors away, with the share of lost images
    that is likeliest for that end; found here by trying 200,000 shares."""
    for end in tango_interval(gained, lost, n):
        shares = np.linspace(max(0.0, -end), (1 - end) / 2, 200_001)[1:-1]
        likelihood = gained * np.log(shares + end) + lost * np.log(shares)
        likelihood += (n - gained - lost) * np.log1p(-2 * shares - end)
        variance = n * (2 * shares[likelihood.argmax()] + end * (1 - end))
        distance = abs(gained - lost - n * end) / np.sqrt(variance)
        assert distance == pytest.approx(1.96, abs=0.01)


def test_few_images_are_not_a_gain_however_sure_the_bootstrap_is() -> None:
    """4 to 0 happens to a fair coin once in 8 times; the interval above zero does not know."""
    found = compare([True] * 4 + [False] * 196, [False] * 200, seed=0)
    assert found.interval[0] > 0
    assert found.p == 0.125
    assert not is_gain(found)
    assert is_gain(compare([True] * 6 + [False] * 194, [False] * 200, seed=0))
    assert is_harm(compare([False] * 200, [True] * 4 + [False] * 196, seed=0))


def test_a_gain_is_declared_by_chance_at_most_once_in_forty() -> None:
    """2,000 comparisons of two that are equally good, at several rates of change: the words' own false alarms."""
    generator = np.random.default_rng(0)
    for share in (0.02, 0.1, 0.4):
        gains = harms = 0
        for trial in range(2000):
            gained, lost, same = generator.multinomial(100, [share / 2, share / 2, 1 - share])
            better = [True] * gained + [False] * lost + [True] * same
            worse = [False] * gained + [True] * lost + [True] * same
            found = compare(better, worse, seed=trial, resamples=400)
            gains, harms = gains + is_gain(found), harms + is_harm(found)
        assert gains <= 0.025 * 2000 + 3 * (0.025 * 2000) ** 0.5
        assert harms <= 0.06 * 2000  # one-sided 2.5 % where many images change, up to 6 % where few do


def test_a_true_gain_is_found() -> None:
    assert is_gain(compare([True] * 60 + [False] * 40, [True] * 45 + [False] * 55, seed=0))


def test_the_worst_case_is_a_minimum_for_each_image() -> None:
    assert worst_case([[True, True, False], [True, False, True]]) == (True, False, False)
    for wrong in ([], [[True], [True, False]]):
        with pytest.raises(ValueError, match="allowed"):
            worst_case(wrong)


def test_lists_that_do_not_match_are_refused() -> None:
    for defence, base in [([], []), ([True], [True, False])]:
        with pytest.raises(ValueError, match="allowed"):
            compare(defence, base, seed=0)
