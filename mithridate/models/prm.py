"""PRM, the pixel robustness manipulator: an autoencoder that reads few of an image's pixels.

Hwang, Jang, Choi, Choi: Where to be Adversarial Perturbations Added? Investigating and Manipulating Pixel Robustness
Using Input Gradients (ICLR 2019 workshop). A U-Net g whose first convolution is sparse, trained to give the whole image
back. Put before a classifier as (1 - lambda) x + lambda g(x), it leads the gradient through the pixels that it reads,
the lattice; with lambda = 1 no other pixel has any.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from mithridate.errors import ModelError, OptionError
from mithridate.models.weights import HEADER, load_weights, read_metadata
from mithridate.types import Images

Pair = tuple[int, int]

VARIANTS: dict[str, tuple[Pair, Pair]] = {
    "v0": ((1, 1), (2, 2)),
    "v1": ((1, 1), (2, 1)),
    "v2": ((1, 1), (1, 2)),
    "v3": ((1, 2), (2, 4)),
    "v4": ((2, 1), (4, 2)),
    "v5": ((2, 2), (4, 4)),
}
"""Kernel and stride, (rows, columns), of the first convolution: v1 and v2 read half of the pixels, the others a
quarter."""

SIZES: dict[str, tuple[int, ...]] = {"unet": (64, 128, 256, 512, 1024), "small": (32, 64, 128)}
"""Channels by level. ``unet`` is the published one (31 million weights). ``small`` is ours for images of few pixels; it
adds to the enlarged pixels that it reads what they miss, which is learned in a tenth of the steps.
"""

_SMALL_UP_TO = 64

KIND = "prm"


@dataclass(frozen=True, kw_only=True)
class PRMSpec:
    """Everything but the weights."""

    variant: str
    size: Literal["unet", "small"]
    image_shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise OptionError(f"unknown PRM variant {self.variant!r}; allowed: {', '.join(VARIANTS)}")
        if self.size not in SIZES:
            raise OptionError(f"unknown PRM size {self.size!r}; allowed: {', '.join(SIZES)}")


def default_size(image_shape: tuple[int, int, int]) -> Literal["unet", "small"]:
    """``small`` up to 64 pixels a side."""
    return "small" if max(image_shape[1:]) <= _SMALL_UP_TO else "unet"


class PRM(nn.Module):
    """``[N, C, H, W]`` in [0, 1] to a reconstruction of the same shape, which may leave [0, 1] a little.

    The first convolution has as many outputs as it reads numbers, so that it loses none of them; for v0 to v2 that is
    the published one, a colour for a colour.
    """

    def __init__(self, spec: PRMSpec) -> None:
        super().__init__()
        self.spec = spec
        channels, kernel, stride = spec.image_shape[0], *VARIANTS[spec.variant]
        read, widths = channels * kernel[0] * kernel[1], SIZES[spec.size]
        self.first = nn.Conv2d(channels, read, kernel, stride)
        self.down = nn.ModuleList(_block(a, b) for a, b in zip((read, *widths[:-1]), widths, strict=True))
        pairs = list(pairwise(widths))[::-1]
        self.rise = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, 2) for narrow, wide in pairs)
        self.up = nn.ModuleList(_block(2 * narrow, narrow) for narrow, _ in pairs)
        self.grow = nn.ConvTranspose2d(widths[0], widths[0], *_growth(stride))
        self.last = nn.Conv2d(widths[0], channels, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Images) -> Images:
        height, width = images.shape[2:]
        stride = self.first.stride
        # In units of about one standard deviation around grey, as networks like it.
        x = self.first((images - 0.5) * 4)
        rows, columns = -(-height // stride[0]), -(-width // stride[1])
        multiple = 2 ** (len(self.down) - 1)
        x = F.pad(
            x, (0, -(-columns // multiple) * multiple - x.shape[3], 0, -(-rows // multiple) * multiple - x.shape[2])
        )
        skipped = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            skipped.append(x)
        for rise, block, beside in zip(self.rise, self.up, skipped[-2::-1], strict=True):
            x = block(torch.cat([beside, rise(x)], 1))
        x = self.last(_grown(self.grow, x[:, :, :rows, :columns]))
        rebuilt: Images = x[:, :, :height, :width] / 4
        return rebuilt + (self._enlarged(images) if self.spec.size == "small" else 0.5)

    def _enlarged(self, images: Images) -> Images:
        """The pixels that are read, interpolated."""
        kernel, stride = self.first.kernel_size, self.first.stride
        read = F.avg_pool2d(images, kernel, stride)
        height, width = images.shape[2:]
        whole = (max(height, read.shape[2] * stride[0]), max(width, read.shape[3] * stride[1]))
        return F.interpolate(read, whole, mode="bilinear")[:, :, :height, :width]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
    )


def _growth(stride: Pair) -> tuple[Pair, Pair, int, Pair]:
    """Kernel, stride, padding and output padding that grow by ``stride``; 3 wide as published, where that is no less
    than the stride."""
    kernels = [3 if s <= 2 else s + 2 for s in stride]
    extra = [s - 1 if s <= 2 else 0 for s in stride]
    return (kernels[0], kernels[1]), stride, 1, (extra[0], extra[1])


def _grown(layer: nn.ConvTranspose2d, x: torch.Tensor) -> torch.Tensor:
    """What ``layer`` gives, as a convolution of the input with zeros in between: a transposed one is rounded
    differently in every batch, and what later stages draw must not depend on that."""
    count, channels, height, width = x.shape
    (down, right), (more_down, more_right) = layer.stride, layer.output_padding
    apart = x.new_zeros(count, channels, (height - 1) * down + 1 + more_down, (width - 1) * right + 1 + more_right)
    apart[:, :, : apart.shape[2] - more_down : down, : apart.shape[3] - more_right : right] = x
    edges = [kernel - 2 for kernel in layer.kernel_size]
    return F.conv2d(apart, layer.weight.flip(2, 3).transpose(0, 1), layer.bias, padding=(edges[0], edges[1]))


def lattice(variant: str, height: int, width: int) -> torch.Tensor:
    """bool ``[H, W]``: the pixels that a PRM of this variant reads."""
    axes = []
    for side, kernel, stride in zip((height, width), *VARIANTS[variant], strict=True):
        place = torch.arange(side)
        whole = place - place % stride + kernel <= side  # a kernel that does not fit at the end is not applied
        axes.append((place % stride < kernel) & whole)
    return axes[0][:, None] & axes[1]


def build_prm(spec: PRMSpec) -> PRM:
    """With fresh weights. Raises OptionError where the first convolution does not fit into the image."""
    (rows, columns), _ = VARIANTS[spec.variant]
    if spec.image_shape[1] < rows or spec.image_shape[2] < columns:
        raise OptionError(f"PRM {spec.variant} reads {rows}x{columns} pixels at a time; seen: {spec.image_shape}")
    return PRM(spec)


def save_prm(prm: PRM, path: Path) -> None:
    """Weights and, in the header, what is needed to build it again. Raises OSError where the disk refuses."""
    state = {key: value.detach().cpu().contiguous() for key, value in prm.state_dict().items()}
    header = {HEADER: json.dumps({"kind": KIND, **asdict(prm.spec)}, sort_keys=True)}
    path.write_bytes(save(state, metadata=header))


def load_prm(path: Path, *, image_shape: tuple[int, int, int]) -> PRM:
    """Frozen, in evaluation mode. Raises ModelError where the file is no PRM, or of other images."""
    metadata = read_metadata(path)
    if metadata.get("kind") != KIND:
        raise ModelError(f"{path} is not a PRM; make one with mithridate train --prm v0")
    try:
        shape = tuple(json.loads(metadata["image_shape"]))
        if not all(type(side) is int for side in shape):
            raise ValueError(f"image_shape is {metadata['image_shape']}")
        spec = PRMSpec(variant=metadata["variant"], size=metadata["size"], image_shape=shape)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, RecursionError, OptionError) as error:
        raise ModelError(f"the header of {path} is not readable ({error})") from error
    if shape != tuple(image_shape):
        raise ModelError(f"{path} was trained on {list(shape)} images (C, H, W); the data has {list(image_shape)}")
    prm = build_prm(spec)
    load_weights(prm, path)
    return prm.eval().requires_grad_(False)
