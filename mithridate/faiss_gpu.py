"""Exact proposals by FAISS on a GPU, where its GPU build is installed."""

from __future__ import annotations

import threading
from typing import Any

import faiss
import torch

MOST_ON_GPU = 2048
"""How many neighbours its selection can hold."""

_THREAD = threading.local()


def has_faiss_gpu() -> bool:
    """Whether this FAISS was built for GPUs."""
    return hasattr(faiss, "StandardGpuResources")


def knn_on_gpu(vectors: torch.Tensor, queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances float32 and positions int64, both ``[B, count]``, nearest first, on the device of both inputs.

    On the current stream of torch, without a copy to the host.
    """
    import faiss.contrib.torch_utils  # only now: it changes FAISS for the whole process

    with torch.cuda.device(vectors.device):
        distances, positions = faiss.knn_gpu(
            _resources(), queries.contiguous(), vectors, count, metric=faiss.METRIC_L2, device=vectors.device.index
        )
    return distances, positions


def _resources() -> Any:
    """One object per thread: FAISS allows no two threads to use one at the same time."""
    if not hasattr(_THREAD, "resources"):
        _THREAD.resources = faiss.StandardGpuResources()
    return _THREAD.resources
