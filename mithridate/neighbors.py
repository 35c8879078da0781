"""Nearest neighbours among the exemplars' embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.errors import BundleError, OptionError
from mithridate.types import Embeddings

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """The K nearest exemplars of each query, nearest first.

    ``ids`` int64 ``[B, K]`` and squared Euclidean ``distances`` float64 ``[B, K]``, both on the CPU.
    """

    ids: torch.Tensor
    distances: torch.Tensor


class NeighborIndex:
    """A FAISS index and the embeddings it was made from.

    FAISS proposes, exact arithmetic decides: a few more candidates than asked for are fetched, their distances computed
    again in float64, and ties broken by id. So the neighbours of a query do not depend on which queries are beside it
    (FAISS computes distances differently, with other rounding, for large batches).
    """

    def __init__(self, index: Any, embeddings: NDArray[np.float32]) -> None:
        if index.ntotal != len(embeddings) or index.d != embeddings.shape[1]:
            raise BundleError(
                f"the index holds {index.ntotal} vectors of {index.d} numbers, "
                f"the embeddings are {len(embeddings)} of {embeddings.shape[1]}"
            )
        self._index = index
        self._embeddings = torch.from_numpy(embeddings)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @classmethod
    def build(cls, embeddings: NDArray[np.float32], *, factory: str = AUTO) -> NeighborIndex:
        """Trains and fills an index. ``factory`` is a FAISS factory string, or ``auto`` (exact, ``Flat``).

        Raises OptionError for a factory that FAISS refuses.
        """
        try:
            index = faiss.index_factory(embeddings.shape[1], resolve_factory(factory), faiss.METRIC_L2)
            index.train(embeddings)
            index.add(embeddings)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise OptionError(f"FAISS refuses the index {factory!r} for {embeddings.shape}: {reason}") from error
        return cls(index, embeddings)

    @staticmethod
    def check_factory(factory: str, dimension: int) -> None:
        """Raises OptionError for a factory string that FAISS refuses."""
        try:
            faiss.index_factory(dimension, resolve_factory(factory), faiss.METRIC_L2)
        except RuntimeError as error:
            raise OptionError(
                f"FAISS does not know the index {factory!r}; allowed: auto, Flat, IVF64,Flat ..."
            ) from error

    @classmethod
    def read(cls, path: Path, embeddings: NDArray[np.float32]) -> NeighborIndex:
        """Reads an index whose digest has been checked. Raises BundleError where it does not fit the embeddings."""
        try:
            return cls(faiss.read_index(str(path)), embeddings)
        except RuntimeError as error:
            raise BundleError(f"{path} is not a FAISS index") from error

    def write(self, path: Path) -> None:
        """Writes the index file. Raises OSError where the disk refuses."""
        # Not by FAISS itself: an error in its last buffer goes to stderr, and the file is short.
        with path.open("wb") as file:
            faiss.write_index(self._index, faiss.PyCallbackIOWriter(file.write))

    def embeddings(self, ids: torch.Tensor) -> Embeddings:
        """float32 ``[..., D]`` of the exemplars ``ids`` ``[...]``."""
        return self._embeddings[ids]

    def search(self, queries: Embeddings, k: int, *, among_first: int | None = None) -> Neighbors:
        """The ``k`` exemplars nearest to each of ``queries`` ``[B, D]``; fewer only where there are fewer.

        ``among_first`` restricts the search to the exemplars with an id below it (the clean ones come first).
        """
        available = min(len(self), among_first) if among_first is not None else len(self)
        k = min(k, available)
        candidates = min(available, k + max(8, k // 16))
        points = np.ascontiguousarray(queries.detach().cpu().numpy(), dtype=np.float32)
        found = self._propose(points, candidates, among_first=available)
        return self._exact(torch.from_numpy(points), torch.from_numpy(found), k)

    def _propose(self, points: NDArray[np.float32], count: int, *, among_first: int) -> NDArray[np.int64]:
        """Ids int64 ``[B, count]`` in no particular order; -1 where an approximate index found fewer."""
        allowed = self._embeddings[:among_first].numpy()
        restricted = among_first < len(self)
        found: NDArray[np.int64]
        try:
            _, found = self._index.search(points, count, params=self._restricted(among_first) if restricted else None)
        except RuntimeError:
            if not restricted:
                raise
            _, found = faiss.knn(points, allowed, count)  # PQ, LSH and others cannot search a part of themselves
        lost = (found < 0).all(axis=1)  # no cell that was looked into holds anything of what is allowed
        if lost.any():
            _, found[lost] = faiss.knn(points[lost], allowed, count)
        return found

    def _exact(self, queries: torch.Tensor, found: torch.Tensor, k: int) -> Neighbors:
        found = found.sort(dim=1).values  # by id, so that the stable sort below breaks ties by id
        offsets = self._embeddings[found.clamp_min(0)].double() - queries.double()[:, None]  # [B, candidates, D]
        distances = offsets.square_().sum(-1).masked_fill_(found < 0, torch.inf)  # -1: an approximate index found fewer
        distances, order = distances.sort(dim=1, stable=True)
        ids, distances = found.gather(1, order)[:, :k], distances[:, :k]
        missing = ids < 0
        if missing.any():  # repeat the nearest rather than invent a neighbour
            ids = torch.where(missing, ids[:, :1], ids)
            distances = torch.where(missing, distances[:, :1], distances)
        return Neighbors(ids=ids, distances=distances)

    def _restricted(self, stop: int) -> Any:
        selector = faiss.IDSelectorRange(0, stop)
        if isinstance(self._index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(sel=selector, nprobe=self._index.nprobe)
        if isinstance(self._index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(sel=selector, efSearch=self._index.hnsw.efSearch)
        return faiss.SearchParameters(sel=selector)


def resolve_factory(factory: str) -> str:
    """``auto`` to the factory string it stands for: exact search."""
    return "Flat" if factory == AUTO else factory


def set_search_threads(count: int) -> None:
    """How many threads FAISS may use, in this process."""
    faiss.omp_set_num_threads(count)
