"""Exact nearest neighbours without comparing everything in float64.

Scores in float32, from one matrix product, propose a few candidates more than are asked for; float64 decides among
them; and a bound on the rounding of the scores says whether any other exemplar could still belong to the answer. Where
one could (many equal distances, or points far from the origin), all that come within the bound are decided in float64
as well. So the answer is that of a float64 search through everything, ties by id, whatever the batch, the BLAS or the
device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mithridate.faiss_gpu import MOST_ON_GPU, knn_on_gpu
from mithridate.neighbor_points import Points, normalised

Allowed = slice | torch.Tensor
"""Which exemplars may be found: a range with both ends, or ids int64 ``[A]`` in ascending order."""

_SCORES, _DEVICE_SCORES = 1 << 21, 1 << 27
"""float32 scores held at once, on a CPU (some stay in its cache) and on a GPU."""

_GROUP = 8


def nearest(points: Points, allowed: Allowed, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 and distances float64, both ``[B, k]``: the ``k`` nearest of ``allowed``, nearest first.

    There must be ``k``.
    ``queries`` float32 ``[B, D]`` on the device of ``points``.
    """
    if k == 0 or len(queries) == 0:
        nothing = queries.new_empty(len(queries), k, dtype=torch.float64)
        return nothing.long(), nothing
    found, reach = _propose(points, allowed, queries, min(count_allowed(allowed), k + max(8, k // 16)))
    ids, distances = decide(points, queries, found, k)
    offset, error = _offset_and_error(points, queries)
    sure = distances[:, -1] < reach.double() + offset - error  # nothing that was not proposed is as near
    if not bool(sure.all()):  # the one flag that a GPU sends back
        for row in (~sure).nonzero()[:, 0].tolist():
            query = queries[row : row + 1]
            wider = _within(points, allowed, query, distances[row, -1] - offset[row] + error[row])
            (ids[row],), (distances[row],) = decide(points, query, wider[None], k)
    return ids, distances


def decide(points: Points, queries: torch.Tensor, found: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``k`` of the exemplars ``found`` int64 ``[B, M]``, in any order, by distance and then by id.

    The id -1 stands for none, and comes last with an infinite distance.
    """
    if points.backend != "numpy":
        found = found.sort(dim=1).values
        distances, order = points.distances(queries, found).sort(dim=1, stable=True)
        return found.gather(1, order[:, :k]), distances[:, :k]
    by_id = torch.from_numpy(np.sort(found.numpy(), axis=1))
    away = points.distances(queries, by_id)
    order = torch.from_numpy(np.argsort(away.numpy(), axis=1))
    ranked = away.gather(1, order)
    if bool((ranked[:, 1:] == ranked[:, :-1]).any()):  # ties are rare, and a stable sort takes three times as long
        order = torch.from_numpy(np.argsort(away.numpy(), axis=1, kind="stable"))
    return by_id.gather(1, order[:, :k]), ranked[:, :k].contiguous()


def count_allowed(allowed: Allowed) -> int:
    """How many exemplars may be found."""
    return int(allowed.stop - allowed.start) if isinstance(allowed, slice) else len(allowed)


def _propose(points: Points, allowed: Allowed, queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[B, count]`` of the least scores, and a score ``[B]`` that all other exemplars reach or exceed."""
    if count == count_allowed(allowed):  # there are no others
        everything = torch.arange(count, device=points.device).expand(len(queries), -1)
        return _ids(allowed, everything), queries.new_full((len(queries),), torch.inf)
    if points.backend == "faiss" and points.metric == "l2" and isinstance(allowed, slice) and count <= MOST_ON_GPU:
        distances, positions = knn_on_gpu(points.vectors[allowed], queries, count)
        return _ids(allowed, positions), distances.double().amax(1) - _offset_and_error(points, queries)[0]
    directions = _directions(points, queries)
    least, where = torch.empty(0), torch.empty(0)
    for start, rows in _blocks(points, allowed, len(queries), count):
        scores = _scores(points, directions, rows)
        if points.backend == "numpy":
            here = _least(scores, count, least.amax(1, keepdim=True) if start else None)
        else:
            here = _partition(scores, count)
        best, positions = scores.gather(1, here), here + start
        if start:
            best, positions = torch.cat([least, best], 1), torch.cat([where, positions], 1)
            kept = _partition(best, count)
            best, positions = best.gather(1, kept), positions.gather(1, kept)
        least, where = best, positions
    return _ids(allowed, where), least.amax(1)


def _within(points: Points, allowed: Allowed, query: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Ids ``[M]`` of all exemplars whose score of the one ``query`` ``[1, D]`` is not above ``limit``."""
    directions = _directions(points, query)
    found = []
    for start, rows in _blocks(points, allowed, 1, 0):
        above = _scores(points, directions, rows)[0].double() > limit  # not so what is not a number
        found.append((~above).nonzero()[:, 0] + start)
    return _ids(allowed, torch.cat(found))


def _directions(points: Points, queries: torch.Tensor) -> torch.Tensor:
    """float32 ``[B, D]``: what the vectors are multiplied with to score them."""
    if points.metric == "cosine":
        return normalised(queries.double()).float().neg_()
    return queries * (-2 if points.metric == "l2" else -1)


def _scores(points: Points, directions: torch.Tensor, rows: Allowed) -> torch.Tensor:
    """float32 ``[B, rows]``: distances, but for rounding and for the ``_offset`` of each query."""
    if isinstance(rows, slice):
        vectors, weights = points.vectors[rows], points.weights[rows]  # views
    else:
        vectors, weights = points.vectors.index_select(0, rows), points.weights.index_select(0, rows)
    if points.metric == "l2":
        return torch.addmm(weights, directions, vectors.T)  # |x|^2 - 2 qx
    products = directions @ vectors.T
    return products.mul_(weights) if points.metric == "cosine" else products


def _offset_and_error(points: Points, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 ``[B]`` twice: what makes a score a distance, and what no score is off by more than.

    A float32 dot product of D terms, added up in any order, is off by at most D u |q| |x| with u = 2^-24 (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1); the other steps by a few u of what they add up.
    """
    unit, largest = 2.0**-24, points.largest
    product = (points.vectors.shape[1] + 8) * unit + 2 * _input_rounding(points.device)
    squares = queries.double().square().sum(1)
    if points.metric == "cosine":
        return torch.ones_like(squares), torch.full_like(squares, 2 * product)
    if points.metric == "ip":
        return torch.zeros_like(squares), squares.sqrt() * (largest * product)
    return squares, squares.sqrt() * (2 * largest * product) + (squares + largest**2) * (4 * unit)


def _input_rounding(device: torch.device) -> float:
    """How much a matrix product may round its inputs first, where float32 has been allowed to be less than it is."""
    settings: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return {"tf32": 2.0**-11, "bf16": 2.0**-8}.get(settings.matmul.fp32_precision, 0.0)


def _least(scores: torch.Tensor, count: int, ceiling: torch.Tensor | None) -> torch.Tensor:
    """Where the ``count`` least of each row of ``scores`` ``[B, N]`` are; at least those below ``ceiling`` ``[B, 1]``.

    The ``count`` least numbers lie in the ``count`` groups with the least minima, and minima are cheap to find.
    """
    height, width = scores.shape
    groups = width // _GROUP
    minima = scores[:, : groups * _GROUP].view(height, _GROUP, groups).amin(1)
    wanted = count if ceiling is None else min(count, int((minima < ceiling).sum(1).amax()))
    if 2 * wanted > groups:
        return _partition(scores, count)
    inside = _partition(minima, wanted)[:, None] + torch.arange(0, groups * _GROUP, groups)[:, None]  # [B, 8, wanted]
    rest = torch.arange(groups * _GROUP, width).expand(height, -1)
    candidates = torch.cat([inside.view(height, -1), rest], 1)
    return candidates.gather(1, _partition(scores.gather(1, candidates), count))


def _partition(values: torch.Tensor, count: int) -> torch.Tensor:
    """Where the ``count`` least of each row are, or all where there are fewer; in no particular order."""
    height, width = values.shape
    if count >= width or count == 0:
        return torch.arange(min(count, width), device=values.device).expand(height, -1)
    if values.device.type != "cpu":
        return values.topk(count, dim=1, largest=False, sorted=False).indices
    return torch.from_numpy(
        np.argpartition(values.numpy(), count - 1, axis=1)[:, :count]
    )  # three times as fast as topk


def _ids(allowed: Allowed, positions: torch.Tensor) -> torch.Tensor:
    return positions + allowed.start if isinstance(allowed, slice) else allowed[positions]


def _blocks(points: Points, allowed: Allowed, queries: int, count: int) -> Iterator[tuple[int, Allowed]]:
    """``allowed`` in parts of which all scores fit into a bounded memory, each with the position of its first."""
    most = _SCORES if points.device.type == "cpu" else _DEVICE_SCORES
    size = max(1024, 2 * count, most // queries)
    if not isinstance(allowed, slice):  # copies of the vectors count too
        size = max(1024, min(size, most // points.vectors.shape[1]))
    available = count_allowed(allowed)
    for start in range(0, available, size):
        stop = min(start + size, available)
        if isinstance(allowed, slice):
            yield start, slice(allowed.start + start, allowed.start + stop)
        else:
            yield start, allowed[start:stop]
