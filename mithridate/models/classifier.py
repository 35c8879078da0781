"""The classifier that every other part works with: un-normalised images in, logits or embeddings out."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import fx, nn

from mithridate.errors import ModelError
from mithridate.models.folding import quickened
from mithridate.models.registry import build_network
from mithridate.models.splitting import DEFAULT_LAYER, split_network
from mithridate.types import Embeddings, Images, Logits

_CANONICAL_BATCH_LIMIT = 9
"""Above this many rows of padding, bitwise batch independence on the CPU costs more than it is worth."""


_BUILDING = threading.RLock()
"""torch.fx traces by patching ``nn.Module`` for the whole process: two threads must not build at once."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything but the weights: enough to build the same classifier again."""

    arch: str
    num_classes: int
    image_shape: tuple[int, int, int]  # (C, H, W) of the images, before any repeat of a grey channel
    mean: tuple[float, ...]
    std: tuple[float, ...]
    embedding_layer: str = DEFAULT_LAYER
    tail_layer: str | None = None  # where the tail begins, or None where there is to be none

    def metadata(self) -> dict[str, str]:
        """As strings, for the header of a safetensors file: what goes with the weights, so not where a tail begins."""
        given = {key: value for key, value in asdict(self).items() if key != "tail_layer"}
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one run of the trunk gives for ``N`` images.

    ``embedding`` ``[N, D]``, ``head_input`` ``[N, D']`` (by default the same tensor), and ``activation`` ``[N, ...]``
    where the tail begins, None where the classifier has no tail.
    """

    embedding: Embeddings
    head_input: torch.Tensor
    activation: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _Quick:
    """Folded copies, and which versions of the weights they are of."""

    trunk: nn.Module
    network: nn.Module
    versions: int


class Classifier(nn.Module):
    """A network with its normalisation inside, split before its last linear layer and, if asked, where a tail begins.

    ``forward(images) -> logits [N, C]``, ``embed(images) -> [N, D]``; images are float ``[N, C, H, W]`` in [0, 1].
    Always in evaluation mode and frozen; ``private_network`` and ``private_tail`` give weights that can be changed.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.network = network.eval()
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1), persistent=False)
        with torch.no_grad():
            example = self.normalise(torch.zeros(2, *spec.image_shape))
            split = split_network(network, layer=spec.embedding_layer, tail_layer=spec.tail_layer, example=example)
        self._trunk = (split.trunk,)  # in a tuple: its parameters are the network's, and counted there
        self._head = (split.head,)
        self._tail = (split.tail,)
        self._quick: _Quick | None = None
        self.requires_grad_(False)

    @property
    def head(self) -> nn.Linear:
        """The last linear layer. Raises ModelError where the logits do not come straight out of one."""
        head = self._head[0]
        if head is None:
            raise ModelError(
                f"{self.spec.arch} does not end in a linear layer, so there is no head to adapt; use rmc:scope=all"
            )
        return head

    @property
    def has_head(self) -> bool:
        """Whether the logits come straight out of a linear layer."""
        return self._head[0] is not None

    @property
    def tail(self) -> nn.Module:
        """From the activation of ``trace`` to the logits; its weights are the network's own.

        Raises ModelError where the classifier was built without a ``tail_layer``.
        """
        tail = self._tail[0]
        if tail is None:
            raise ModelError(
                f"{self.spec.arch} was not cut for the tail scope; build the bundle with --tail-layer auto"
            )
        return tail

    @property
    def has_tail(self) -> bool:
        """Whether the network was cut where a tail begins."""
        return self._tail[0] is not None

    @property
    def traced_trunk(self) -> fx.GraphModule:
        """Normalised images to embedding, head input and, where there is a tail, the activation at its beginning, as a
        graph; its weights are the network's own. Raises ModelError where the network could not be traced.
        """
        trunk = self._trunk[0]
        if not isinstance(trunk, fx.GraphModule):
            raise ModelError(f"{self.spec.arch} cannot be traced, so nothing can be changed between its layers")
        return trunk

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    @property
    def is_quick(self) -> bool:
        """Whether folded copies of the layers answer."""
        return self._valid_quick() is not None

    def quicken(self) -> None:
        """Lets ``forward`` and ``trace`` run folded copies of their layers, channels last: the same to rounding, in
        about 0.6 of the time for a residual network on a CPU. What may be trained or changed between its layers stays
        as it is, and so does a network that cannot be traced or gives something else then.

        Weights that are changed, loaded or moved afterwards end it.
        """
        trunk, example = self._trunk[0], torch.rand(2, *self.spec.image_shape, device=self.device)
        if not isinstance(trunk, fx.GraphModule):
            return
        with _BUILDING, torch.no_grad():
            expected = self(example), self.trace(example)
            whole = quickened(fx.symbolic_trace(self.network))
            self._quick = _Quick(trunk=quickened(trunk), network=whole, versions=self._versions())
            found = self(example), self.trace(example)
        pairs = [(expected[0], found[0]), (expected[1].embedding, found[1].embedding)]
        if not all(torch.allclose(one, other, rtol=1e-3, atol=1e-4) for one, other in pairs):
            self._quick = None

    def _valid_quick(self) -> _Quick | None:
        """The folded copies, where they are of the weights as these are now."""
        return self._quick if self._quick is not None and self._quick.versions == self._versions() else None

    def _versions(self) -> int:
        """Goes up whenever weights or statistics are written to."""
        return sum(tensor._version for tensor in (*self.network.parameters(), *self.network.buffers()))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """To another device, the parts too: what a graph reads directly (a buffer, a token) it holds itself."""
        self._quick = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for part in (self._trunk[0], self._tail[0]):
            if part is not None:
                part._apply(fn, recurse)
        return self

    def normalise(self, images: Images) -> torch.Tensor:
        """Repeats a grey channel where the network wants colour; subtracts the mean, divides by the deviation."""
        if images.shape[1] == 1 and self.mean.shape[1] == 3:
            images = images.expand(-1, 3, -1, -1)
        return (images - self.mean) / self.std

    def forward(self, images: Images) -> Logits:
        """``[N, C, H, W]`` in [0, 1] to logits ``[N, num_classes]``."""
        quick = self._valid_quick()
        network = self.network if quick is None else quick.network
        logits: Logits = network(self.normalise(images))
        return logits

    def trace(self, images: Images) -> Trace:
        """Embedding, input of the head and, where there is a tail, the activation at its beginning, from one run.

        On the CPU, a small batch is padded to more rows than there are threads: below that, the convolution
        library splits one image over the threads and rounds differently. With the padding an image has, to the
        bit, the same embedding whatever else is in its batch.
        """
        count = len(images)
        images = padded(images)
        quick = self._valid_quick()
        trunk = self._trunk[0] if quick is None else quick.trunk
        embedding, head_input, *rest = trunk(self.normalise(images))
        flat = pooled(embedding)[:count]
        return Trace(
            embedding=flat,
            head_input=flat if head_input is embedding else pooled(head_input)[:count],
            activation=rest[0][:count] if rest else None,
        )

    def features(self, images: Images) -> tuple[Embeddings, torch.Tensor]:
        """Embedding ``[N, D]`` and the input of the head ``[N, D']``; see ``trace``."""
        trace = self.trace(images)
        return trace.embedding, trace.head_input

    def embed(self, images: Images) -> Embeddings:
        """``[N, C, H, W]`` in [0, 1] to ``[N, D]``; maps and token sequences are averaged over their positions."""
        return self.features(images)[0]

    def private_network(self) -> nn.Module:
        """A copy of the network (normalised images in, logits out) whose weights can be trained.

        Still in evaluation mode: running statistics stay frozen, affine parameters train.
        """
        return copy.deepcopy(self.network).requires_grad_(True)

    def private_tail(self) -> nn.Module:
        """A copy of the tail (activation in, logits out) whose weights can be trained; otherwise as private_network.

        Raises ModelError where there is no tail.
        """
        return copy.deepcopy(self.tail).requires_grad_(True)


