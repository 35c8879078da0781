"""What keeps an adapted answer from doing harm: mixing with the base, a gate, abstention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from mithridate.defenses.adapting import Adapted, Query
from mithridate.defenses.base import Adaptation
from mithridate.defenses.options import require
from mithridate.exemplars import CLEAN, THROUGH, ExemplarStore
from mithridate.types import Logits, Scores

Gate = float | Literal["auto"]

NOTHING_TO_LOSE, MUCH_TO_LOSE = 0.05, 0.3
"""What ``gate=auto`` is, by whether the base model withstands the attack that the bundle was built with. A base that
does not loses nothing to adaptation, and a small gate repairs the most; one that does loses more than a point of it
with 0.05 (docs/rmc.md).
"""

_WITHSTANDS = 0.1
"""Of the images of the strongest attack, at least this share is classified as it should be."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """``mix``: the base model's share in the answer's scores (not in its logits: those of a base model that an
    attack made sure of itself drown any share). ``gate``: where the adapted model contradicts the base model, its
    answer stands only if its class has this much more of the neighbours (weighted shares) than the base model's
    class has; else the base model answers; ``auto``: as ``suited`` says. ``abstain``: no answer where base,
    neighbours and adapted model do not all give the answer's class at least this much. 0 turns each of them off.
    """

    mix: float = 0.0
    gate: Gate = 0.0
    abstain: float = 0.0

    def __post_init__(self) -> None:
        for key in ("mix", "gate", "abstain"):
            if (key, getattr(self, key)) != ("gate", "auto"):
                require("rmc", key, getattr(self, key), 0, 1)

    @property
    def lead(self) -> float:
        """The gate, as a number. Raises ValueError where that was not settled yet."""
        if self.gate == "auto":
            raise ValueError("gate=auto stands for a number that the exemplars give: see suited()")
        return float(self.gate)


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """``scores`` ``[B, C]``; ``agreement`` ``[B]``: what base, neighbours and answer all grant the answer's class."""

    scores: Scores
    agreement: torch.Tensor
    adaptations: tuple[Adaptation, ...]
    abstained: torch.Tensor | None


def suited(config: GuardConfig, exemplars: ExemplarStore) -> GuardConfig:
    """``config`` with a number for ``gate=auto``. The base model withstands what it withstands of the strongest attack
    that was made on it; where a bundle has none, it is taken to.
    """
    if config.gate != "auto":
        return config
    sources, copies = exemplars.layout.sources, exemplars.layout.copies
    right = (exemplars.predictions.cpu() == exemplars.labels.cpu()).reshape(len(copies), sources)
    attacked = [number for number, name in enumerate(copies) if name != CLEAN and THROUGH not in name]
    withstood = min((right[number].double().mean().item() for number in attacked), default=1.0)
    return replace(config, gate=NOTHING_TO_LOSE if withstood < _WITHSTANDS else MUCH_TO_LOSE)


def neighbor_votes(labels: torch.Tensor, weights: torch.Tensor, classes: int) -> torch.Tensor:
    """Share of each class among the neighbours: labels ``[B, K]``, weights ``[B, K]`` to ``[B, classes]``."""
    return torch.zeros(len(labels), classes, dtype=weights.dtype, device=weights.device).scatter_add_(
        1, labels, weights
    )


def guard(query: Query, adapted: Adapted, votes: torch.Tensor, config: GuardConfig) -> Guarded:
    """The answer that is let through. ``votes`` as ``neighbor_votes`` counts them."""
    base = query.base.logits.softmax(1).double()
    scores = _mix(query, adapted, config).exp().double()
    from_base = _kept_base(adapted, scores.device)
    from_base |= _stopped(scores, base, votes, config)
    scores = torch.where(from_base[:, None], base, scores)
    answer = scores.argmax(1, keepdim=True)
    agreement = torch.cat([part.gather(1, answer) for part in (base, votes, scores)], 1).amin(1)
    flags = from_base.tolist()
    return Guarded(
        scores=scores,
        agreement=agreement,
        adaptations=tuple(
            replace(a, weights="base") if flag else a for a, flag in zip(adapted.adaptations, flags, strict=True)
        ),
        abstained=agreement < config.abstain if config.abstain else None,
    )


def guarded_logits(query: Query, adapted: Adapted, votes: torch.Tensor, config: GuardConfig) -> Logits:
    """The same for attackers: forward what the defence answers, backward through base and adapted model at once.

    A guard switches between the two, and an attacker has to move both: the gradient of the one that happens to answer
    would stop at the switch.
    """
    mixed = _mix(query, adapted, config)
    base = query.base.logits.to(mixed.dtype).log_softmax(1)
    with torch.no_grad():
        from_base = _kept_base(adapted, mixed.device)
        from_base |= _stopped(mixed, base, votes, config)
        answered = torch.where(from_base[:, None], base, mixed)
        switching = from_base | (config.lead > 0)
    both = torch.where(switching[:, None], 0.5 * (base + mixed), mixed)  # a row's gradient is its own affair
    return both + (answered - both).detach()


def _kept_base(adapted: Adapted, device: torch.device) -> torch.Tensor:
    """bool ``[B]``: the adapter itself says that its logits do not count."""
    return torch.tensor([a.weights == "base" for a in adapted.adaptations], dtype=torch.bool, device=device)


def _mix(query: Query, adapted: Adapted, config: GuardConfig) -> torch.Tensor:
    """Logarithms of the mixed scores ``[B, C]``."""
    scores = adapted.logits.log_softmax(1)
    if not config.mix:
        return scores
    base = query.base.logits.to(scores.dtype).log_softmax(1)
    shares = base.new_tensor([1 - config.mix, config.mix]).log()[:, None, None]  # -inf at mix=1, and that is right
    return (torch.stack([scores, base]) + shares).logsumexp(0)


def _stopped(adapted: torch.Tensor, base: torch.Tensor, votes: torch.Tensor, config: GuardConfig) -> torch.Tensor:
    """bool ``[B]``: the neighbours do not back the adapted answer, ``[B, C]``, against the base model's."""
    if not config.lead:
        return torch.zeros(len(adapted), dtype=torch.bool, device=adapted.device)
    answer, usual = (part.argmax(1, keepdim=True) for part in (adapted, base))
    backing = votes.gather(1, answer) - votes.gather(1, usual)
    return ((answer != usual) & (backing < config.lead))[:, 0]
