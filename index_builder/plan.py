"""What is to be built."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from index_builder.training import TrainingPlan
from mithridate import __version__
from mithridate.attacks import PGD, parse_pgd
from mithridate.bundle import sha256_of
from mithridate.datasets import LabelledImages
from mithridate.defenses import parse_defence
from mithridate.errors import OptionError
from mithridate.exemplars import CLEAN, THROUGH, Layout
from mithridate.models import load_prm
from mithridate.models.splitting import DEFAULT_LAYER
from mithridate.neighbors import AUTO, METRICS
from mithridate.types import Epsilon

PUBLISHED_ATTACKS = ("pgd10", "pgd30", "pgd100")
"""The three adversarial copies of the RMC paper."""

_LONGEST_NAME = 80


@dataclass(frozen=True, kw_only=True)
class CopyPlan:
    """One copy of the training set.

    ``attack`` None is the clean one. ``defense`` (as text) is what the attack runs against, on the copies before this
    one; None is the base model.
    """

    name: str
    attack: PGD | None = None
    defense: str | None = None


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Everything that decides what the bundle will be.

    ``model`` None trains ``arch`` first (small-cnn where that is not given either). ``attacks`` are names, as in
    ``pgd10``, or ``pgd10@rmc``: an attack on a defence. ``tail_layer`` is where the tail scope's activations are taken,
    None stores none. ``prm`` are files of pixel robustness manipulators to store. ``shard_size`` images are attacked,
    stored and, after a kill, kept together; ``batch_size`` of them at a time.
    """

    data: LabelledImages
    out: Path
    model: Path | None = None
    arch: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    embedding_layer: str = DEFAULT_LAYER
    tail_layer: str | None = None
    prm: Sequence[Path] = ()
    attacks: Sequence[str] = PUBLISHED_ATTACKS
    epsilon: Epsilon = Epsilon(8)
    index: str = AUTO
    metric: Literal["l2", "cosine", "ip"] = "l2"
    name: str | None = None
    resize: Literal["exact", "center-crop"] = "exact"
    training: TrainingPlan = field(default_factory=TrainingPlan)
    seed: int = 0
    shard_size: int = 512
    batch_size: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        if len(set(self.attacks)) != len(self.attacks):
            raise OptionError(f"an attack is named twice in {', '.join(self.attacks)}; name each once")
        if not 1 <= self.batch_size <= self.shard_size:
            raise OptionError(f"batch size {self.batch_size} must be from 1 to the shard size, {self.shard_size}")
        if self.metric not in METRICS:
            raise OptionError(f"metric {self.metric!r} is unknown; allowed: {', '.join(METRICS)}")
        for path in self.prm:
            load_prm(path, image_shape=self.data.image_shape)  # says now what is wrong with it
        copies = self.copies()
        names = [copy.name for copy in copies]
        if len(set(names)) != len(names):
            raise OptionError(f"two copies would have one name in {', '.join(names)}; give one attack other options")
        for copy in copies:
            if copy.defense is not None:
                parse_defence(copy.defense)
                if len(self.data) <= self.batch_size:
                    raise OptionError(
                        f"an attack on a defence needs more images than a batch, since no image is defended by its own "
                        f"copies; seen: {len(self.data)} images, batch size {self.batch_size}"
                    )

    def copies(self) -> tuple[CopyPlan, ...]:
        """The clean copy, then one an attack. Raises OptionError for an attack that does not exist."""
        return (CopyPlan(name=CLEAN), *(_read_copy(text, self.epsilon) for text in self.attacks))

    @property
    def layout(self) -> Layout:
        """How the exemplars will be numbered."""
        names = tuple(copy.name for copy in self.copies())
        return Layout(sources=len(self.data), copies=names, shard_size=self.shard_size)

    def resolved_training(self) -> TrainingPlan | None:
        """How the model is trained, or None where one is given."""
        if self.model is not None:
            return None
        return replace(self.training, arch=self.arch or self.training.arch, seed=self.seed)

    def fingerprint(self) -> dict[str, Any]:
        """What must not change between an interrupted build and its resumption."""
        return {
            "mithridate": __version__,
            "torch": torch.__version__,
            "dataset": self.data.fingerprint(),
            "spec": self.data.spec,
            "model": sha256_of(self.model) if self.model else repr(self.resolved_training()),
            "arch": self.arch,
            "normalisation": [list(part) if part else None for part in (self.mean, self.std)],
            "embedding_layer": self.embedding_layer,
            "tail_layer": self.tail_layer,
            "prm": [sha256_of(path) for path in self.prm],
            "attacks": list(self.attacks),
            "epsilon": str(self.epsilon),
            "metric": self.metric,
            "name": self.name,
            "resize": self.resize,
            "seed": self.seed,
            "shard_size": self.shard_size,
            "batch_size": self.batch_size,
        }


def _read_copy(text: str, epsilon: Epsilon) -> CopyPlan:
    """``pgd10``, or ``pgd10@DEFENCE``."""
    name, at, defense = text.partition("@")
    attack = parse_pgd(name, epsilon=epsilon)
    if not at:
        return CopyPlan(name=attack.name, attack=attack)
    return CopyPlan(name=f"{attack.name}{THROUGH}{_file_name(defense)}", attack=attack, defense=defense)


def _file_name(defense: str) -> str:
    """A defence's text as part of a file name: ``rmc:neighbors=64`` is ``rmc-neighbors-64``."""
    safe = re.sub(r"[^a-zA-Z0-9.]+", "-", defense)
    if len(safe) <= _LONGEST_NAME:
        return safe
    return f"{safe[:_LONGEST_NAME]}-{hashlib.sha256(defense.encode()).hexdigest()[:8]}"
