"""An attack that was killed goes on where it was, asks nothing twice, and ends as if nothing had happened."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from mithridate.attacks.black_box import BLACK_BOX, parse_black_box
from mithridate.attacks.in_process import InProcessOracle
from mithridate.attacks.journal import Journal
from mithridate.attacks.oracle import Answers, BlackBoxAttack, BlackBoxResult, Oracle
from mithridate.defenses import Resources, build_defence
from mithridate.errors import InputError
from mithridate.types import Epsilon
from tests.mithridate.attack_helpers import answers, linear, random_pixels
from tests.mithridate.black_box_helpers import Books, KilledError

ABOUT = {"attack": "it", "seed": 5}
IMAGES = 8


def _attack(name: str) -> BlackBoxAttack:
    return parse_black_box(name, epsilon=Epsilon(10))


def _run(name: str, oracle: Oracle, images: int = IMAGES, seed: int = 5) -> BlackBoxResult:
    forward, _, _ = linear(11)
    pixels = random_pixels(11, images)
    return _attack(name).run(oracle, pixels, answers(forward, pixels), seed=seed, budget=80)


def _books(name: str, last: int | None = None) -> Books:
    return Books(linear(11)[0], track=_attack(name).track, last=last)


@pytest.mark.parametrize("name", BLACK_BOX)
def test_killed_again_and_again_it_asks_nothing_twice(name: str, tmp_path: Path) -> None:
    whole = _books(name)
    expected = _run(name, whole)
    chance, asked, lives = random.Random(name), [], 0
    while True:
        oracle = _books(name, last=chance.randrange(max(2, whole.asks // 3)))
        lives += 1
        with Journal(oracle, tmp_path / "journal", about=ABOUT) as journal:
            try:
                result = _run(name, journal)
            except KilledError:
                asked += oracle.queries
                continue
        asked += oracle.queries
        break
    assert lives > 2
    assert asked == whole.queries
    for field in ("pixels", "queries", "broken_at"):
        assert torch.equal(getattr(result, field), getattr(expected, field))


def test_a_last_record_that_was_cut_short_costs_only_itself(tmp_path: Path) -> None:
    path, whole = tmp_path / "journal", _books("square")
    with Journal(whole, path, about=ABOUT) as journal:
        expected = _run("square", journal)
    content = path.read_bytes()
    for missing in (1, 5, len(content) // 2, len(content) - 10, len(content)):
        path.write_bytes(content[: len(content) - missing])
        again = _books("square")
        with Journal(again, path, about=ABOUT) as journal:
            assert torch.equal(_run("square", journal).pixels, expected.pixels)
        assert again.queries == whole.queries[len(whole.queries) - len(again.queries) :]
        assert path.read_bytes() == content


class _InParts(Books):
    """Hands over one answer at a time, the last first, as a service may that is asked for several things at once."""

    def ask_in_parts(self, rows: torch.Tensor, pixels: torch.Tensor):  # type: ignore[no-untyped-def]
        for place in reversed(range(len(rows))):
            yield torch.tensor([place]), self.ask(rows[place : place + 1], pixels[place : place + 1])


def test_killed_within_an_ask_it_keeps_the_answers_that_had_come(tmp_path: Path) -> None:
    whole = _books("square")
    expected = _run("square", whole)
    first = _InParts(linear(11)[0], track="scores", last=21)
    with Journal(first, tmp_path / "journal", about=ABOUT) as journal, pytest.raises(KilledError):
        _run("square", journal)
    second = _books("square")
    with Journal(second, tmp_path / "journal", about=ABOUT) as journal:
        assert torch.equal(_run("square", journal).pixels, expected.pixels)
        assert journal.replayed == 21
    assert sorted(first.queries + second.queries) == sorted(whole.queries)


def test_a_journal_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(_books("square"), path, about=ABOUT) as journal:
        _run("square", journal)
        with pytest.raises(InputError, match="in use by another attack"):
            Journal(_books("square"), path, about=ABOUT)
    content = path.read_bytes()
    with pytest.raises(InputError, match="of another attack: seed is 5, wanted 6;"):
        Journal(_books("square"), path, about={**ABOUT, "seed": 6})
    with pytest.raises(InputError, match="track is 'scores', wanted 'labels'"):
        Journal(_books("rays"), path, about=ABOUT)
    silent = _books("square", last=0)
    with (
        Journal(silent, path, about=ABOUT) as journal,
        pytest.raises(InputError, match=r"query 2 of image \d was for other pixels"),
    ):
        _run("square", journal, seed=7)
    assert path.read_bytes() == content, "what does not fit was written to"
    for damaged in (b"\x89PNG", content[:80] + b"\x00" + content[81:], content[:-900] + b"!" + content[-899:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"no journal|damaged"):
            Journal(_books("square"), path, about=ABOUT)
        assert path.read_bytes() == damaged


def test_scores_come_back_to_the_last_bit(tmp_path: Path, resources: Resources) -> None:
    pixels = torch.randint(0, 256, (10, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    rows = torch.tensor([0, 0, 1, 2, 3, 1, 0, 5, 4, 4])
    oracle = InProcessOracle(build_defence("none", resources), classes=10)
    told = []
    for _ in range(2):
        with Journal(oracle, tmp_path / "journal", about={}) as journal:
            told.append(journal.ask(rows, pixels))
    assert torch.equal(told[0].scores, told[1].scores)
    assert told[0].scores.dtype == told[1].scores.dtype == torch.float64
    assert oracle.queries.tolist() == [3, 2, 1, 1, 2, 1]
    thirds = _Thirds()
    for _ in range(2):
        with Journal(thirds, tmp_path / "thirds", about={}) as journal:
            assert journal.ask(rows[:2], pixels[:2]).scores[1, 2] == 1 / 3  # no float32
    assert thirds.asks == 1


class _Thirds:
    track, classes = "scores", 3

    def __init__(self) -> None:
        self.asks = 0

    def ask(self, rows: torch.Tensor, pixels: torch.Tensor) -> Answers:
        self.asks += 1
        return Answers(
            labels=torch.zeros(len(rows), dtype=torch.int64),
            scores=torch.full((len(rows), 3), 1 / 3).double() * 0 + 1 / 3,
        )


class _Nothing:
    track, classes = "scores", 10

    def ask(self, rows: torch.Tensor, pixels: torch.Tensor) -> Answers:
        scores = torch.zeros(len(rows), 10, dtype=torch.float64)
        return Answers(labels=scores.argmax(1), scores=scores)


def test_a_hundred_thousand_queries_are_no_burden(tmp_path: Path) -> None:
    rows, pixels = torch.arange(200), random_pixels(0, 200)
    start = time.perf_counter()
    for _ in range(2):
        with Journal(_Nothing(), tmp_path / "journal", about={}) as journal:
            for _ in range(500):
                journal.ask(rows, pixels)
            assert journal.replayed in (0, 100_000)
    assert time.perf_counter() - start < 10
    assert (tmp_path / "journal").stat().st_size < 100_000 * 64
