"""RMC on the last linear layer, first-order: all images of a batch at once, on stored features.

The other solver is ``head_ridge``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mithridate.defenses.adapting import Adapted, Query, average_heads, join
from mithridate.defenses.base import Resources
from mithridate.defenses.head_adam import AdamConfig, fit_heads

_NUMBERS_AT_A_TIME = 4_000_000
"""float64 weights and features of one chunk: 32 MB, in about ten copies while it is fitted."""


@dataclass(frozen=True, kw_only=True)
class AdamHead:
    """Adapts the head with ``solver=adam``: the published loss, first-order. Raises ModelError where there is none."""

    resources: Resources
    config: AdamConfig

    def __post_init__(self) -> None:
        _ = self.resources.classifier.head  # a network that has none is refused now, not at the first request

    @property
    def batches(self) -> bool:
        return True

    @property
    def changes(self) -> Literal["head", "tail", "all"]:
        return "head"

    @property
    def repeatable(self) -> bool:
        return True

    def adapt(self, query: Query) -> Adapted:
        """As many images at a time as memory allows: a thousand classes and 2,048 features make 16 MB an image and
        copy.
        """
        classes, width = self.resources.classifier.head.weight.shape
        rows = max(1, _NUMBERS_AT_A_TIME // (width * (classes + query.selection.ids.shape[1])))
        return join([self._fit(query.rows(start, start + rows)) for start in range(0, max(1, len(query)), rows)])

    def _fit(self, query: Query) -> Adapted:
        exemplars, device = self.resources.exemplars, query.base.logits.device
        selection, held = query.selection.hold_out(self.config.held_out)
        with torch.no_grad():
            fit = fit_heads(
                exemplars.gather_features(selection.ids, device),
                exemplars.gather_labels(selection.ids, device),
                selection.weights.detach().to(device),
                self.resources.classifier.head,
                self.config,
                query.budgets,
                held,
            )
        if query.average is not None:
            return average_heads(query, self.resources.classifier, fit.adaptations, fit)
        return Adapted(logits=fit.logits(query.base.head_input), adaptations=fit.adaptations)
