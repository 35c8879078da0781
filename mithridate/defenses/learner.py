"""Losses and gradients of one network with many weight vectors, one an image: together, or one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

from mithridate.defenses.private_weights import PrivateWeights, WeightedNetwork

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The neighbours of ``Q`` images, nearest first: ``inputs`` ``[Q, K, ...]`` as they are stored, ``labels`` int64
    ``[Q, K]``, ``weights`` ``[Q, K]``."""

    inputs: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

    def take(self, places: torch.Tensor, chosen: torch.Tensor) -> Examples:
        """Of the images ``places`` ``[q]``, the neighbours ``chosen`` ``[q, B]``."""
        flat = (places[:, None] * self.labels.shape[1] + chosen).reshape(-1)
        rows = (part.flatten(0, 1).index_select(0, flat) for part in (self.inputs, self.labels, self.weights))
        inputs, labels, weights = (part.reshape(*chosen.shape, *part.shape[1:]) for part in rows)
        return Examples(inputs=inputs, labels=labels, weights=weights)


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What is trained. ``prepare`` makes the network's inputs of stored ones, ``[B, ...]`` to ``[B, ...]``.

    ``together``: one run for all images, each with weights of its own (vmap: convolutions become grouped ones), instead
    of one after the other. ``bfloat16``: autocast.
    """

    network: WeightedNetwork
    prepare: Callable[[torch.Tensor], torch.Tensor]
    together: bool = False
    bfloat16: bool = False

    def gradients(self, weights: torch.Tensor, batch: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the mean cross-entropy, each example times its weight: for weights ``[q, P]`` and a batch ``[q, B]`` the
        gradients ``[q, P]`` and the losses ``[q]``."""
        arguments = (weights, batch.inputs, batch.labels, batch.weights)
        if self.together:
            gradients, losses = vmap(grad_and_value(self._loss))(*arguments)
            return gradients, losses
        found = [self._gradient(*row) for row in zip(*arguments, strict=True)]
        return torch.stack([gradient for gradient, _ in found]), torch.stack([loss for _, loss in found])

    def losses(self, weights: torch.Tensor, batch: Examples) -> torch.Tensor:
        """Summed cross-entropy ``[q]``, each example times its weight."""
        arguments = (weights, batch.inputs, batch.labels)
        with torch.no_grad():
            if self.together:
                each: torch.Tensor = vmap(self._each)(*arguments)
            else:
                each = torch.stack([self._each(*row) for row in zip(*arguments, strict=True)])
            return (each * batch.weights).sum(1)

    def _gradient(self, weights: torch.Tensor, *examples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            leaf = weights.detach().requires_grad_()
            loss = self._loss(leaf, *examples)
            (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient, loss.detach()

    def _loss(
        self, weights: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        return (self._each(weights, inputs, labels) * shares).mean()

    def _each(self, weights: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = self.network(weights, self.prepare(inputs))
        return F.cross_entropy(logits, labels, reduction="none")  # [B]


def chooses_bfloat16(precision: Precision, private: PrivateWeights, example: torch.Tensor) -> bool:
    """``auto``: where the device multiplies bfloat16 in hardware (emulated it is slower than float32), and the network
    can be run in it; ``example`` is a batch of what the network takes."""
    if precision != "auto":
        return precision == "bfloat16"
    return _has_bfloat16(example.device) and _runs(private, example, bfloat16=True)


def runs_together(private: PrivateWeights, example: torch.Tensor) -> bool:
    """Whether vmap can take the network; ``example`` is a batch of what the network takes."""
    return _runs(private, example, together=True)


def _runs(private: PrivateWeights, example: torch.Tensor, *, together: bool = False, bfloat16: bool = False) -> bool:
    network = private.function()
    learner = Learner(network=network, prepare=lambda inputs: inputs, together=together, bfloat16=bfloat16)
    zeros = torch.zeros(2, len(example), device=example.device)
    batch = Examples(inputs=torch.stack([example, example]), labels=zeros.long(), weights=zeros + 1)
    try:
        gradients, _ = learner.gradients(private.start.repeat(2, 1), batch)
    except Exception:  # code that mixes types by hand, or an operation that vmap does not know, may raise anything
        return False
    return bool(gradients.isfinite().all())


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
