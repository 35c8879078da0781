"""Neighbours: exact where the index is exact, and never dependent on who else is asking."""

from __future__ import annotations

from pathlib import Path
from random import Random

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mithridate.errors import BundleError, OptionError
from mithridate.neighbors import METRICS, Backend, Metric, NeighborIndex, Neighbors, resolve_factory

Points = NDArray[np.float32]
APPROXIMATE = ["IVF4,Flat", "HNSW8", "SQ8", "PCA8,Flat", "LSH", "PQ4x4", "PCA8,IVF4,Flat", "Flat,RFlat"]


def clouds(count: int, dimension: int = 16, offset: float = 0, seed: int = 0) -> Points:
    rng = np.random.Generator(np.random.PCG64(seed))
    return (rng.normal(size=(count, dimension)) + offset).astype(np.float32)


def oracle(points: Points, query: Points, metric: Metric) -> NDArray[np.float64]:
    """All distances of one query in float64, the obvious way."""
    wide, one = points.astype(np.float64), query.astype(np.float64)
    if metric == "l2":
        return np.square(wide - one).sum(1)  # type: ignore[no-any-return]
    products: NDArray[np.float64] = wide @ one
    if metric == "ip":
        return -products
    lengths = np.linalg.norm(wide, axis=1) * np.linalg.norm(one)
    cosines: NDArray[np.float64] = np.divide(products, lengths, out=np.zeros(len(points)), where=lengths > 0)
    return 1 - cosines


