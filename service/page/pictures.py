"""Pictures that travel inside the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mithridate.exemplars import ExemplarStore
from mithridate.images import decode_image, encode_png
from service.schemas import Neighbor

SMALL = 64
"""Images up to so many pixels a side are shown with their pixels, larger ones smoothly."""
_THUMBNAIL = 96


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """One neighbour with its picture; ``picture`` None where training images are not to be seen."""

    neighbor: Neighbor
    picture: str | None


def thumbnails(exemplars: ExemplarStore, neighbors: list[Neighbor], *, visible: bool) -> list[Thumbnail]:
    """As data addresses: what is allowed to see the answer gets them with it, and nobody later from anywhere."""
    if not neighbors:
        return []
    pictures: list[str | None] = [None] * len(neighbors)
    if visible:
        pixels = exemplars.pixels(torch.tensor([neighbor.exemplar for neighbor in neighbors])).numpy()
        pictures = [data_address(_shrunk(image)) for image in pixels]
    return [Thumbnail(neighbor=neighbor, picture=found) for neighbor, found in zip(neighbors, pictures, strict=True)]


def difference(clean_png: str, adversarial_png: str, channels: int) -> tuple[str, int]:
    """Adversarial minus clean around mid-grey as a data address, and by how much it is amplified."""
    before, after = (
        decode_image(base64.b64decode(png), channels=channels).astype(np.int32) for png in (clean_png, adversarial_png)
    )
    change = after - before
    factor = max(1, 127 // max(1, int(np.abs(change).max())))
    return data_address((128 + factor * change).clip(0, 255).astype(np.uint8)), factor


def data_address(image: NDArray[np.uint8]) -> str:
    """A PNG of uint8 ``[C, H, W]``."""
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()


def _shrunk(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if max(image.shape[1:]) <= _THUMBNAIL:
        return image
    picture = Image.open(io.BytesIO(encode_png(image)))
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    pixels = np.asarray(picture)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
