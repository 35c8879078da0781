"""Image files damaged as an attacker would: by their structure, checksums repaired, and now and then by the byte.

Every mutation is a function of a ``random.Random`` alone, so that a seed repeats all of them.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
MAX_BYTES = 500_000
NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    16_383,
    16_384,
    32_768,
    65_535,
    65_536,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
)


def _save(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def seeds() -> list[bytes]:
    """Small valid files of every kind that the decoder takes, and two animations."""
    noise = np.random.Generator(np.random.PCG64(7)).integers(0, 256, (13, 19, 4), dtype=np.uint8)
    smooth = np.add.outer(5 * np.arange(24), 3 * np.arange(40)).astype(np.uint8)
    rgba, grey = Image.fromarray(noise), Image.fromarray(smooth)
    rgb = rgba.convert("RGB")
    soft = Image.merge("RGB", [grey, grey.transpose(Image.Transpose.ROTATE_180), grey])
    sixteen = Image.fromarray(smooth.astype(np.uint16) * 257)
    pngs = [grey, grey.convert("1"), rgb, rgba, rgba.convert("LA"), sixteen, rgb.quantize(16)]
    frames = {"save_all": True, "append_images": [soft.rotate(180)], "duration": 40}
    return [
        *(_save(image, "PNG") for image in pngs),
        _save(rgb.quantize(16), "PNG", transparency=3, exif=EXIF, icc_profile=bytes(300)),
        *(_save(soft, "JPEG", progressive=progressive, exif=EXIF) for progressive in (False, True)),
        _save(grey, "JPEG", restart_marker_blocks=2),
        _save(soft.convert("CMYK"), "JPEG", subsampling=0),
        _save(soft, "WEBP"),
        _save(soft, "WEBP", exif=EXIF, icc_profile=bytes(300)),
        _save(rgba, "WEBP"),
        _save(rgba, "WEBP", lossless=True),
        _save(soft, "PNG", **frames),
        _save(soft, "WEBP", **frames),
    ]


def mutate(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """One to four mutations of ``data``; ``others`` are files to take parts from."""
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4))):
        structural = draw.random() < 0.7
        if structural and data.startswith(b"\x89PNG"):
            data = _png(data, draw)
        elif structural and data.startswith(b"RIFF"):
            data = _webp(data, draw)
        elif structural and data.startswith(b"\xff\xd8"):
            data = _jpeg(data, draw)
        else:
            data = draw.choice(_BYTES)(data, draw, draw.choice(others))
        data = data[:MAX_BYTES]
    return data


def _flip(data: bytes, draw: random.Random, other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        if out:
            out[draw.randrange(len(out))] = draw.randrange(256)
    return bytes(out)


def _number(data: bytes, draw: random.Random, other: bytes) -> bytes:
    packed = struct.pack(draw.choice((">I", "<I", ">H", "<H")).replace("H", "I"), draw.choice(NUMBERS))
    packed = packed[: draw.choice((1, 2, 3, 4))]
    at = draw.randrange(len(data) + 1)
    return data[:at] + packed + data[at + len(packed) :]


def _cut(data: bytes, draw: random.Random, other: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _splice(data: bytes, draw: random.Random, other: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)] + other[draw.randrange(len(other)) :]


def _repeat(data: bytes, draw: random.Random, other: bytes) -> bytes:
    start, length = draw.randrange(len(data) + 1), draw.choice((1, 4, 12, 100))
    return data[:start] + data[start : start + length] * draw.choice((2, 3, 50)) + data[start + length :]


def _append(data: bytes, draw: random.Random, other: bytes) -> bytes:
    return data + draw.choice((other, bytes(100), b"PK\3\4" + other, b"<?php ?>", draw.randbytes(50)))


_BYTES: tuple[Callable[[bytes, random.Random, bytes], bytes], ...] = (_flip, _number, _cut, _splice, _repeat, _append)


def _blur(body: bytes, draw: random.Random) -> bytes:
    return draw.choice(_BYTES[:2])(body, draw, b"") if body else draw.randbytes(draw.randint(0, 20))


def _shuffle(parts: list[Any], draw: random.Random) -> None:
    """Drops, doubles or moves one of a file's parts."""
    if not parts:
        return
    at = draw.randrange(len(parts))
    action = draw.randrange(3)
    part = parts.pop(at)
    if action:
        parts.insert(draw.randrange(len(parts) + 1), part)
    if action == 2:
        parts.insert(draw.randrange(len(parts) + 1), part)


