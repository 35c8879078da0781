"""The vectors that neighbours are searched among, and their exact distances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

Metric = Literal["l2", "cosine", "ip"]
Backend = Literal["numpy", "torch", "faiss"]

_CHUNK = 1 << 16
"""float64 numbers worked on at once: they stay in a core's cache."""

_TORCH_CHUNK = 1 << 21
"""The same for torch, for which starting costs more: 16 MB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """Embeddings, and what every search needs of them.

    ``vectors`` float32 ``[E, D]``, not copied; ``norms`` float64 ``[E]``, their Euclidean lengths, and the ``largest``;
    ``weights`` float32 ``[E]``: squared lengths, or for cosine 1 / length. ``backend`` says what computes: ``numpy``
    on the CPU, ``torch`` anywhere, ``faiss`` on a GPU.
    """

    vectors: torch.Tensor
    norms: torch.Tensor
    weights: torch.Tensor
    largest: float
    metric: Metric
    backend: Backend = "numpy"

    @classmethod
    def of(cls, embeddings: NDArray[np.float32], metric: Metric) -> Points:
        """Reads ``embeddings`` ``[E, D]`` once, and leaves them where they are."""
        norms = np.empty(len(embeddings))
        rows = max(1, _CHUNK // embeddings.shape[1])
        for start in range(0, len(embeddings), rows):
            wide = embeddings[start : start + rows].astype(np.float64)
            norms[start : start + rows] = np.sqrt(np.vecdot(wide, wide))
        if metric == "cosine":
            weights = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
        else:
            weights = np.square(norms)
        return cls(
            vectors=torch.from_numpy(embeddings),
            norms=torch.from_numpy(norms),
            weights=torch.from_numpy(weights.astype(np.float32)),
            largest=float(norms.max(initial=0)),
            metric=metric,
        )

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.vectors.device

    def to(self, device: torch.device, backend: Backend) -> Points:
        """The same on ``device``; nothing is copied that is there already."""
        return replace(
            self,
            vectors=self.vectors.to(device),
            norms=self.norms.to(device),
            weights=self.weights.to(device),
            backend=backend,
        )

    def distances(self, queries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """float64 ``[B, M]`` from ``queries`` float ``[B, D]`` to ``ids`` ``[B, M]``; infinite for the id -1.

        Everything on the device of the vectors. A distance does not depend on what else is asked for. Without gradient.
        """
        wide = queries.detach().double()
        if self.metric == "cosine":
            wide = normalised(wide)
        if self.backend == "numpy":
            out = torch.from_numpy(self._distances_numpy(wide.numpy(), ids.numpy()))
        else:
            out = self._distances_torch(wide, ids)
        if self.metric == "cosine":  # half of |x - q|^2 of unit vectors; but zero is at right angles to everything
            out.masked_fill_(~wide.any(1)[:, None] | (self.norms[ids] == 0), 1.0)
        return out.masked_fill_(ids < 0, torch.inf)

    def weighted_sums(self, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """float64 ``[B, D]``: for each row the vectors ``ids`` ``[B, M]`` times ``weights`` float64 ``[B, M]``."""
        if self.metric == "cosine":
            norms = self.norms[ids]
            weights = weights / torch.where(norms > 0, norms, 1)
        out = weights.new_zeros(len(ids), self.vectors.shape[1])
        for rows, columns in self._chunks(*ids.shape):
            out[rows] += (weights[rows, None, columns] @ self.vectors[ids[rows, columns]].double())[:, 0]
        return out

    def _distances_numpy(self, queries: NDArray[np.float64], ids: NDArray[np.int64]) -> NDArray[np.float64]:
        # numpy: it has a fused dot product for every row, which torch has not. One core: cores are for other requests.
        vectors, norms = self.vectors.numpy(), self.norms.numpy()
        out = np.empty(ids.shape)
        for rows, columns in self._chunks(*ids.shape):
            here, query = ids[rows, columns], queries[rows, np.newaxis]
            wide = np.take(vectors, here, axis=0, mode="clip").astype(
                np.float64
            )  # [rows, columns, D]; -1 reads any row
            if self.metric == "ip":
                np.negative(np.vecdot(wide, query), out=out[rows, columns])
                continue
            if self.metric == "cosine":
                wide /= np.where(norms[here] > 0, norms[here], 1)[..., np.newaxis]
            wide -= query
            np.vecdot(wide, wide, out=out[rows, columns])
        return np.multiply(out, 0.5, out=out) if self.metric == "cosine" else out

    def _distances_torch(self, queries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = queries.new_empty(ids.shape)
        for rows, columns in self._chunks(*ids.shape):
            here, query = ids[rows, columns].clamp_min(0), queries[rows, None]
            wide = self.vectors[here].double()  # [rows, columns, D]
            if self.metric == "ip":
                out[rows, columns] = wide.mul_(query).sum(-1).neg_()
                continue
            if self.metric == "cosine":
                norms = self.norms[here]
                wide /= torch.where(norms > 0, norms, 1)[..., None]
            out[rows, columns] = wide.sub_(query).square_().sum(-1)
        return out.mul_(0.5) if self.metric == "cosine" else out

    def _chunks(self, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        """Parts of ``[rows, columns]`` vectors that are small enough to work on at once."""
        budget = (_CHUNK if self.backend == "numpy" else _TORCH_CHUNK) // self.vectors.shape[1]
        wide = max(1, min(columns, budget))
        tall = max(1, budget // wide)
        for top in range(0, rows, tall):
            for left in range(0, columns, wide):
                yield slice(top, top + tall), slice(left, left + wide)


class Distances(torch.autograd.Function):
    """``Points.distances`` with its gradient in the queries: neither direction holds all vectors in memory at once."""

    @staticmethod
    def forward(ctx: Any, queries: torch.Tensor, points: Points, ids: torch.Tensor) -> torch.Tensor:
        """For float64 ``queries``."""
        ctx.save_for_backward(queries, ids)
        ctx.points = points
        return points.distances(queries, ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Of l2: 2 (q - x); of ip: -x; of cosine: -x of unit length, without its part along q, over the length of q."""
        queries, ids = ctx.saved_tensors
        sums = ctx.points.weighted_sums(gradient, ids)
        if ctx.points.metric == "l2":
            return 2 * (queries * gradient.sum(1, keepdim=True) - sums), None, None
        if ctx.points.metric == "ip":
            return -sums, None, None
        directions = normalised(queries)
        across = sums - directions * (directions * sums).sum(1, keepdim=True)
        return -across / _lengths(queries), None, None


def normalised(vectors: torch.Tensor) -> torch.Tensor:
    """Float ``[..., D]`` at length 1; zero stays zero."""
    return vectors / _lengths(vectors)


def _lengths(vectors: torch.Tensor) -> torch.Tensor:
    lengths = vectors.square().sum(-1, keepdim=True).sqrt()
    return torch.where(lengths > 0, lengths, 1)
