"""RMC exactly as published: sequential, stateful, calibrated. Slow and obvious; the baseline and the oracle, never
served.

Wu, Yuan, Wu: Adversarial Robustness via Runtime Masking and Cleansing (ICML 2020), as the authors' code runs it, with
the constants of the CIFAR-10 re-implementation by Chen et al. (ICLR 2022). For each test image, in order of arrival:

1. find its K nearest exemplars in the *static* network's embedding (Euclidean, the whole list sorted);
2. hold out the nearest fifth, fine-tune all weights on the rest: Adam, batches of 128, batch normalisation frozen;
3. stop once the held-out loss has not improved for 5 epochs (the last weights stay, not the best);
4. predict;
5. calibrate: fine-tune again on K random exemplars, augmented, an eighth of them held out;
6. carry weights and Adam's moments to the next image.

Steps 5 and 6 are why it can only be a baseline: an answer depends on everybody who asked before. ``carry=False`` leaves
both out; this is what ``rmc:scope=all`` is compared with, image by image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mithridate.defenses import Resources


@dataclass(frozen=True, kw_only=True)
class Published:
    """The constants, for CIFAR-10. ImageNet: 2048 neighbours and a learning rate of 1e-5."""

    neighbors: int = 1024
    learning_rate: float = 2.5e-5
    batch_size: int = 128
    epochs: int = 100
    patience: int = 5
    held_out: float = 0.2
    calibration_held_out: float = 0.125


class ReferenceRMC:
    """One network, fine-tuned from one test image to the next."""

    def __init__(self, resources: Resources, published: Published = Published(), *, carry: bool = True) -> None:
        self._resources = resources
        self._published = published
        self._carry = carry
        self.network = resources.classifier.private_network()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=published.learning_rate)
        self.epochs = 0
        """Epochs of the last adaptation, without the calibration's."""

    def predict(self, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Logits ``[C]`` for one image ``[C, H, W]`` in [0, 1]; the weights are not what they were afterwards."""
        published = self._published
        if not self._carry:
            self.network = self._resources.classifier.private_network()
            self.optimizer = torch.optim.Adam(self.network.parameters(), lr=published.learning_rate)
        ids = self._nearest(image)
        held_out = int(published.held_out * len(ids))
        self.epochs = self._fine_tune(ids[held_out:], ids[:held_out], generator)
        with torch.no_grad():
            logits: torch.Tensor = self.network(self._resources.classifier.normalise(image[None]))[0]
        if self._carry:
            members = torch.randperm(len(self._resources.exemplars), generator=generator)[: published.neighbors]
            held_out = int(published.calibration_held_out * len(members))
            self._fine_tune(members[held_out:], members[:held_out], generator, augment=True)
        return logits

    def _nearest(self, image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            query = self._resources.classifier.embed(image[None])
        everything = self._resources.index.embeddings(torch.arange(len(self._resources.index)))
        distances = (everything.double() - query.double()).square().sum(1)
        return distances.argsort(stable=True)[: self._published.neighbors]

    def _fine_tune(
        self, train: torch.Tensor, validation: torch.Tensor, generator: torch.Generator, *, augment: bool = False
    ) -> int:
        """How many epochs it took; ``train`` and ``validation`` are ids of exemplars."""
        best, waited = float("inf"), 0
        for epoch in range(1, self._published.epochs + 1):
            order = train[torch.randperm(len(train), generator=generator)]
            for inputs, labels in self._batches(order):
                if augment:
                    inputs = _augmented(inputs, generator)
                self.optimizer.zero_grad()
                F.cross_entropy(self.network(inputs), labels).backward()
                self.optimizer.step()
            with torch.no_grad():
                losses = [F.cross_entropy(self.network(x), y, reduction="sum") for x, y in self._batches(validation)]
            loss = float(torch.stack(losses).sum()) / len(validation)
            best, waited = (loss, 0) if loss < best else (best, waited + 1)
            if waited >= self._published.patience:
                return epoch
        return self._published.epochs

    def _batches(self, ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        classifier, exemplars = self._resources.classifier, self._resources.exemplars
        for batch in ids.split(self._published.batch_size):
            images = exemplars.pixels(batch).float() / 255
            yield classifier.normalise(images), exemplars.labels[batch]


def _augmented(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random flips, and shifts of up to an eighth of the image: what is customary for 32 pixels."""
    reach = inputs.shape[-1] // 8
    padded = F.pad(inputs, (reach,) * 4)
    out = torch.empty_like(inputs)
    height, width = inputs.shape[-2:]
    tops, lefts = (torch.randint(2 * reach + 1, (len(inputs),), generator=generator).tolist() for _ in range(2))
    flips = torch.randint(2, (len(inputs),), generator=generator).tolist()
    for row, (top, left, flip) in enumerate(zip(tops, lefts, flips, strict=True)):
        crop = padded[row, :, top : top + height, left : left + width]
        out[row] = crop.flip(-1) if flip else crop
    return out