def brute_force(
    points: Points, queries: Points, k: int, metric: Metric = "l2", keep: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and distances in float64, equal distances by id."""
    allowed = np.arange(len(points)) if keep is None else np.flatnonzero(keep)
    ids, distances = [], []
    for query in queries:
        here = oracle(points, query, metric)[allowed]
        order = np.lexsort((allowed, here))[:k]
        ids.append(allowed[order])
        distances.append(here[order])
    return np.stack(ids), np.stack(distances)


def same(
    found: Neighbors,
    points: Points,
    queries: Points,
    k: int,
    metric: Metric = "l2",
    keep: NDArray[np.bool_] | None = None,
) -> None:
    ids, distances = brute_force(points, queries, k, metric, keep)
    assert np.array_equal(found.ids.numpy(), ids)
    np.testing.assert_allclose(found.distances.numpy(), distances, rtol=1e-12, atol=0 if metric == "l2" else 1e-12)


def ask(index: NeighborIndex, queries: Points, k: int) -> Neighbors:
    return index.search(torch.from_numpy(queries), k)


def first(count: int, total: int) -> torch.Tensor:
    return torch.arange(total) < count


def scattered(total: int, share: float = 0.3, seed: int = 3) -> torch.Tensor:
    return torch.rand(total, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 7, 64, 300])
@pytest.mark.parametrize("offset", [0, 100])
def test_equals_brute_force(k: int, offset: float, metric: Metric) -> None:
    """Far from the origin too, where float32 distances by way of norms lose their digits."""
    points, queries = clouds(1500, offset=offset), clouds(60, offset=offset, seed=1)
    index = NeighborIndex.build(points, metric=metric)
    for searched in (index, index.to("cpu", backend="torch")):
        same(ask(searched, queries, k), points, queries, k, metric)
        for keep in (first(500, 1500), ~first(500, 1500), scattered(1500)):
            same(ask(searched.only(keep), queries, k), points, queries, k, metric, keep.numpy())


@pytest.mark.parametrize("metric", METRICS)
def test_equals_brute_force_where_float32_cannot_tell_anything_apart(metric: Metric) -> None:
    """The squared lengths are 10,000,000 times the squared distances: scores in float32 are noise."""
    points, queries = clouds(3000, offset=3000), clouds(5, offset=3000, seed=1)
    index = NeighborIndex.build(points, metric=metric)
    for searched in (index, index.to("cpu", backend="torch")):
        found = ask(searched, queries, 20)
        if metric == "l2":
            same(found, points, queries, 20)
        else:  # here float64 has too few digits for the order as well; the distances must be the least all the same
            np.testing.assert_allclose(
                found.distances.numpy(), brute_force(points, queries, 20, metric)[1], rtol=1e-12, atol=1e-14
            )


@pytest.mark.parametrize("blocks", [1 << 12, 1 << 15])
@pytest.mark.parametrize("metric", METRICS)
def test_many_blocks_answer_as_one(monkeypatch: pytest.MonkeyPatch, metric: Metric, blocks: int) -> None:
    """More exemplars than are scored at once, in the order that makes each block better than the last."""
    points, queries = clouds(9001), clouds(9, seed=1)
    if metric != "cosine":
        points = points[np.argsort(-np.linalg.norm(points, axis=1))]
    monkeypatch.setattr("mithridate.neighbor_search._SCORES", blocks)
    index = NeighborIndex.build(points, metric=metric)
    keep = scattered(9001, 0.7)
    for k in (1, 40, 600):
        for searched in (index, index.to("cpu", backend="torch")):
            same(ask(searched, queries, k), points, queries, k, metric)
            same(ask(searched.only(keep), queries, k), points, queries, k, metric, keep.numpy())


@pytest.mark.parametrize("k", [1, 5, 64, 200])
def test_equal_distances_are_ordered_by_id(k: int) -> None:
    """A training set with every image five times over, and a grid where distances tie across points."""
    points = np.tile(np.round(clouds(100, 4)), (5, 1))
    queries = np.round(clouds(40, 4, seed=1))
    index = NeighborIndex.build(points)
    same(ask(index, queries, k), points, queries, k)
    same(ask(index.to("cpu", backend="torch"), queries, k), points, queries, k)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dimension", [3, 16, 37])
def test_many_copies_of_one_exemplar_are_ordered_by_id(metric: Metric, dimension: int) -> None:
    """More of them than there are candidates: those with the lowest ids, all at the same distance to the last bit."""
    points = np.concatenate([clouds(50, dimension, seed=2) - 4, np.tile(clouds(1, dimension, offset=2), (700, 1))])
    queries = points[[-1]]
    index = NeighborIndex.build(points, metric=metric)
    for searched in (index, index.to("cpu", backend="torch")):
        found = ask(searched, queries, 100)
        assert found.ids.tolist() == [list(range(50, 150))]
        assert len(found.distances.unique()) == 1
        assert (
            ask(searched.only(scattered(750)), queries, 5).ids[0].tolist()
            == [i for i in range(50, 750) if scattered(750)[i]][:5]
        )


grids = st.integers(1, 4).flatmap(
    lambda width: st.tuples(
        st.lists(st.lists(st.integers(-3, 3), min_size=width, max_size=width), min_size=1, max_size=60),
        st.lists(st.lists(st.integers(-3, 3), min_size=width, max_size=width), min_size=1, max_size=5),
    )
)


@given(grids, st.integers(1, 70), st.sampled_from(["l2", "ip"]), st.randoms(use_true_random=False))
def test_any_grid_any_part_of_it(
    grid: tuple[list[list[int]], list[list[int]]], k: int, metric: Metric, random: Random
) -> None:
    """Whole numbers, so that the order is beyond doubt."""
    points, queries = (np.array(part, dtype=np.float32) for part in grid)
    keep = torch.tensor([random.random() < 0.7 for _ in points])
    keep[random.randrange(len(points))] = True
    index = NeighborIndex.build(points, metric=metric).only(keep)
    assert len(index) == int(keep.sum())
    for searched in (index, index.to("cpu", backend="torch")):
        same(ask(searched, queries, k), points, queries, k, metric, keep.numpy())


@pytest.mark.parametrize("factory", ["auto", "IVF4,Flat", "HNSW8"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [5, 150])
def test_does_not_depend_on_the_other_queries(factory: str, k: int, metric: Metric) -> None:
    points, queries = clouds(2000, 32, offset=3), clouds(100, 32, offset=3, seed=1)
    index = NeighborIndex.build(points, factory=factory, metric=metric)
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
    few = index.only(first(4, 10))
    assert len(few) == 4
    same(ask(few, queries, 1000), points[:4], queries, 4)


def test_no_queries_are_no_neighbours() -> None:
    index = NeighborIndex.build(clouds(2000))
    found = index.search(torch.empty(0, 16), 7)
    assert found.ids.shape == found.distances.shape == (0, 7)
    assert found.ids.dtype == torch.int64


@pytest.mark.parametrize("factory", ["auto", "IVF4,Flat"])
def test_a_part_of_a_part_is_what_both_allow(factory: str) -> None:
    points, queries = clouds(900), clouds(5, seed=1)
    index = NeighborIndex.build(points, factory=factory)
    some, other = scattered(900, 0.6, seed=1), scattered(900, 0.6, seed=2)
    both = ask(index.only(some & other), queries, 30)
    assert torch.equal(ask(index.only(some).only(other), queries, 30).ids, both.ids)
    assert torch.equal(ask(index.only(other).only(some), queries, 30).ids, both.ids)
    assert len(index.only(some).only(other)) == int((some & other).sum())
    assert len(index) == 900  # as it was


def test_a_part_shares_the_arrays_of_the_whole() -> None:
    points = clouds(900)
    index = NeighborIndex.build(points)
    for keep in (first(40, 900), scattered(900)):
        assert index.only(keep)._points is index._points
    assert index._points.vectors.data_ptr() == points.ctypes.data


@pytest.mark.parametrize("factory", ["auto", "IVF4,Flat"])
def test_a_part_with_nothing_in_it_is_refused(factory: str) -> None:
    index = NeighborIndex.build(clouds(200), factory=factory)
    with pytest.raises(OptionError, match="none of the 200 exemplars"):
        index.only(torch.zeros(200, dtype=torch.bool))
    with pytest.raises(OptionError, match="none of the 50 exemplars"):
        index.only(first(50, 200)).only(~first(50, 200))
    for wrong in (torch.ones(199, dtype=torch.bool), torch.ones(200), torch.ones(200, 1, dtype=torch.bool)):
        with pytest.raises(OptionError, match="an index of 200 exemplars wants one bool for each"):
            index.only(wrong)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_zero_vector_is_at_right_angles_to_everything(backend: Backend) -> None:
    points = np.concatenate([np.zeros((2, 16), np.float32), clouds(30)])
    index = NeighborIndex.build(points, metric="cosine").to("cpu", backend=backend)
    queries = np.concatenate([np.zeros((1, 16), np.float32), clouds(3, seed=1)])
    found = ask(index, queries, 32)
    same(found, points, queries, 32, "cosine")
    assert (found.distances[0] == 1).all()
    assert found.ids[0].tolist() == list(range(32))
    differentiable = torch.from_numpy(queries).requires_grad_()
    index.distances(differentiable, found.ids).sum().backward()
    assert differentiable.grad is not None
    assert torch.isfinite(differentiable.grad).all()


def test_length_does_not_matter_to_the_cosine() -> None:
    points, queries = clouds(300), clouds(20, seed=1)
    lengths = np.exp(3 * clouds(300, 1, seed=2))
    usual = ask(NeighborIndex.build(points, metric="cosine"), queries, 10)
    scaled = ask(NeighborIndex.build(points * lengths, metric="cosine"), queries * 7, 10)
    assert torch.equal(scaled.ids, usual.ids)
    torch.testing.assert_close(scaled.distances, usual.distances, atol=1e-6, rtol=0)  # the scaled ones are rounded
    kept = NeighborIndex.build(points, metric="cosine").embeddings(torch.arange(300))
    assert torch.equal(kept, torch.from_numpy(points))


@pytest.mark.parametrize("factory", APPROXIMATE)
@pytest.mark.parametrize("metric", METRICS)
def test_approximate_indexes_answer_with_what_they_were_given(factory: str, metric: Metric) -> None:
    """True ids, true distances, nearest first, and not one from outside the part that is asked for."""
    points, queries = clouds(1200), clouds(30, seed=1)
    if factory == "LSH" and metric != "l2":
        with pytest.raises(OptionError, match="FAISS refuses the index 'LSH'"):
            NeighborIndex.build(points, factory=factory, metric=metric)
        with pytest.raises(OptionError, match="FAISS does not know the index 'LSH'"):
            NeighborIndex.check_factory(factory, 16, metric)
        return
    index = NeighborIndex.build(points, factory=factory, metric=metric)
    for keep in (torch.ones(1200, dtype=torch.bool), first(400, 1200), scattered(1200)):
        found = ask(index.only(keep), queries, 20)
        assert found.ids.shape == (30, 20)
        assert keep[found.ids].all()
        true = np.stack([oracle(points, q, metric)[i] for q, i in zip(queries, found.ids.numpy(), strict=True)])
        np.testing.assert_allclose(found.distances.numpy(), true, rtol=1e-12, atol=1e-12)
        assert (found.distances.diff(dim=1) >= 0).all()
        near, _ = brute_force(points, queries, 20, metric, keep.numpy())
        hits = np.mean([len(np.intersect1d(a, b)) for a, b in zip(near, found.ids.numpy(), strict=True)]) / 20
        assert hits > 0.25  # of 20 in 400 or more, chance would be below 0.05


def test_a_cell_without_an_allowed_exemplar_still_answers_with_allowed_ones() -> None:
    """The adversarial copies lie apart: the cell that the query falls into holds nothing that may be returned."""
    clean, adversarial = clouds(200), clouds(200, offset=50, seed=1)
    index = NeighborIndex.build(np.concatenate([clean, adversarial]), factory="IVF2,Flat").only(first(200, 400))
    same(ask(index, adversarial[:3], 5), clean, adversarial[:3], 5)


def test_a_cell_with_too_few_repeats_its_nearest_with_its_distance() -> None:
    points = np.concatenate([clouds(100), clouds(20, offset=50, seed=1)])
    found = ask(NeighborIndex.build(points, factory="IVF2,Flat"), points[-1:], 60)
    assert found.ids.shape == (1, 60)
    assert set(found.ids[0].tolist()) == set(range(100, 120))
    assert (found.ids[0, 20:] == 119).all()
    assert (found.distances[0, 20:] == 0).all()


@pytest.mark.parametrize("factory", ["auto", "IVF4,Flat"])
def test_an_index_sent_to_where_it_is_answers_the_same(factory: str) -> None:
    """An approximate index has only one way to search; an exact one has a second, for GPUs, that runs anywhere."""
    points, queries = clouds(3000, 64), clouds(20, 64, seed=1)
    index = NeighborIndex.build(points, factory=factory)
    expected = ask(index, queries, 50)
    for moved in (index.to("cpu"), index.to("cpu", backend="torch"), index.to("cpu", backend="torch").to("cpu")):
        found = ask(moved, queries, 50)
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.distances, expected.distances, rtol=1e-13, atol=0)
        assert moved.device == torch.device("cpu")
        assert len(moved.only(first(10, 3000))) == 10


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_those_of_the_search(metric: Metric, backend: Backend) -> None:
    points, queries = clouds(700, 33), clouds(9, 33, seed=1)
    index = NeighborIndex.build(points, metric=metric).to("cpu", backend=backend)
    found = ask(index, queries, 40)
    again = index.distances(torch.from_numpy(queries).requires_grad_(), found.ids)
    assert torch.equal(again.detach(), found.distances)
    assert again.requires_grad
    assert again.dtype == torch.float64
    of_a_part = index.only(first(5, 700)).distances(torch.from_numpy(queries), found.ids)
    assert torch.equal(of_a_part, found.distances)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_distances_are_finite_differences(monkeypatch: pytest.MonkeyPatch, metric: Metric) -> None:
    monkeypatch.setattr("mithridate.neighbor_points._CHUNK", 12)  # two vectors at a time
    index = NeighborIndex.build(clouds(40, 6), metric=metric)
    queries = torch.from_numpy(clouds(4, 6, seed=1)).double().requires_grad_()
    ids = torch.randint(40, (4, 7), generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda q: index.distances(q, ids), [queries])
    narrow = queries.detach().float().requires_grad_()
    index.distances(narrow, ids).sum().backward()
    index.distances(queries, ids).sum().backward()
    assert queries.grad is not None
    torch.testing.assert_close(narrow.grad, queries.grad.float())


def test_coarser_matrix_products_give_the_same_neighbours() -> None:
    """Where a caller lets float32 products be computed in bfloat16, only the proposals get worse."""
    points, queries = clouds(4000, 64, offset=10), clouds(16, 64, offset=10, seed=1)
    index = NeighborIndex.build(points)
    torch.set_float32_matmul_precision("medium")
    try:
        same(ask(index, queries, 30), points, queries, 30)
        same(ask(index.to("cpu", backend="torch"), queries, 30), points, queries, 30)
    finally:
        torch.set_float32_matmul_precision("highest")


def peak_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_memory_is_bounded_for_wide_embeddings(backend: Backend) -> None:
    """All candidates of all queries in float64 would be 285 MB."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("this system does not tell the peak of a process")
    points, queries = clouds(1000, 2048), torch.from_numpy(clouds(64, 2048, seed=1))
    index = NeighborIndex.build(points).to("cpu", backend=backend)
    few = queries[:2].clone().requires_grad_()
    index.distances(few, index.search(few, 256).ids).sum().backward()  # everything is loaded
    reset.write_text("5")  # the peak is now what is in use
    before = peak_megabytes()
    found = index.search(queries, 256)
    index.distances(queries.requires_grad_(), found.ids).sum().backward()
    assert peak_megabytes() - before < 130


@pytest.mark.parametrize("factory", ["nonsense", "", "IVF4", "PQ7", "Flat,,", "IVF5000,Flat"])
def test_what_faiss_refuses_is_an_option_error(factory: str) -> None:
    with pytest.raises(OptionError, match="FAISS refuses the index") as caught:
        NeighborIndex.build(clouds(600), factory=factory)
    assert repr(factory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_metric_is_an_option_error() -> None:
    with pytest.raises(OptionError, match="metric 'l1' is unknown; allowed: l2, cosine, ip"):
        NeighborIndex.build(clouds(60), metric="l1")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="metric 'l1' is unknown"):
        NeighborIndex.check_factory("auto", 16, "l1")  # type: ignore[arg-type]
    NeighborIndex.check_factory("auto", 16)
    NeighborIndex.check_factory("IVF4,Flat", 16, "cosine")


@pytest.mark.parametrize("factory", ["auto", "IVF4,Flat", "HNSW8"])
@pytest.mark.parametrize("metric", METRICS)
def test_a_file_gives_the_same_answers(tmp_path: Path, factory: str, metric: Metric) -> None:
    points, queries = clouds(500), clouds(20, seed=1)
    index = NeighborIndex.build(points, factory=factory, metric=metric)
    index.write(tmp_path / "index")
    read = NeighborIndex.read(tmp_path / "index", points, metric)
    assert read.metric == metric
    for keep in (torch.ones(500, dtype=torch.bool), first(90, 500), scattered(500)):
        assert torch.equal(ask(read.only(keep), queries, 9).ids, ask(index.only(keep), queries, 9).ids)
    ids = torch.tensor([[3, 1], [499, 3]])
    assert torch.equal(read.embeddings(ids), torch.from_numpy(points)[ids])
    assert resolve_factory("auto") == "Flat"
    by_faiss = faiss.read_index(str(tmp_path / "index"))  # FAISS itself reads it, and finds the same
    if factory == "auto":
        unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        _, found = by_faiss.search(unit if metric == "cosine" else queries, 9)
        assert np.array_equal(found, ask(read, queries, 9).ids.numpy())


def test_an_exact_index_written_again_is_the_same_file(tmp_path: Path) -> None:
    points = clouds(500)
    for metric in METRICS:
        index = NeighborIndex.build(points, metric=metric)
        index.write(tmp_path / "one")
        NeighborIndex.read(tmp_path / "one", points, metric).only(first(9, 500)).write(tmp_path / "two")
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_index_of_other_embeddings_is_refused(tmp_path: Path) -> None:
    NeighborIndex.build(clouds(50)).write(tmp_path / "index")
    with pytest.raises(BundleError, match="50 vectors of 16 numbers, the embeddings are 49 of 16"):
        NeighborIndex.read(tmp_path / "index", clouds(49))
    with pytest.raises(BundleError, match="50 vectors of 16 numbers, the embeddings are 50 of 17"):
        NeighborIndex.read(tmp_path / "index", clouds(50, 17))


@pytest.mark.parametrize("factory", ["auto", "IVF4,Flat"])
def test_an_index_of_another_metric_is_refused(tmp_path: Path, factory: str) -> None:
    NeighborIndex.build(clouds(50), factory=factory).write(tmp_path / "index")
    with pytest.raises(BundleError, match="not made for the metric 'cosine'"):
        NeighborIndex.read(tmp_path / "index", clouds(50), "cosine")


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
