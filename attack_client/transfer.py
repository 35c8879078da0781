"""A transfer attack: adversarial examples made on a model the attacker holds, sent to a service that may hold another.

It is static: it does not know the defence. What survives it may still fall to an attacker who does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.attacks import parse_attack
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.errors import OptionError
from mithridate.models import Classifier, load_classifier
from mithridate.types import Epsilon, to_images

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """The model the attacker holds, and where it came from."""

    classifier: Classifier
    source: str


@dataclass(frozen=True, kw_only=True)
class Crafted:
    """Adversarial copies of a data set: uint8 ``pixels`` ``[N, C, H, W]``; ``fooled`` bool ``[N]`` on the surrogate."""

    attack: str
    epsilon: Epsilon
    pixels: NDArray[np.uint8]
    fooled: NDArray[np.bool_]

    @property
    def digest(self) -> str:
        """Of the pixels."""
        return f"sha256:{hashlib.sha256(self.pixels.tobytes()).hexdigest()}"


def check_radius(epsilon: Epsilon) -> None:
    """Raises OptionError for a radius of zero: every defence would stand, and nothing would have been tried."""
    if not epsilon.levels:
        raise OptionError(f"epsilon {epsilon} leaves an attack nothing to change; allowed: 1/255 to 255/255")


def load_surrogate(path: Path, data: LabelledImages, *, arch: str | None = None) -> Surrogate:
    """A bundle directory or a model file. Raises BundleError, ModelError, or OptionError where it does not fit."""
    if path.is_dir():
        bundle = Bundle.open(path)
        bundle.check_fits(data)
        return Surrogate(classifier=bundle.classifier(allow_factory=arch), source=f"bundle {bundle.digest}")
    classifier = load_classifier(path, arch=arch, num_classes=len(data.classes), image_shape=data.image_shape)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Surrogate(classifier=classifier, source=f"model {path.name}, sha256:{digest}")


def craft(surrogate: Surrogate, data: LabelledImages, *, attack: str, epsilon: Epsilon, seed: int) -> Crafted:
    """Runs ``attack`` on the true labels of ``data``: the attacker knows what it wants misread.

    Raises OptionError for a radius of zero, or an unknown attack.
    """
    check_radius(epsilon)
    pgd = parse_attack(attack, epsilon=epsilon)
    generator = torch.Generator().manual_seed(seed)
    found, fooled = [], []
    pairs = zip(torch.from_numpy(data.images).split(_BATCH), torch.from_numpy(data.labels).split(_BATCH), strict=True)
    for pixels, labels in pairs:
        adversarial = pgd.run(surrogate.classifier, pixels, labels, generator=generator)
        with torch.no_grad():
            fooled.append(surrogate.classifier(to_images(adversarial)).argmax(1) != labels)
        found.append(adversarial)
    return Crafted(attack=attack, epsilon=epsilon, pixels=torch.cat(found).numpy(), fooled=torch.cat(fooled).numpy())
