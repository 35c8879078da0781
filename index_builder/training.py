"""Training a classifier: plain SGD with one learning-rate cycle, optionally on adversarial examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from index_builder.progress import Progress, silent
from mithridate.attacks import PGD
from mithridate.datasets import LabelledImages
from mithridate.errors import MithridateError, ModelError, OptionError
from mithridate.models import Classifier, build_classifier
from mithridate.types import Epsilon, Images, Labels, Logits, to_images, to_pixels

_MOMENTUM, _WEIGHT_DECAY, _WARM_UP = 0.9, 5e-4, 0.2


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """``epochs`` None chooses by the size of the data. ``shift`` pixels of random translation, ``flip`` left-right.

    ``adversarial``: ``n-fgsm`` (de Jorge et al. 2022: noise of twice epsilon, one step of epsilon, no clipping of the
    perturbation) or ``pgd`` (Madry et al. 2018, ten steps), at ``epsilon``.
    """

    arch: str = "small-cnn"
    epochs: int | None = None
    learning_rate: float = 0.1
    batch_size: int = 128
    shift: int | None = None
    flip: bool = False
    adversarial: Literal["n-fgsm", "pgd"] | None = None
    epsilon: Epsilon = Epsilon(8)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs is not None and not 1 <= self.epochs <= 10_000:
            raise OptionError(f"epochs={self.epochs} is out of range; allowed: 1 to 10000")
        if not 0 < self.learning_rate <= 100:
            raise OptionError(f"learning rate {self.learning_rate:g} is out of range; allowed: above 0, up to 100")
        if self.batch_size < 2:
            raise OptionError(f"batch size {self.batch_size} is too small; allowed: from 2")
        if self.adversarial not in (None, "n-fgsm", "pgd"):
            raise OptionError(f"unknown adversarial training {self.adversarial!r}; allowed: n-fgsm, pgd")

    def resolved_epochs(self, count: int) -> int:
        """About 200,000 images seen, but 4 to 40 epochs."""
        return self.epochs or min(40, max(4, round(200_000 / count)))


def train_classifier(
    data: LabelledImages, plan: TrainingPlan, *, device: str = "cpu", progress: Progress = silent
) -> Classifier:
    """Trains ``plan.arch`` on ``data`` from fresh weights. Same plan, same data, same machine: same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)  # initial weights and dropout draw from the global generator
        classifier = build_classifier(plan.arch, num_classes=len(data.classes), image_shape=data.image_shape)
        try:
            _fit(classifier.to(device), data, plan, progress)
        except MithridateError:
            raise
        except Exception as error:  # networks fail in training in their own ways: one image a batch, two outputs ...
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{plan.arch} cannot be trained on {data.spec}: {reason}") from error
    return classifier


def _logits(classifier: Classifier, images: Images) -> Logits:
    """What the network says in training; where it has auxiliary outputs beside, its main one."""
    output: Any = classifier(images)
    logits: Logits = output if isinstance(output, torch.Tensor) else output[0]
    return logits


def accuracy(classifier: Classifier, data: LabelledImages, *, batch_size: int = 256) -> float:
    """Share of ``data`` that the classifier gets right."""
    pixels, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    correct = 0
    with torch.no_grad():
        for start in range(0, len(pixels), batch_size):
            images = to_images(pixels[start : start + batch_size]).to(classifier.device)
            correct += int((classifier(images).argmax(1).cpu() == labels[start : start + batch_size]).sum())
    return correct / len(pixels)


def _fit(classifier: Classifier, data: LabelledImages, plan: TrainingPlan, progress: Progress) -> None:
    generator = torch.Generator().manual_seed(plan.seed)
    pixels, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    network = classifier.network.requires_grad_(True).train()
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": _WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=plan.learning_rate, momentum=_MOMENTUM, nesterov=True)
    shift = max(1, data.image_shape[1] // 16) if plan.shift is None else plan.shift
    epochs, steps = plan.resolved_epochs(len(data)), 0
    batches = max(1, len(data) // plan.batch_size)
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator)
        for batch in order.tensor_split(batches):
            set_rate(optimizer, plan.learning_rate * cycle(steps / (epochs * batches)))
            images = augment(to_images(pixels[batch]), shift, flip=plan.flip, generator=generator)
            images, targets = images.to(classifier.device), labels[batch].to(classifier.device)
            if plan.adversarial is not None:
                images = _attack(classifier, images, targets, plan, generator)
            loss = F.cross_entropy(_logits(classifier, images), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            steps += 1
            progress("train", steps, epochs * batches)
    network.eval().requires_grad_(False)


def cycle(done: float) -> float:
    """Share of the peak learning rate: linear up, cosine down."""
    if done < _WARM_UP:
        return max(done / _WARM_UP, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def augment(images: Images, shift: int, *, flip: bool, generator: torch.Generator) -> Images:
    """Every image of ``[N, C, H, W]`` moved by up to ``shift`` pixels, zeros coming in; half of them mirrored."""
    count, _, height, width = images.shape
    padded = F.pad(images, (shift,) * 4)
    top, left = torch.randint(2 * shift + 1, (2, count), generator=generator)
    rows = top[:, None] + torch.arange(height)  # [N, H]
    columns = left[:, None] + torch.arange(width)  # [N, W]
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    number = torch.arange(count)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]]  # [N, H, W, C]
    return moved.permute(0, 3, 1, 2).contiguous()


def _attack(
    classifier: Classifier, images: Images, labels: Labels, plan: TrainingPlan, generator: torch.Generator
) -> Images:
    epsilon = plan.epsilon.value
    if plan.adversarial == "pgd":
        attack = PGD(epsilon=plan.epsilon, steps=10, step_size=epsilon / 4)
        classifier.network.eval()
        found = attack.run(classifier, to_pixels(images), labels, generator=generator)
        classifier.network.train()
        return to_images(found)
    noise = (4 * torch.rand(images.shape, generator=generator) - 2).to(images.device) * epsilon
    noisy = (images + noise).requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(_logits(classifier, noisy), labels), noisy)
    return (noisy + epsilon * gradient.sign()).detach().clamp(0, 1)
