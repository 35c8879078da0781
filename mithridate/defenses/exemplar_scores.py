"""What the base model says of the exemplars themselves."""

from __future__ import annotations

import torch

from mithridate.defenses.base import Resources

_NUMBERS_KEPT = 32_000_000
"""Up to this many scores (128 MB) are computed once and kept; beyond, they are computed where they are needed."""


class ExemplarScores:
    """Softmax scores of exemplars, from their stored head inputs.

    Raises ModelError where the network has no head.
    """

    def __init__(self, resources: Resources) -> None:
        self._head = resources.classifier.head
        exemplars = resources.exemplars
        self._table: torch.Tensor | None = None
        if len(exemplars) * self._head.out_features <= _NUMBERS_KEPT:
            parts = [self._compute(part.to(self._head.weight.device)) for part in exemplars.features.split(4096)]
            self._table = torch.cat(parts)  # float32 [E, C]

    def of(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """float32 ``[..., C]`` for the exemplars ``ids`` ``[...]`` with these ``features`` ``[..., D]``."""
        if self._table is not None:
            return self._table[ids.to(self._table.device)]
        return self._compute(features)

    @torch.no_grad()
    def _compute(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(features.to(self._head.weight.dtype))
        return logits.softmax(-1)
