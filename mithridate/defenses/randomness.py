"""Randomness that belongs to an image, not to its place.

A request has one seed. Every image of it draws for itself, from that seed and its own pixels: two images of a request
draw independently, and an image draws the same alone, in a batch and beside other requests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from mithridate.types import Images

_BITS = 63  # what torch.Generator takes


def row_seeds(seeds: Sequence[int], images: Images) -> tuple[int, ...]:
    """A seed for each of ``images`` ``[N, C, H, W]`` out of its request's, ``seeds`` (one a row)."""
    rows = images.detach().to("cpu", torch.float32).flatten(1).numpy()
    return tuple(_mix(seed, row.tobytes()) for seed, row in zip(seeds, rows, strict=True))


def row_generators(seeds: Sequence[int], images: Images) -> list[torch.Generator]:
    """The same as CPU generators, one a row."""
    return [torch.Generator().manual_seed(seed) for seed in row_seeds(seeds, images)]


def _mix(seed: int, pixels: bytes) -> int:
    key = seed.to_bytes(16, "little", signed=True)
    digest = hashlib.blake2b(pixels, digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") >> (64 - _BITS)