def _blur_one(chunks: list[tuple[bytes, bytes]], draw: random.Random) -> None:
    at = draw.randrange(len(chunks))
    chunks[at] = (chunks[at][0], _blur(chunks[at][1], draw))


def _png(data: bytes, draw: random.Random) -> bytes:
    """Chunks changed, moved, doubled, made up; pixels changed under their compression; all checksums right."""
    chunks, at = list[tuple[bytes, bytes]](), 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    action = draw.randrange(5)
    if action == 0:
        _shuffle(chunks, draw)
    elif action == 1 and chunks:
        _blur_one(chunks, draw)
    elif action == 2 and chunks and len(chunks[0][1]) == 13:
        width, height = (draw.choice((1, 8, 19, 24, 40, 4000, 16_384)) for _ in "wh")
        rest = bytes([draw.choice((1, 2, 4, 8, 16)), draw.choice((0, 2, 3, 4, 6)), 0, 0, draw.randrange(2)])
        chunks[0] = (b"IHDR", struct.pack(">II", width, height) + rest)
    elif action == 3:
        bomb = b"x\0\0" + zlib.compress(bytes(draw.choice((10, 100_000))))
        name = draw.choice((b"iCCP", b"zTXt", b"iTXt", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"IEND"))
        chunks.insert(draw.randrange(len(chunks) + 1), (name, draw.choice((bomb, EXIF[6:], b"", draw.randbytes(26)))))
    else:
        for at, (name, body) in enumerate(chunks):
            if name == b"IDAT":
                pixels = zlib.decompressobj()
                try:
                    rows = _blur(pixels.decompress(body, 1_000_000), draw)
                except zlib.error:
                    break
                chunks[at] = (name, zlib.compress(rows + bytes(draw.choice((0, 0, 0, 500_000))), draw.randrange(10)))
                break
    packed = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    return data[:8] + b"".join(packed)


def _webp(data: bytes, draw: random.Random) -> bytes:
    chunks, at = list[tuple[bytes, bytes]](), 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        chunks.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    action = draw.randrange(4)
    if action == 0:
        _shuffle(chunks, draw)
    elif action == 1 and chunks:
        _blur_one(chunks, draw)
    elif action == 2:
        name = draw.choice((b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP", b"EXIF", b"XMP ", b"VP8L", b"VP8 ", b"oops"))
        chunks.insert(draw.randrange(len(chunks) + 1), (name, draw.choice((EXIF, b"", draw.randbytes(10), bytes(100)))))
    elif chunks:
        side = (draw.choice((1, 24, 40, 4000, 16_383)) - 1).to_bytes(3, "little")
        chunks[0] = (b"VP8X", bytes([draw.randrange(256), 0, 0, 0]) + side + side)
    body = b"".join(n + struct.pack("<I", len(b)) + b + bytes(len(b) % 2) for n, b in chunks)
    size = len(body) + 4 if draw.random() < 0.9 else draw.choice(NUMBERS)
    return b"RIFF" + struct.pack("<I", size) + b"WEBP" + body


def _jpeg(data: bytes, draw: random.Random) -> bytes:
    """Segments changed, moved, doubled, made up; the first scan and what follows goes with the last one."""
    segments, at = list[bytes](), 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):
        end = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))
        segments.append(data[at:end])
        at = end
    pixels = data[at:]
    action = draw.randrange(5)
    if action == 0:
        _shuffle(segments, draw)
    elif action == 1 and segments:
        at = draw.randrange(len(segments))
        segments[at] = segments[at][:4] + _blur(segments[at][4:], draw)
    elif action == 2:
        body = draw.choice((EXIF, b"", b"Adobe\0\x64\0\0\0\0\x02", b"MPF\0MM\0*" + bytes(40), draw.randbytes(30)))
        marker = draw.choice((0xE1, 0xE2, 0xEE, 0xFE, 0xC0, 0xC2, 0xC4, 0xC9, 0xDB, 0xDD, 0xDC, 0x01, 0xF0))
        made_up = bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
        segments.insert(draw.randrange(len(segments) + 1), made_up)
    elif action == 3:
        pixels = pixels[:-2] * draw.choice((2, 60, 150)) + pixels[-2:]
    else:
        pixels = _flip(pixels, draw, b"")
    return data[:2] + b"".join(segments) + pixels
