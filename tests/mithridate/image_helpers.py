"""Image files for the tests of the decoder, among them what Pillow does not write."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

RNG = np.random.Generator(np.random.PCG64(7))
PHOTO = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)  # [H, W, C]
SMOOTH = np.add.outer(np.arange(40), np.arange(56))[..., np.newaxis].repeat(3, axis=2).astype(np.uint8)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *, depth: int = 8, color: int = 0, pixels: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG written by hand, for what Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + chunk(b"IEND", b"")


def oriented(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    exif[0x0132] = "2026:01:01 00:00:00"
    return exif


SAMPLES: dict[str, bytes] = {
    "grey png": save(Image.fromarray(PHOTO[..., 0]), "PNG"),
    "color png": save(Image.fromarray(PHOTO), "PNG", exif=oriented(3)),
    "palette png": save(Image.fromarray(PHOTO).quantize(16), "PNG", transparency=3),
    "jpeg": save(Image.fromarray(SMOOTH), "JPEG", exif=oriented(6)),
    "progressive jpeg": save(Image.fromarray(SMOOTH), "JPEG", progressive=True),
    "cmyk jpeg": save(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"),
    "webp": save(Image.fromarray(SMOOTH), "WEBP", exif=oriented(8)),
    "lossless webp": save(Image.fromarray(PHOTO), "WEBP", lossless=True),
}


def zeros(width: int, height: int) -> bytes:
    return png(width, height, depth=1, pixels=bytes((1 + (width + 7) // 8) * height))
