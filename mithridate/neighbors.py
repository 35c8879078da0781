"""Nearest neighbours among the exemplars' embeddings."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.errors import BundleError, OptionError
from mithridate.faiss_gpu import has_faiss_gpu
from mithridate.neighbor_points import Backend, Distances, Metric, Points, normalised
from mithridate.neighbor_search import Allowed, count_allowed, decide, nearest
from mithridate.types import Embeddings

__all__ = [
    "AUTO",
    "METRICS",
    "Backend",
    "Metric",
    "NeighborIndex",
    "Neighbors",
    "resolve_factory",
    "set_search_threads",
]

AUTO = "auto"
METRICS: tuple[Metric, ...] = ("l2", "cosine", "ip")


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """The K nearest exemplars of each query, nearest first.

    ``ids`` int64 and ``distances`` float64, both ``[B, K]`` on the index's device; smaller is nearer.
    """

    ids: torch.Tensor
    distances: torch.Tensor


class NeighborIndex:
    """Finds the exemplars nearest to an embedding, by ``metric``.

    ``l2``: squared Euclidean distance; ``cosine``: 1 - cosine, and 1 where a vector is zero; ``ip``: minus the inner
    product. Distances are float64 and ties go by id, so the neighbours of a query do not depend on which queries are
    beside it. An index that FAISS calls ``Flat`` is exact, and needs no more memory than the embeddings it is given.
    With any other, FAISS proposes and exact distances rank; it stays on the CPU.
    """

    def __init__(self, index: Any, embeddings: NDArray[np.float32], *, metric: Metric = "l2") -> None:
        if index.ntotal != len(embeddings) or index.d != embeddings.shape[1]:
            raise BundleError(
                f"the index holds {index.ntotal} vectors of {index.d} numbers, "
                f"the embeddings are {len(embeddings)} of {embeddings.shape[1]}"
            )
        if index.metric_type != _faiss_metric(metric):
            raise BundleError(f"the index was not made for the metric {metric!r}")
        self._points = Points.of(embeddings, metric)
        # An exact index holds nothing but a copy of the embeddings, so it is let go.
        self._index = None if isinstance(index, faiss.IndexFlat) else index
        self._allowed: Allowed = slice(0, len(embeddings))
        self._selector: Any = None
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        """How many exemplars it may find."""
        return count_allowed(self._allowed)

    @property
    def metric(self) -> Metric:
        """``l2``, ``cosine`` or ``ip``."""
        return self._points.metric

    @property
    def device(self) -> torch.device:
        """Where the answers are."""
        return self._device

    @classmethod
    def build(
        cls, embeddings: NDArray[np.float32], *, factory: str = AUTO, metric: Metric = "l2", probes: int = 1
    ) -> NeighborIndex:
        """Trains and fills an index. ``factory`` is a FAISS factory string, or ``auto`` (exact, ``Flat``). ``probes``:
        how many cells a search looks into, where the index has cells.

        Raises OptionError for a factory that FAISS refuses, and for an unknown metric.
        """
        try:
            index = faiss.index_factory(embeddings.shape[1], resolve_factory(factory), _faiss_metric(metric))
            vectors = _vectors_for_faiss(embeddings, metric)
            index.train(vectors)
            index.add(vectors)
            if isinstance(index, faiss.IndexIVF):
                index.nprobe = probes
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise OptionError(f"FAISS refuses the index {factory!r} for {embeddings.shape}: {reason}") from error
        return cls(index, embeddings, metric=metric)

    @staticmethod
    def check_factory(factory: str, dimension: int, metric: Metric = "l2") -> None:
        """Raises OptionError for a factory string that FAISS refuses, and for an unknown metric."""
        try:
            faiss.index_factory(dimension, resolve_factory(factory), _faiss_metric(metric))
        except RuntimeError as error:
            raise OptionError(
                f"FAISS does not know the index {factory!r}; allowed: auto, Flat, IVF64,Flat ..."
            ) from error

    @classmethod
    def read(cls, path: Path, embeddings: NDArray[np.float32], metric: Metric = "l2") -> NeighborIndex:
        """Reads an index whose digest has been checked. Raises BundleError where it does not fit the embeddings."""
        try:
            return cls(faiss.read_index(str(path)), embeddings, metric=metric)
        except RuntimeError as error:
            raise BundleError(f"{path} is not a FAISS index") from error

    def write(self, path: Path) -> None:
        """Writes the index file, of all exemplars. Raises OSError where the disk refuses."""
        index = self._index
        if index is None:
            embeddings = self._points.vectors.cpu().numpy()
            index = faiss.IndexFlat(embeddings.shape[1], _faiss_metric(self.metric))
            index.add(_vectors_for_faiss(embeddings, self.metric))
        # Not by FAISS itself: an error in its last buffer goes to stderr, and the file is short.
        with path.open("wb") as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))

    def to(self, device: str | torch.device, *, backend: Backend | None = None) -> NeighborIndex:
        """The same index, answering on ``device``.

        An exact index is searched there, its embeddings resident, by faiss-gpu where that is installed and otherwise by
        torch; ``backend`` forces one. An approximate index is searched on the CPU, and only its answers travel.
        """
        moved = copy.copy(self)
        moved._device = torch.device(device)
        if self._index is not None:
            return moved
        if backend is None:
            on_gpu: Backend = "faiss" if has_faiss_gpu() else "torch"
            backend = "numpy" if moved._device.type == "cpu" else on_gpu
        moved._points = self._points.to(moved._device, backend)
        if isinstance(self._allowed, torch.Tensor):
            moved._allowed = self._allowed.to(moved._device)
        return moved

    def only(self, keep: torch.Tensor) -> NeighborIndex:
        """A view that finds only exemplars for which ``keep`` bool ``[E]`` is True, with the same ids and arrays.

        Of a view, what both allow. Raises OptionError where that is none.
        """
        total = len(self._points.vectors)
        if keep.shape != (total,) or keep.dtype != torch.bool:
            raise OptionError(
                f"an index of {total} exemplars wants one bool for each, not {keep.dtype} {list(keep.shape)}"
            )
        here = torch.zeros(total, dtype=torch.bool, device=self._points.device)
        here[self._allowed] = keep.to(here.device)[self._allowed]
        ids = here.nonzero()[:, 0]
        if not len(ids):
            raise OptionError(f"none of the {len(self)} exemplars is left to search among")
        view = copy.copy(self)
        first, last = int(ids[0]), int(ids[-1])
        view._allowed = slice(first, last + 1) if last - first + 1 == len(ids) else ids
        if self._index is not None:
            view._selector = _selector(view._allowed, here)
        return view

    def embeddings(self, ids: torch.Tensor) -> Embeddings:
        """float32 ``[..., D]`` of the exemplars ``ids`` ``[...]``, as they were given, on the index's device."""
        return self._points.vectors[ids.to(self._points.device)].to(self._device)

    def distances(self, queries: Embeddings, ids: torch.Tensor) -> torch.Tensor:
        """float64 ``[B, K]``: what ``search`` says of ``queries`` ``[B, D]`` and the exemplars ``ids`` ``[B, K]``.

        Differentiable once in ``queries``, and on their device.
        """
        there = self._points.device
        distances: torch.Tensor = Distances.apply(queries.double().to(there), self._points, ids.to(there))
        return distances.to(queries.device)

    def search(self, queries: Embeddings, k: int) -> Neighbors:
        """The ``k`` exemplars nearest to each of ``queries`` ``[B, D]``; fewer only where there are fewer."""
        there, k = self._points.device, min(k, len(self))
        points = queries.detach().to(there, torch.float32).contiguous()
        if self._index is None:
            ids, distances = nearest(self._points, self._allowed, points, k)
        else:
            ids, distances = self._search_by_faiss(points, k)
        return Neighbors(ids=ids.to(self._device), distances=distances.to(self._device))

    def _search_by_faiss(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._propose_by_faiss(queries, min(len(self), k + max(8, k // 16)))
        if found is None:  # PQ, LSH and others cannot search a part of themselves
            return nearest(self._points, self._allowed, queries, k)
        ids, distances = decide(self._points, queries, found, k)
        lost = (found < 0).all(1)  # no cell that was looked into holds anything of what is allowed
        if lost.any():
            ids[lost], distances[lost] = nearest(self._points, self._allowed, queries[lost], k)
        missing = ids < 0  # it found fewer
        if missing.any():  # repeat the nearest rather than invent a neighbour
            ids = torch.where(missing, ids[:, :1], ids)
            distances = torch.where(missing, distances[:, :1], distances)
        return ids, distances

    def _propose_by_faiss(self, queries: torch.Tensor, count: int) -> torch.Tensor | None:
        """Ids int64 ``[B, count]`` in no particular order, -1 where there are fewer; None where it cannot be asked."""
        assert self._index is not None
        try:
            _, found = self._index.search(queries.numpy(), count, params=self._parameters())
        except RuntimeError:
            if self._selector is None:
                raise
            return None
        return torch.from_numpy(found)

    def _parameters(self) -> Any:
        if self._selector is None:
            return None
        if isinstance(self._index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(sel=self._selector, nprobe=self._index.nprobe)
        if isinstance(self._index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(sel=self._selector, efSearch=self._index.hnsw.efSearch)
        return faiss.SearchParameters(sel=self._selector)


def resolve_factory(factory: str) -> str:
    """``auto`` to the factory string it stands for: exact search."""
    return "Flat" if factory == AUTO else factory


def set_search_threads(count: int) -> None:
    """How many threads FAISS may use, in this process."""
    faiss.omp_set_num_threads(count)


def _faiss_metric(metric: str) -> int:
    if metric not in METRICS:
        raise OptionError(f"metric {metric!r} is unknown; allowed: {', '.join(METRICS)}")
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def _vectors_for_faiss(embeddings: NDArray[np.float32], metric: Metric) -> NDArray[np.float32]:
    if metric != "cosine":
        return embeddings
    out = np.empty_like(embeddings)
    for start in range(0, len(out), 4096):
        out[start : start + 4096] = normalised(torch.from_numpy(embeddings[start : start + 4096]).double()).numpy()
    return out


def _selector(allowed: Allowed, keep: torch.Tensor) -> Any:
    if isinstance(allowed, slice):
        return faiss.IDSelectorRange(allowed.start, allowed.stop)
    return faiss.IDSelectorBitmap(np.packbits(keep.numpy(), bitorder="little"))
