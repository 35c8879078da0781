"""One shard of exemplars: attacked, embedded, and stored with everything that is computed from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from index_builder.plan import BuildPlan
from index_builder.workspace import Workspace
from mithridate.bundle import ACTIVATIONS, EMBEDDINGS, FEATURES, PREDICTIONS
from mithridate.errors import BuildError
from mithridate.models import Classifier
from mithridate.models.splitting import DEFAULT_LAYER
from mithridate.types import Pixels, to_images

PARTS = "parts"
"""The directory of what is computed shard by shard and joined at the end."""

Attacker = Callable[[Pixels, Pixels, slice, torch.Generator], Pixels]
"""Gives attacked pixels for clean ones ``[N, C, H, W]``, the base model's answers ``[N]``, which sources these are, and
randomness."""


def make_shard(
    plan: BuildPlan, workspace: Workspace, classifier: Classifier, attacker: Attacker | None, copy: int, shard: int
) -> None:
    """Attacks and embeds one shard. The pixels are written last: where they are, the rest is.

    Raises BuildError where the model's numbers cannot be stored.
    """
    rows = plan.layout.rows(shard)
    generator = torch.Generator().manual_seed(_shard_seed(plan, copy, shard))
    pixels, results = [], []
    for start in range(rows.start, rows.stop, plan.batch_size):
        sources = slice(start, min(start + plan.batch_size, rows.stop))
        batch = torch.from_numpy(plan.data.images[sources]).to(plan.device)
        if attacker is not None:
            with torch.no_grad():
                predicted = classifier(to_images(batch)).argmax(1)  # untargeted on its own answer: no label leaks
            batch = attacker(batch, predicted, sources, generator)
        pixels.append(batch.cpu())
        results.append(_describe(classifier, batch))
    path = plan.layout.shard_path(copy, shard)
    for name in results[0]:
        workspace.write_array(part(name, path), np.concatenate([result[name] for result in results]))
    workspace.write_array(path, torch.cat(pixels).numpy())


@torch.no_grad()
def _describe(classifier: Classifier, pixels: Pixels) -> dict[str, NDArray[Any]]:
    """What is stored beside ``pixels``, by the name of the file it will be in."""
    images = to_images(pixels)
    trace = classifier.trace(images)
    logits = classifier.head(trace.head_input) if classifier.has_head else classifier(images)
    described = {EMBEDDINGS: trace.embedding, PREDICTIONS: logits.argmax(1).int()}
    if classifier.has_head and classifier.spec.embedding_layer != DEFAULT_LAYER:
        described[FEATURES] = trace.head_input  # otherwise it is the embedding
    if not all(bool(described[name].isfinite().all()) for name in (EMBEDDINGS, FEATURES) if name in described):
        raise BuildError("the model gives NaN or infinite embeddings for some training images; check its weights")
    if trace.activation is not None:
        described[ACTIVATIONS] = _half(trace.activation, str(classifier.spec.tail_layer))
    return {name: value.cpu().numpy() for name, value in described.items()}


def _half(activation: torch.Tensor, layer: str) -> torch.Tensor:
    half = activation.half()
    if not half.isfinite().all():
        raise BuildError(
            f"the activations of the tail layer {layer!r} reach {float(activation.abs().max()):.3g}; they are stored "
            f"as float16, which ends at {torch.finfo(torch.float16).max:g}: choose another --tail-layer, or none"
        )
    return half


def parts_of(plan: BuildPlan, name: str, *, copies: int | None = None) -> list[str]:
    """The files that joined are ``name``, or what it is of the first ``copies`` copies."""
    layout = plan.layout
    return [part(name, layout.shard_path(c, s)) for c, s in layout.shards if copies is None or c < copies]


def join(plan: BuildPlan, workspace: Workspace, name: str, *, copies: int | None = None) -> NDArray[Any]:
    """The parts of ``name`` as one array in memory."""
    paths = parts_of(plan, name, copies=copies)
    return np.concatenate([np.load(workspace.path / path, allow_pickle=False) for path in paths])


def part(name: str, shard_path: str) -> str:
    """Where the part of ``name`` that belongs to a shard is kept until the end."""
    return f"{PARTS}/{Path(shard_path).stem}-{name}"


def _shard_seed(plan: BuildPlan, copy: int, shard: int) -> int:
    """Each shard has randomness of its own, so it does not matter which were made before a kill."""
    text = f"{plan.seed}/{plan.layout.copies[copy]}/{shard}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
