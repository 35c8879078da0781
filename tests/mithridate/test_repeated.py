"""A random defence asked again: what is left after m tries, and that a lucky draw is neither success nor defence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mithridate.defenses import Budget, Outcome, Prediction, Request, Resources, build_defence
from mithridate.defenses.base import Batch, answer_one, answer_together
from mithridate.evaluation.repeated import Scored, all_right, at_least_one_miss, is_random, score
from mithridate.types import Images, Logits

IMAGES = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous()
LABELS = torch.zeros(4, dtype=torch.long)


@dataclass(frozen=True)
class Coin:
    """Misreads image i with probability ``wrong[i]``, by the request's own seed."""

    wrong: tuple[float, ...]
    name: str = "coin"

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        return answer_one(self.predict_together, images, generator, budget)

    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        return answer_together(requests, torch.device("cpu"), self._answer)

    def _answer(self, batch: Batch) -> Prediction:
        numbers = (batch.images[:, 0, 0, 0] * 255).round().long()
        draws = torch.stack(
            [torch.rand((), generator=torch.Generator().manual_seed(seed + int(i)))
             for seed, i in zip(batch.seeds, numbers, strict=True)]
        )  # fmt: skip
        missed = draws < torch.tensor(self.wrong)[numbers]
        scores = torch.nn.functional.one_hot(missed.long(), 2).float()
        nothing = (None,) * len(numbers)
        return Prediction(scores=scores, base_scores=scores, adaptations=nothing, neighborhoods=nothing, seconds={})

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        raise NotImplementedError


def test_the_four_numbers_of_a_known_coin() -> None:
    coin = Coin(wrong=(0.0, 0.1, 0.4, 1.0))
    found = score(coin, IMAGES, LABELS, repeats=400, seed=1)
    assert found.random
    assert found.asked == 400
    assert [count / 400 for count in found.wrong] == pytest.approx(coin.wrong, abs=0.08)
    repeated = found.repeated
    assert repeated.expected == pytest.approx((1 + 0.9 + 0.6 + 0) / 4, abs=0.03)
    assert repeated.majority == 0.75
    assert repeated.persistent[1] == pytest.approx(repeated.expected)
    assert repeated.persistent[10] == pytest.approx((1 + 0.9**10 + 0.6**10) / 4, abs=0.05)
    assert repeated.persistent[100] == pytest.approx(0.25, abs=0.02)


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 1))
def test_up_to_as_many_tries_as_answers_the_estimate_is_unbiased(asked: int, tries: int, p: float) -> None:
    """The mean over all that may be seen is exactly (1 - p)^tries; the plug-in's is not."""
    tries = min(tries, asked)
    chances = [comb(asked, k) * p**k * (1 - p) ** (asked - k) for k in range(asked + 1)]
    mean = sum(chance * all_right(k, asked, tries) for k, chance in enumerate(chances))
    assert mean == pytest.approx((1 - p) ** tries, abs=1e-9)


@given(st.integers(0, 20), st.integers(1, 300))
def test_more_tries_leave_no_more(wrong: int, tries: int) -> None:
    assert 0 <= all_right(wrong, 20, tries) <= 1
    if wrong < 20 and tries > 20:
        assert all_right(wrong, 20, tries + 1) < all_right(wrong, 20, tries)
        assert all_right(wrong + 1, 20, tries) < all_right(wrong, 20, tries)


def test_twenty_right_answers_do_not_show_a_hundred() -> None:
    assert all_right(0, 20, 20) == 1
    assert all_right(0, 20, 100) == pytest.approx(0.4104, abs=1e-4)  # Beta(1/2, 41/2): its mean of (1 - p)^100


def test_persistent_accuracy_never_rises_with_the_tries() -> None:
    """Also where the estimate changes from one kind to the other: misread once in 10, so 10 tries leave nothing, and
    the prior alone would leave 3 % of 100."""
    persistent = Scored(asked=10, wrong=(1,) * 4, right=(True,) * 4, random=True).repeated.persistent
    assert all_right(1, 10, 100) > 0.02
    assert persistent[1] == pytest.approx(0.9)
    assert persistent[10] == persistent[100] == 0


def test_a_defence_without_chance_is_asked_once(resources: Resources) -> None:
    images = torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = images.expand(6, *resources.classifier.spec.image_shape).contiguous()
    found = score(build_defence("none", resources), images, torch.zeros(6, dtype=torch.long), seed=0)
    assert (found.random, found.asked) == (False, 1)
    persistent = found.repeated.persistent
    assert set(persistent.values()) == {found.repeated.expected}
    assert is_random(build_defence("sap:passes=2", resources), images, seed=0)


def test_no_seed_of_an_attack_is_used_to_score() -> None:
    """A defence whose answer hangs on the seed alone: what an attack tuned to its seed is not what is scored."""
    coin = Coin(wrong=(0.5,) * 4)
    attacked = coin.predict(IMAGES.float() / 255, generator=torch.Generator().manual_seed(7), budget=Budget())
    right = [score(coin, IMAGES, LABELS, repeats=1, seed=7 + turn, random=True).right for turn in range(20)]
    same = [list(r) == (attacked.scores.argmax(1) == 0).tolist() for r in right]
    assert sum(same) < 10
    assert right[0] == score(coin, IMAGES, LABELS, repeats=1, seed=7, random=True).right


def test_clean_images_asked_often_enough_are_misread() -> None:
    """A clean error of 2 % a query: 87 % are misread in 100 queries without any attack."""
    clean = score(Coin(wrong=(0.02,) * 4), IMAGES, LABELS, repeats=4000, seed=0, random=True)
    assert at_least_one_miss(clean, [100])[100] == pytest.approx(1 - 0.98**100, abs=0.05)


def test_no_answers_are_no_score() -> None:
    with pytest.raises(ValueError, match="allowed: 1"):
        score(Coin(wrong=(0.0,) * 4), IMAGES, LABELS, repeats=0, seed=0)
