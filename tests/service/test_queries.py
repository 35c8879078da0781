"""Which queries count as near-duplicates, against a slow and obvious reference."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from service.queries import RecentQueries, Yardstick


def points(count: int, dimension: int = 16, *, seed: int = 0, offset: float = 100.0) -> NDArray[np.float32]:
    """Far from the origin, as embeddings may be: there float32 has few digits left."""
    return (offset + np.random.default_rng(seed).standard_normal((count, dimension))).astype(np.float32)


def obvious(rows: NDArray[np.float32], near: float, window: int) -> tuple[int, int]:
    wide, found, same = rows.astype(np.float64), 0, 0
    for place in range(len(rows)):
        earlier = wide[max(0, place - window) : place]
        best = min((((wide[place] - other) ** 2).sum() for other in earlier), default=np.inf)
        identical = bool(best < 1e-9)
        same += identical
        found += best < near and not identical
    return found, same


@pytest.mark.parametrize("together", [1, 7])
def test_it_finds_what_comparing_all_pairs_finds(together: int) -> None:
    yardstick = Yardstick.of(points(500), window=100, fraction=0.5)
    draw, rows = np.random.default_rng(1), points(140, seed=2)
    for place in range(10, len(rows), 3):  # near, identical, and near something that the window has lost
        rows[place] = rows[place - int(draw.integers(1, 10))] + draw.choice([0, 0.1, 0.3]) * draw.standard_normal(16)
    rows[139] = rows[3]
    recent = RecentQueries(yardstick, window=100, max_bytes=2**20)
    seen = [recent.add("a", rows[start : start + together], now=0) for start in range(0, len(rows), together)]
    assert sum(one.compared for one in seen) == len(rows)
    counted = (sum(one.near for one in seen), sum(one.identical for one in seen))
    expected = obvious(rows, yardstick.near, 100)
    assert counted == expected
    assert min(expected) > 5


def test_the_yardstick_is_a_share_of_the_usual_distance() -> None:
    line = np.repeat(np.arange(200, dtype=np.float32)[:, None], 2, axis=1)  # neighbours at a squared distance of 2
    assert Yardstick.of(line, window=1000, fraction=0.5).near == pytest.approx(0.5)
    assert Yardstick.of(line, window=1000, fraction=1).near == pytest.approx(2)
    assert Yardstick.of(np.zeros((50, 3), np.float32), window=10, fraction=1).near == 0, "all alike: nothing is near"
    assert Yardstick.of(line[:1], window=10, fraction=1).near == 0


def test_clients_do_not_meet() -> None:
    recent = RecentQueries(Yardstick.of(points(500), window=10, fraction=0.5), window=10, max_bytes=2**20)
    rows = points(5, seed=3)
    recent.add("a", rows, now=0)
    assert recent.add("b", rows + 0.01, now=0).near == 0
    assert recent.add("a", rows + 0.01, now=0).near == 5


def test_the_rate_leaves_out_what_is_asked_again() -> None:
    recent = RecentQueries(Yardstick.of(points(500), window=100, fraction=0.5), window=100, max_bytes=2**20)
    rows = points(20, seed=4)
    recent.add("a", rows, now=5)
    again = recent.add("a", rows, now=6)
    assert (again.near, again.identical, again.rate, again.rated) == (0, 20, 0, 20)
    moved = recent.add("a", rows + 0.01, now=7)
    assert (moved.rate, moved.rated) == (0.5, 40)
    assert recent.highest_rate(since=6, at_least=40) == 0.5
    assert recent.highest_rate(since=6, at_least=41) == 0
    assert recent.highest_rate(since=8, at_least=1) == 0


def test_memory_is_bounded_and_the_silent_go_first() -> None:
    yardstick, limit = Yardstick.of(points(500), window=100, fraction=0.5), 50_000
    recent = RecentQueries(yardstick, window=100, max_bytes=limit)
    recent.add("steady", points(30), now=0)
    for number in range(200):
        recent.add(f"client {number}", points(40, seed=number), now=number)
        assert recent.nbytes <= limit
        assert recent.add("steady", points(1, seed=number), now=number).compared == 1
    assert len(recent) < 10
    assert recent.add("steady", points(1, seed=150), now=0).identical == 1, "whoever comes often is remembered"
    assert recent.add("client 0", points(1, seed=0), now=0).identical == 0


def test_one_client_does_not_exceed_the_memory_either() -> None:
    yardstick = Yardstick.of(points(500), window=1000, fraction=0.5)
    recent = RecentQueries(yardstick, window=1000, max_bytes=20_000)
    for number in range(20):
        recent.add("a", points(40, seed=number), now=0)
        assert recent.nbytes <= 20_000


def test_what_is_not_finite_is_left_out() -> None:
    recent = RecentQueries(Yardstick.of(points(500), window=10, fraction=0.5), window=10, max_bytes=2**20)
    rows = points(4)
    rows[1, 3], rows[2, 0] = np.nan, np.inf
    assert recent.add("a", rows, now=0).compared == 2
    assert recent.add("a", rows[1:2], now=0).compared == 0
