"""Decisions on measurements: each gate fails for what it is there for, and for nothing less."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mithridate.evaluation import gates
from mithridate.evaluation.findings import Gate
from mithridate.evaluation.statistics import wilson_interval
from mithridate.evaluation.trust import Tried, _outside, _silent
from mithridate.types import Epsilon


def right(count: int, n: int = 100) -> list[bool]:
    return [True] * count + [False] * (n - count)


def test_accuracy_has_to_fall_with_epsilon_and_to_nothing() -> None:
    assert gates.monotone({4: right(80), 8: right(50), 32: right(3), 255: right(0)}, 10).passed
    assert gates.monotone({8: right(50), 32: right(51), 255: right(10)}, 10).passed  # one comes back; guessing
    unbounded = gates.monotone({8: right(50), 255: right(11)}, 10)
    assert unbounded.passed is False
    assert "11 of 100 images stand" in unbounded.evidence
    rising = gates.monotone({8: right(30), 32: right(45), 255: right(0)}, 10)
    assert rising.passed is False
    assert "15 images come back" in rising.evidence


def test_images_that_come_and_go_by_luck_are_no_rise() -> None:
    """A random defence: 12 come back and 9 fall, which a fair coin does every other time."""
    smaller = [False] * 12 + [True] * 9 + [True] * 79
    larger = [True] * 12 + [False] * 9 + [True] * 79
    assert gates.monotone({8: smaller, 16: larger, 255: right(0)}, 10).passed


@pytest.mark.parametrize(("count", "n", "passed"), [(0, 100, True), (2, 100, True), (3, 100, False), (20, 1000, False)])
def test_doubling_fails_where_more_than_a_point_is_shown(count: int, n: int, passed: bool) -> None:
    found = gates.doubling({"steps": 0, "restarts": count}, n)
    assert found.passed is passed
    assert f"{count} more of {n}" in found.evidence


def test_a_rate_just_as_allowed_is_seldom_taken_for_more() -> None:
    """The false alarms of ``shown_above``: 20,000 runs in which exactly a point is found."""
    for n in (100, 200, 1000):
        counts = np.random.default_rng(0).binomial(n, 0.01, 20_000)
        assert np.mean([gates.shown_above(int(count), n, 0.01) for count in counts]) < (0.085 if n == 100 else 0.055)


def test_one_image_is_forgiven_and_the_second_is_not() -> None:
    assert gates.iterative([7], 100).passed
    assert gates.iterative([7, 9], 100).passed is False
    assert gates.iterative(range(5), 1000).passed
    assert gates.iterative(range(6), 1000).passed is False
    assert gates.black_box({"square": [4], "rays": [4]}, 100).passed  # the same one twice
    both = gates.black_box({"square": [4], "rays": [5]}, 100)
    assert both.passed is False
    assert "2 of 100" in both.evidence
    assert gates.black_box({"square": [1, 2]}, 1000).passed
    assert gates.black_box({"square": [1, 2, 3]}, 1000).passed is False


def test_what_was_not_run_is_not_passed() -> None:
    assert gates.black_box({}, 100).passed is None
    assert gates.ball({}, 0).passed is None
    assert gates.null_control(random=False, tries=5, lucky=0, attacked=9, n=100).passed is None


def test_transfer_ahead_of_the_adaptive_attacks_is_a_failure() -> None:
    assert gates.weaker({"transfer": (3, 2), "noise": (0, 60)}, 100).passed
    assert gates.weaker({"transfer": (12, 9)}, 100).passed  # two attacks of one strength
    assert gates.weaker({"noise": (0, 60), "transfer": (20, 2)}, 100).passed is False


def test_gradients_that_are_not_there() -> None:
    assert gates.gradients(5, 5, 200, 0.9).passed
    assert gates.gradients(11, 0, 200, 0.9).passed is False
    assert gates.gradients(0, 11, 200, 0.9).passed is False


def test_a_loss_that_still_rises_or_never_did() -> None:
    assert gates.converged([(1.0, 0.04)] * 10, {}).passed
    assert gates.converged([(1.0, 0.06)] * 10, {}).passed is False
    assert gates.converged([(0.0, 0.0)] * 10, {}).passed is False
    assert gates.converged([(0.0, 0.0)] * 4, {}).passed  # too few stand to say
    silent = gates.converged([], {"square": 3})
    assert silent.passed is False
    assert "square: 3 images" in silent.evidence


def test_asking_again_must_not_do_what_the_attack_did() -> None:
    def found(lucky: int, attacked: int, n: int = 100) -> Gate:
        return gates.null_control(random=True, tries=10, lucky=lucky, attacked=attacked, n=n)

    assert found(0, 0).passed
    assert found(10, 60).passed
    assert found(10, 12).passed is False
    assert found(100, 100).passed  # nothing stands either way: no claim rests on it


def test_the_surrogate_has_to_speak_for_the_defence() -> None:
    assert gates.surrogate(range(9), 100).passed
    assert gates.surrogate(range(11), 100).passed is False
    assert wilson_interval(11, 100).low > gates.ONLY_SURROGATE > wilson_interval(9, 100).low


def test_the_same_seed_has_to_give_the_same_answer() -> None:
    assert gates.repeatable(again=0, alone=0, n=50, asked_alone=5).passed
    assert gates.repeatable(again=1, alone=0, n=50, asked_alone=5).passed is False
    assert gates.repeatable(again=0, alone=1, n=50, asked_alone=5).passed is False


def tried(pixels: torch.Tensor, levels: int | None = 8, found: list[bool] | None = None) -> Tried:
    epsilon = None if levels is None else Epsilon(levels)
    return Tried(attack="a", kind="white-box", pixels=pixels, right=[True] * 3, epsilon=epsilon, found=found)


def test_an_image_outside_the_ball_is_seen_whatever_its_attack_says() -> None:
    clean = torch.full((3, 1, 2, 2), 250, dtype=torch.uint8)
    edge, beyond = clean.clone(), clean.clone()
    edge[1, 0, 0, 0], beyond[1, 0, 0, 0] = 242, 241
    assert _outside([tried(edge)], clean) == {}
    assert "changes by 9 levels, allowed 8" in _outside([tried(beyond)], clean)["a"]
    assert _outside([tried(beyond, levels=None)], clean) == {}  # another norm
    wrapped = clean + 8  # 258 is 2 in 8 bits: a change of 248
    assert "248 levels" in _outside([tried(wrapped)], clean)["a"]
    assert "float32" in _outside([tried(clean.float())], clean)["a"]


def test_a_success_that_was_seen_and_not_returned_is_counted() -> None:
    clean = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    assert _silent([tried(clean, found=[True, False, True])], random=False) == {"a": 2}
    assert _silent([tried(clean, found=[True, False, True])], random=True) == {}
    assert _silent([tried(clean)], random=False) == {}
