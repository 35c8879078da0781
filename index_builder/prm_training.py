"""Training a PRM: to give back whole images out of the pixels that it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from index_builder.progress import Progress, silent
from index_builder.training import augment, cycle, set_rate
from mithridate.datasets import LabelledImages
from mithridate.errors import OptionError
from mithridate.models import PRM, PRMSpec, build_prm
from mithridate.models.prm import default_size
from mithridate.types import to_images

_LARGEST_GRADIENT = 0.1
"""Its norm is cut to this: without, one bad step at the peak of the learning rate can undo all before it."""


@dataclass(frozen=True, kw_only=True)
class PRMPlan:
    """``size`` and ``epochs`` None choose by the images' size and number. Adam with one learning-rate cycle: the
    published hundred epochs of SGD reach no better reconstruction than a few of these.
    """

    variant: str = "v0"
    size: Literal["unet", "small"] | None = None
    epochs: int | None = None
    learning_rate: float = 2e-3
    batch_size: int = 128
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        PRMSpec(variant=self.variant, size=self.size or "small", image_shape=(1, 8, 8))
        if self.epochs is not None and not 1 <= self.epochs <= 10_000:
            raise OptionError(f"epochs={self.epochs} is out of range; allowed: 1 to 10000")
        if not 0 < self.learning_rate <= 1:
            raise OptionError(f"learning rate {self.learning_rate:g} is out of range; allowed: above 0, up to 1")
        if self.batch_size < 1:
            raise OptionError(f"batch size {self.batch_size} is too small; allowed: from 1")

    def resolved_epochs(self, count: int) -> int:
        """About 200,000 images seen, but 4 to 100 epochs."""
        return self.epochs or min(100, max(4, round(200_000 / count)))


def train_prm(data: LabelledImages, plan: PRMPlan, *, device: str = "cpu", progress: Progress = silent) -> PRM:
    """Trains from fresh weights with the mean squared error. Same plan, same data, same machine: same weights."""
    spec = PRMSpec(variant=plan.variant, size=plan.size or default_size(data.image_shape), image_shape=data.image_shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)  # initial weights draw from the global generator
        prm = build_prm(spec).to(device)
        _fit(prm, data, plan, progress)
    return prm.eval().requires_grad_(False)


def _fit(prm: PRM, data: LabelledImages, plan: PRMPlan, progress: Progress) -> None:
    generator = torch.Generator().manual_seed(plan.seed)
    pixels, device = torch.from_numpy(data.images), next(prm.parameters()).device
    optimizer = torch.optim.Adam(prm.parameters(), lr=plan.learning_rate)
    batches, steps = max(1, len(data) // plan.batch_size), 0
    total = plan.resolved_epochs(len(data)) * batches
    for _ in range(plan.resolved_epochs(len(data))):
        order = torch.randperm(len(data), generator=generator)
        for batch in order.tensor_split(batches):
            set_rate(optimizer, plan.learning_rate * cycle(steps / total))
            # Not moved: the black that would come in at the edges is half of the error, and nothing of it is ever seen.
            images = augment(to_images(pixels[batch]), 0, flip=plan.flip, generator=generator).to(device)
            loss = F.mse_loss(prm(images), images)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(prm.parameters(), _LARGEST_GRADIENT)
            optimizer.step()
            steps += 1
            progress("train", steps, total)


def reconstruction_error(prm: PRM, data: LabelledImages, *, batch_size: int = 256) -> float:
    """Root mean square of what the reconstruction misses, in pixel values of 0 to 1."""
    pixels, device = torch.from_numpy(data.images), next(prm.parameters()).device
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(pixels), batch_size):
            images = to_images(pixels[start : start + batch_size]).to(device)
            total += float((prm(images) - images).square().mean((1, 2, 3)).double().sum())
    return math.sqrt(total / len(pixels))
