"""The exemplars: every training image and its adversarial copies, memory-mapped."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.errors import BundleError

CLEAN = "clean"
THROUGH = "-at-"
"""In the name of a copy whose attack went through a defence: ``pgd10-at-rmc``."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How exemplars are numbered and stored.

    ``copies`` are the clean images and then one name an attack. Exemplar ``copy * sources + source`` is copy number
    ``copy`` of training image ``source``; each copy lies in shards of ``shard_size`` rows, the last one shorter.
    """

    sources: int
    copies: tuple[str, ...]
    shard_size: int

    def __len__(self) -> int:
        return self.sources * len(self.copies)

    @property
    def shards(self) -> Iterator[tuple[int, int]]:
        """All (copy, shard) numbers, in the order of the exemplars."""
        return ((copy, shard) for copy in range(len(self.copies)) for shard in range(self.shards_per_copy))

    @property
    def shards_per_copy(self) -> int:
        return -(-self.sources // self.shard_size)

    def rows(self, shard: int) -> slice:
        """The sources in shard number ``shard`` of any copy."""
        return slice(shard * self.shard_size, min((shard + 1) * self.shard_size, self.sources))

    def shard_path(self, copy: int, shard: int) -> str:
        """Relative to the bundle."""
        return f"exemplars/{self.copies[copy]}-{shard:05d}.npy"


class ExemplarStore:
    """Reads exemplars from an opened bundle. Nothing is copied but the rows that are asked for.

    ``shards`` uint8 ``[rows, C, H, W]`` in the order of the layout, ``labels`` int64 ``[sources]`` (true labels),
    ``features`` float32 ``[E, D']`` (inputs of the head), ``predictions`` int32 ``[E]`` (what the base model says),
    ``activations`` float16 ``[E, ...]`` (inputs of the tail), None where the bundle stores none.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        shards: Sequence[NDArray[np.uint8]],
        labels: NDArray[np.int64],
        features: NDArray[np.float32],
        predictions: NDArray[np.int32],
        activations: NDArray[np.float16] | None = None,
    ) -> None:
        self.layout = layout
        self.labels = torch.from_numpy(np.tile(labels, len(layout.copies)))
        self.features = torch.from_numpy(features)
        self.predictions = torch.from_numpy(predictions)
        self.activations = None if activations is None else torch.from_numpy(activations)
        self._shards = shards

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def clean_count(self) -> int:
        """Exemplars below this id are clean, the others adversarial."""
        return self.layout.sources

    def to(self, device: str | torch.device) -> ExemplarStore:
        """The same exemplars with ``labels`` and ``features`` resident on ``device``.

        Pixels, predictions and activations stay memory-mapped on the CPU.
        """
        moved = copy.copy(self)
        moved.labels, moved.features = self.labels.to(device), self.features.to(device)
        return moved

    def gather_features(self, ids: torch.Tensor, device: str | torch.device = "cpu") -> torch.Tensor:
        """float32 ``[..., D']`` of the exemplars ``ids`` int64 ``[...]``, on ``device``."""
        return _gather(self.features, ids, torch.device(device))

    def gather_labels(self, ids: torch.Tensor, device: str | torch.device = "cpu") -> torch.Tensor:
        """int64 ``[...]``, the true labels of the exemplars ``ids`` int64 ``[...]``, on ``device``."""
        return _gather(self.labels, ids, torch.device(device))

    def gather_activations(self, ids: torch.Tensor, device: str | torch.device = "cpu") -> torch.Tensor:
        """float16 ``[..., *shape]`` of the exemplars ``ids`` int64 ``[...]``, on ``device``.

        Raises BundleError where the bundle stores no activations.
        """
        if self.activations is None:
            raise BundleError("the bundle stores no activations; build it with --tail-layer NAME, or with auto")
        return _gather(self.activations, ids, torch.device(device))

    def pixels(self, ids: torch.Tensor) -> torch.Tensor:
        """uint8 ``[M, C, H, W]`` of the exemplars ``ids`` int64 ``[M]``, in that order, on the CPU."""
        wanted = ids.cpu().numpy()
        number, source = np.divmod(wanted, self.layout.sources)
        shard, row = np.divmod(source, self.layout.shard_size)
        place = number * self.layout.shards_per_copy + shard
        out = np.empty((len(wanted), *self._shards[0].shape[1:]), dtype=np.uint8)
        for part in np.unique(place):
            here = place == part
            out[here] = self._shards[part][row[here]]
        return torch.from_numpy(out)

    def origin(self, exemplar: int) -> tuple[int, str]:
        """Training image and copy name (``clean``, ``pgd10``, ...) of one exemplar."""
        number, source = divmod(exemplar, self.layout.sources)
        return source, self.layout.copies[number]


def _gather(store: torch.Tensor, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``store[ids]`` on ``device``: the rows are picked where the store lies, and only they travel."""
    flat = ids.reshape(-1).to(store.device)
    if device.type == "cuda" and store.device.type == "cpu":
        # Pinned memory is freed only after the copy that reads it: torch's allocator records the stream.
        rows = torch.empty((len(flat), *store.shape[1:]), dtype=store.dtype, pin_memory=True)
        torch.index_select(store, 0, flat, out=rows)
    else:
        rows = store.index_select(0, flat)
    return rows.to(device, non_blocking=True).reshape(*ids.shape, *store.shape[1:])
