"""Neighbours: exact where the index is exact, and never dependent on who else is asking."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mithridate.errors import BundleError, OptionError
from mithridate.neighbors import NeighborIndex, Neighbors, resolve_factory

Points = NDArray[np.float32]
APPROXIMATE = ["IVF4,Flat", "HNSW8", "SQ8", "PCA8,Flat", "LSH", "PQ4x4", "PCA8,IVF4,Flat", "Flat,RFlat"]


def clouds(count: int, dimension: int = 16, offset: float = 0, seed: int = 0) -> Points:
    rng = np.random.Generator(np.random.PCG64(seed))
    return (rng.normal(size=(count, dimension)) + offset).astype(np.float32)


def brute_force(points: Points, queries: Points, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and squared distances in float64, equal distances by id."""
    ids, distances = [], []
    for query in queries.astype(np.float64):
        here = ((points.astype(np.float64) - query) ** 2).sum(1)
        order = np.lexsort((np.arange(len(points)), here))[:k]
        ids.append(order)
        distances.append(here[order])
    return np.stack(ids), np.stack(distances)


def same(found: Neighbors, points: Points, queries: Points, k: int) -> None:
    ids, distances = brute_force(points, queries, k)
    assert np.array_equal(found.ids.numpy(), ids)
    np.testing.assert_allclose(found.distances.numpy(), distances, rtol=1e-12)


def ask(index: NeighborIndex, queries: Points, k: int, **options: int) -> Neighbors:
    return index.search(torch.from_numpy(queries), k, **options)


@pytest.mark.parametrize("k", [1, 7, 64, 300])
@pytest.mark.parametrize("offset", [0, 100])
def test_equals_brute_force(k: int, offset: float) -> None:
    """Far from the origin too, where float32 distances by way of norms lose their digits."""
    points, queries = clouds(1500, offset=offset), clouds(60, offset=offset, seed=1)
    index = NeighborIndex.build(points)
    same(ask(index, queries, k), points, queries, k)
    same(ask(index, queries, k, among_first=500), points[:500], queries, k)


@pytest.mark.parametrize("k", [1, 5, 64, 200])
def test_equal_distances_are_ordered_by_id(k: int) -> None:
    """A training set with every image five times over, and a grid where distances tie across points."""
    points = np.tile(np.round(clouds(100, 4)), (5, 1))
    queries = np.round(clouds(40, 4, seed=1))
    same(ask(NeighborIndex.build(points), queries, k), points, queries, k)


@pytest.mark.parametrize("factory", ["auto", "IVF4,Flat", "HNSW8"])
@pytest.mark.parametrize("k", [5, 150])
def test_does_not_depend_on_the_other_queries(factory: str, k: int) -> None:
    points, queries = clouds(2000, 32, offset=3), clouds(100, 32, offset=3, seed=1)
    index = NeighborIndex.build(points, factory=factory)
    together = ask(index, queries, k)
    order = np.random.Generator(np.random.PCG64(2)).permutation(100)
    shuffled = ask(index, queries[order], k)
    assert torch.equal(shuffled.ids, together.ids[order])
    for row, query in enumerate(queries):
        alone = ask(index, query[np.newaxis], k)
        assert torch.equal(alone.ids[0], together.ids[row])
        assert torch.equal(alone.distances[0], together.distances[row])


def test_more_neighbours_than_there_are() -> None:
    points, queries = clouds(10), clouds(3, seed=1)
    index = NeighborIndex.build(points)
    assert len(index) == 10
    assert ask(index, queries, 1000).ids.shape == (3, 10)
    same(ask(index, queries, 1000), points, queries, 10)
    same(ask(index, queries, 1000, among_first=4), points[:4], queries, 4)
    same(ask(index, queries, 5, among_first=1000), points, queries, 5)


