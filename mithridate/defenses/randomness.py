"""Randomness that belongs to an image, not to its place.

A request has one seed. Every image of it draws for itself, from that seed and its own pixels, as they came: two images
of a request draw independently, and an image draws the same alone, in a batch and beside other requests. What a network
made of an image would not do for that: its last bits depend on the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch

from mithridate.types import Images

_BITS = 63  # what torch.Generator takes


def row_seeds(seeds: Sequence[int], images: Images) -> tuple[int, ...]:
    """A seed for each of ``images`` ``[N, C, H, W]`` out of its request's, ``seeds`` (one a row)."""
    rows = images.detach().to("cpu", torch.float32).flatten(1).numpy()
    return tuple(_mix(seed, row.tobytes()) for seed, row in zip(seeds, rows, strict=True))


def pass_seeds(rows: Sequence[int], passes: Iterable[int]) -> tuple[int, ...]:
    """A seed for each of ``passes`` of every image, those of an image side by side; ``rows`` as ``row_seeds`` gives
    them. It depends on the image and the number alone, not on which other passes are run with it.
    """
    numbers = list(passes)
    return tuple(_mix(row, number.to_bytes(8, "little")) for row in rows for number in numbers)


def pass_generators(rows: Sequence[int], passes: Iterable[int]) -> list[torch.Generator]:
    """CPU generators seeded with ``pass_seeds``."""
    return [torch.Generator().manual_seed(seed) for seed in pass_seeds(rows, passes)]


def _mix(seed: int, rest: bytes) -> int:
    key = seed.to_bytes(16, "little", signed=True)
    digest = hashlib.blake2b(rest, digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") >> (64 - _BITS)
