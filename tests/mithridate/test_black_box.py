"""What holds of every black-box attack: it breaks what it should, within its ball and budget, and counts honestly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mithridate.attacks.black_box import BLACK_BOX, parse_black_box
from mithridate.attacks.in_process import InProcessOracle
from mithridate.attacks.oracle import Answers
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources, build_defence
from mithridate.errors import OptionError
from mithridate.types import Epsilon
from tests.mithridate.attack_helpers import answers, linear, noisy, random_pixels
from tests.mithridate.black_box_helpers import Books

EPSILON = Epsilon(12)
BUDGET = 150

# Of 30 digits at 32/255, after 250 queries: how many each must break. Each broke four more when this was written.
BREAKS = {
    "square": 24,
    "simba": 25,
    "simba-dct": 17,
    "nes": 21,
    "boundary": 14,
    "hopskipjump": 14,
    "rays": 24,
    "random-noise": 1,
    "random-corners": 10,
}


def test_every_attack_has_a_strength_to_show() -> None:
    assert set(BREAKS) == set(BLACK_BOX)


@pytest.mark.parametrize("name", BLACK_BOX)
def test_it_breaks_an_undefended_network(name: str, resources: Resources, digits_test: LabelledImages) -> None:
    pixels, labels = torch.from_numpy(digits_test.images[:30]), torch.from_numpy(digits_test.labels[:30])
    attack = parse_black_box(name, epsilon=Epsilon(32))
    oracle = InProcessOracle(build_defence("none", resources), classes=10, track=attack.track)
    result = attack.run(oracle, pixels, labels, seed=0, budget=250)
    assert int((result.broken_at > 1).sum()) >= BREAKS[name]
    assert torch.equal(oracle.queries, result.queries)
    # What it says to send is misread when it is sent, wherever it says that it broke it, and nowhere else.
    again = InProcessOracle(build_defence("none", resources), classes=10).ask(torch.arange(30), result.pixels)
    assert torch.equal(again.labels != labels, result.broken_at > 0)


@pytest.mark.parametrize("name", BLACK_BOX)
def test_its_books_are_those_of_the_oracle(name: str) -> None:
    forward, _, _ = linear(3)
    pixels = random_pixels(3, 24)
    labels = answers(forward, pixels)
    labels[0] = (labels[0] + 1) % 4  # misread as it is
    attack = parse_black_box(name, epsilon=EPSILON)
    oracle = Books(forward, track=attack.track)
    result = attack.run(oracle, pixels, labels, seed=1, budget=BUDGET)
    assert oracle.counts(24) == result.queries.tolist()
    assert int(result.queries.max()) <= BUDGET
    assert result.queries[0] == result.broken_at[0] == 1
    for row in range(24):
        asked = oracle.of(row)
        assert len(set(asked)) == len(asked), "a point was asked for twice"
        points = torch.from_numpy(np.frombuffer(b"".join(asked), dtype=np.uint8).copy()).view(-1, 3, 4, 4)
        inside = (points.int() - pixels[row].int()).abs().flatten(1).amax(1) <= EPSILON.levels
        broken = (inside & (answers(forward, points) != labels[row])).nonzero()[:, 0]
        assert int(result.broken_at[row]) == (int(broken[0]) + 1 if len(broken) else 0)
        assert result.pixels[row].numpy().tobytes() in [point for point, of in zip(asked, inside, strict=True) if of]
    if attack.name not in ("boundary", "hopskipjump", "rays"):  # those look outside for the border
        everything = torch.from_numpy(np.frombuffer(b"".join(p for _, p in oracle.queries), dtype=np.uint8).copy())
        clean = pixels[[row for row, _ in oracle.queries]]
        assert int((everything.view(-1, 3, 4, 4).int() - clean.int()).abs().max()) <= EPSILON.levels


@pytest.mark.parametrize("name", BLACK_BOX)
def test_an_image_is_attacked_the_same_whoever_is_beside_it(name: str) -> None:
    forward, _, _ = linear(4)
    pixels = random_pixels(4, 12)
    pixels[4] = pixels[3]
    labels = answers(forward, pixels)
    attack = parse_black_box(name, epsilon=Epsilon(4))
    together, alone = (Books(forward, track=attack.track) for _ in range(2))
    many = attack.run(together, pixels, labels, seed=2, budget=BUDGET)
    first = int((many.queries > 20).nonzero()[0])
    labels[first] = (labels[first] + 1) % 4  # it drops out at once
    rest = [row for row in range(7) if row != first]
    few = attack.run(alone, pixels[:7], labels[:7], seed=2, budget=BUDGET)
    assert [together.of(row) for row in rest] == [alone.of(row) for row in rest]
    assert torch.equal(many.pixels[rest], few.pixels[rest])
    assert torch.equal(many.broken_at[rest], few.broken_at[rest])
    assert max(alone.counts(7)) > 20, "all fell at once: the test says nothing"
    assert alone.of(3) != alone.of(4), "two rows draw the same"
    other = Books(forward, track=attack.track)
    attack.run(other, pixels[:7], labels[:7], seed=3, budget=BUDGET)
    assert other.queries != alone.queries, "the seed draws nothing"


class _Lies(Books):
    """Says the right label beside scores of nothing."""

    def ask(self, rows: torch.Tensor, pixels: torch.Tensor) -> Answers:
        told = super().ask(rows, pixels)
        return Answers(labels=told.labels, scores=torch.full((len(rows), 4), torch.nan, dtype=torch.float64))


@pytest.mark.parametrize("name", ["boundary", "hopskipjump", "rays", "random-noise", "random-corners"])
def test_attacks_on_labels_never_read_scores(name: str) -> None:
    forward, _, _ = linear(5)
    pixels = random_pixels(5, 8)
    labels = answers(forward, pixels)
    attack = parse_black_box(name, epsilon=EPSILON)
    assert attack.track == "labels"
    honest, lying = Books(forward, track="labels"), _Lies(forward, track="scores")
    attack.run(honest, pixels, labels, seed=0, budget=BUDGET)
    attack.run(lying, pixels, labels, seed=0, budget=BUDGET)
    assert honest.queries == lying.queries


@pytest.mark.parametrize("name", BLACK_BOX)
def test_against_a_random_defence_nothing_ends_at_the_first_lucky_answer(name: str) -> None:
    forward, _, _ = linear(6)
    pixels = random_pixels(6, 8)
    labels = answers(forward, pixels)
    attack = parse_black_box(name, epsilon=EPSILON, random=True)
    oracle = Books(noisy(forward, 0, 3.0), track=attack.track)
    result = attack.run(oracle, pixels, labels, seed=0, budget=BUDGET)
    assert oracle.counts(8) == result.queries.tolist()
    if not name.startswith("simba"):  # it may run out of directions that help
        assert result.queries.tolist() == [BUDGET] * 8
    lucky = (result.broken_at > 0) & (result.broken_at < BUDGET / 2)
    assert lucky.any(), "the defence was never wrong: the test says nothing"


def test_a_budget_of_one_is_the_image_itself() -> None:
    forward, _, _ = linear(7)
    pixels = random_pixels(7, 6)
    labels = answers(forward, pixels)
    for name in BLACK_BOX:
        attack = parse_black_box(name, epsilon=EPSILON)
        result = attack.run(Books(forward, track=attack.track), pixels, labels, seed=0, budget=1)
        assert torch.equal(result.pixels, pixels)
        assert result.queries.tolist() == [1] * 6


@pytest.mark.parametrize("name", BLACK_BOX)
def test_a_ball_of_nothing_and_a_constant_network_come_to_an_end(name: str) -> None:
    pixels, labels = random_pixels(8, 3), torch.tensor([1, 1, 1])
    attack = parse_black_box(name, epsilon=Epsilon(0))
    oracle = Books(lambda images: torch.eye(4)[torch.ones(len(images), dtype=torch.int64)], track=attack.track)
    result = attack.run(oracle, pixels, labels, seed=0, budget=40)
    assert torch.equal(result.pixels, pixels)
    assert not result.broken_at.any()


def test_what_cannot_be_run_is_refused_in_one_line() -> None:
    forward, _, _ = linear(9)
    pixels, labels = random_pixels(9, 2), torch.tensor([0, 1])
    for text, seen in (
        ("squares", r"unknown black-box attack 'squares' \(did you mean 'square'\?\); allowed: boundary"),
        ("square:levels=3", "unknown option of square 'levels'; allowed: repeats, share"),
        ("rays:samples=3", "rays has no options"),
        ("nes:pairs=0", "pairs=0 is out of range; allowed: 1 to 1000"),
        ("square:repeats=5", "repeats=5 is out of range"),
    ):
        with pytest.raises(OptionError, match=seen):
            parse_black_box(text, epsilon=EPSILON)
    square = parse_black_box("square", epsilon=EPSILON)
    with pytest.raises(OptionError, match="needs scores"):
        square.run(Books(forward, track="labels"), pixels, labels, seed=0, budget=10)
    with pytest.raises(OptionError, match="budget of 0 queries"):
        square.run(Books(forward, track="scores"), pixels, labels, seed=0, budget=0)