@pytest.mark.parametrize("factory", APPROXIMATE)
def test_approximate_indexes_answer_with_what_they_were_given(factory: str) -> None:
    """True ids, true distances, nearest first, and not one from outside the part that is asked for."""
    points, queries = clouds(1200), clouds(30, seed=1)
    index = NeighborIndex.build(points, factory=factory)
    for options in ({}, {"among_first": 400}):
        found = ask(index, queries, 20, **options)
        assert found.ids.shape == (30, 20)
        assert found.ids.min() >= 0
        assert found.ids.max() < options.get("among_first", 1200)
        true = ((points[found.ids.numpy()].astype(np.float64) - queries[:, np.newaxis]) ** 2).sum(-1)
        np.testing.assert_allclose(found.distances.numpy(), true, rtol=1e-12)
        assert (found.distances.diff(dim=1) >= 0).all()


def test_a_cell_without_a_clean_exemplar_still_answers_with_clean_ones() -> None:
    """The adversarial copies lie apart: the cell that the query falls into holds nothing that may be returned."""
    clean, adversarial = clouds(200), clouds(200, offset=50, seed=1)
    index = NeighborIndex.build(np.concatenate([clean, adversarial]), factory="IVF2,Flat")
    same(ask(index, adversarial[:3], 5, among_first=200), clean, adversarial[:3], 5)


def test_a_cell_with_too_few_repeats_its_nearest_with_its_distance() -> None:
    points = np.concatenate([clouds(100), clouds(20, offset=50, seed=1)])
    found = ask(NeighborIndex.build(points, factory="IVF2,Flat"), points[-1:], 60)
    assert found.ids.shape == (1, 60)
    assert set(found.ids[0].tolist()) == set(range(100, 120))
    assert (found.ids[0, 20:] == 119).all()
    assert (found.distances[0, 20:] == 0).all()


@pytest.mark.parametrize("factory", ["nonsense", "", "IVF4", "PQ7", "Flat,,", "IVF5000,Flat"])
def test_what_faiss_refuses_is_an_option_error(factory: str) -> None:
    with pytest.raises(OptionError, match="FAISS refuses the index") as caught:
        NeighborIndex.build(clouds(600), factory=factory)
    assert repr(factory) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factory", ["auto", "IVF4,Flat", "HNSW8"])
def test_a_file_gives_the_same_answers(tmp_path: Path, factory: str) -> None:
    points, queries = clouds(500), clouds(20, seed=1)
    index = NeighborIndex.build(points, factory=factory)
    index.write(tmp_path / "index")
    read = NeighborIndex.read(tmp_path / "index", points)
    assert torch.equal(ask(read, queries, 9).ids, ask(index, queries, 9).ids)
    assert torch.equal(ask(read, queries, 9, among_first=90).ids, ask(index, queries, 9, among_first=90).ids)
    ids = torch.tensor([[3, 1], [499, 3]])
    assert torch.equal(read.embeddings(ids), torch.from_numpy(points)[ids])
    assert resolve_factory("auto") == "Flat"
    faiss.read_index(str(tmp_path / "index"))  # FAISS itself reads it


def test_an_index_of_other_embeddings_is_refused(tmp_path: Path) -> None:
    NeighborIndex.build(clouds(50)).write(tmp_path / "index")
    with pytest.raises(BundleError, match="50 vectors of 16 numbers, the embeddings are 49 of 16"):
        NeighborIndex.read(tmp_path / "index", clouds(49))
    with pytest.raises(BundleError, match="50 vectors of 16 numbers, the embeddings are 50 of 17"):
        NeighborIndex.read(tmp_path / "index", clouds(50, 17))


@pytest.mark.parametrize("content", [b"", b"IxF2", b"\x00" * 100, b"nonsense" * 20])
def test_what_is_not_an_index_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index").write_bytes(content)
    with pytest.raises(BundleError, match="is not a FAISS index"):
        NeighborIndex.read(tmp_path / "index", clouds(5))
    with pytest.raises(BundleError, match="is not a FAISS index"):
        NeighborIndex.read(tmp_path / "missing", clouds(5))


def test_a_truncated_index_is_refused(tmp_path: Path) -> None:
    index = NeighborIndex.build(clouds(50))
    index.write(tmp_path / "index")
    content = (tmp_path / "index").read_bytes()
    for length in (10, 45, len(content) - 1):
        (tmp_path / "index").write_bytes(content[:length])
        with pytest.raises(BundleError, match="is not a FAISS index"):
            NeighborIndex.read(tmp_path / "index", clouds(50))
