"""The exemplars: every training image and its adversarial copies, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

CLEAN = "clean"


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
    ``features`` float32 ``[E, D]`` (inputs of the head), ``predictions`` int32 ``[E]`` (what the base model says).
    """

    def __init__(
        self,
        layout: Layout,
        *,
        shards: Sequence[NDArray[np.uint8]],
        labels: NDArray[np.int64],
        features: NDArray[np.float32],
        predictions: NDArray[np.int32],
    ) -> None:
        self.layout = layout
        self.labels = torch.from_numpy(np.tile(labels, len(layout.copies)))
        self.features = torch.from_numpy(features)
        self.predictions = torch.from_numpy(predictions)
        self._shards = shards

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def clean_count(self) -> int:
        """Exemplars below this id are clean, the others adversarial."""
        return self.layout.sources

    def pixels(self, ids: torch.Tensor) -> torch.Tensor:
        """uint8 ``[M, C, H, W]`` of the exemplars ``ids`` int64 ``[M]``, in that order."""
        wanted = ids.numpy()
        copy, source = np.divmod(wanted, self.layout.sources)
        shard, row = np.divmod(source, self.layout.shard_size)
        place = copy * self.layout.shards_per_copy + shard
        out = np.empty((len(wanted), *self._shards[0].shape[1:]), dtype=np.uint8)
        for number in np.unique(place):
            here = place == number
            out[here] = self._shards[number][row[here]]
        return torch.from_numpy(out)

    def origin(self, exemplar: int) -> tuple[int, str]:
        """Training image and copy name (``clean``, ``pgd10``, ...) of one exemplar."""
        copy, source = divmod(exemplar, self.layout.sources)
        return source, self.layout.copies[copy]