def missing_rows(count: int, device: torch.device) -> int:
    """How many rows a small batch lacks for an image to be the same, to the bit, in every batch; see ``trace``."""
    missing = torch.get_num_threads() + 1 - count
    return missing if device.type == "cpu" and count and 0 < missing < _CANONICAL_BATCH_LIMIT else 0


def padded(rows: torch.Tensor) -> torch.Tensor:
    """``[N, ...]`` with what a small batch lacks, copies of the first row."""
    missing = missing_rows(len(rows), rows.device)
    return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows


def pooled(activations: torch.Tensor) -> torch.Tensor:
    """``[N, ...]`` to ``[N, D]``: maps and token sequences are averaged over their positions."""
    if activations.ndim == 4:  # [N, C, H, W]
        return activations.mean((2, 3))
    if activations.ndim == 3:  # [N, tokens, D]
        return activations.mean(1)
    if activations.ndim == 2:
        return activations
    raise ModelError(f"an embedding layer must give 2 to 4 dimensions, this one gives {tuple(activations.shape)}")


def build_classifier(
    arch: str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    embedding_layer: str = DEFAULT_LAYER,
    tail_layer: str | None = None,
) -> Classifier:
    """A classifier with fresh weights; normalisation as the architecture has it unless given.

    Raises ModelError where the architecture is unknown, cannot take images of this shape or cannot be cut as asked.
    While this runs, no other thread may run a network: see ``_BUILDING``.
    """
    built = build_network(arch, num_classes=num_classes, image_shape=image_shape)
    mean, std = mean or built.mean, std or built.std
    if image_shape[0] not in (1, built.in_channels) or len(mean) != built.in_channels or len(std) != built.in_channels:
        raise ModelError(
            f"{arch} takes {built.in_channels} channels; seen: images with {image_shape[0]}, "
            f"a mean of {len(mean)} and a deviation of {len(std)} numbers"
        )
    if not all(map(math.isfinite, mean)) or not all(math.isfinite(s) and s > 0 for s in std):
        raise ModelError(
            f"a mean of {list(mean)} and a deviation of {list(std)} cannot normalise; allowed: finite, above 0"
        )
    spec = ModelSpec(
        arch=arch,
        num_classes=num_classes,
        image_shape=image_shape,
        mean=mean,
        std=std,
        embedding_layer=embedding_layer,
        tail_layer=tail_layer,
    )
    return _probed(built.network, spec)


def _probed(network: nn.Module, spec: ModelSpec) -> Classifier:
    """Wraps the network and runs it once, to say early and in one line that shapes do not fit."""
    try:
        with _BUILDING, torch.no_grad():
            classifier = Classifier(network, spec)
            logits: object = classifier(torch.zeros(2, *spec.image_shape))
            classifier.features(torch.zeros(2, *spec.image_shape))
    except ModelError:
        raise
    except Exception as error:  # shape errors surface as many types
        shape = "x".join(map(str, spec.image_shape))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{spec.arch} cannot take {shape} images: {reason}") from error
    if not isinstance(logits, torch.Tensor):
        raise ModelError(f"{spec.arch} returns a {type(logits).__name__}; it must return one tensor of logits")
    if logits.shape != (2, spec.num_classes):
        raise ModelError(
            f"{spec.arch} gives {tuple(logits.shape[1:])} logits an image; the data has {spec.num_classes} classes"
        )
    return classifier
