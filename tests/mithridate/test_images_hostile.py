"""Files made to harm: metadata that unpacks, archives with an image before them, bytes that make no sense."""

from __future__ import annotations

import contextlib
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_helpers import SAMPLES, chunk, zeros

from benchmarks.image_mutations import mutate, seeds
from mithridate.errors import (
    ImageError,
    ImageMalformedError,
    ImageTooLargeError,
    ImageTypeError,
    ImageUnusableError,
)
from mithridate.image_headers import MAX_SEGMENTS, open_container
from mithridate.images import ImageLimits, Resize, UInt8Image, decode_image, fit_image, open_image

CORPUS = seeds()


def chunks_of(kind: str) -> Callable[..., bytes]:
    return {"PNG": png_with, "JPEG": jpeg_with, "WEBP": webp_with}[kind]


def png_with(*metadata: tuple[bytes, bytes]) -> bytes:
    data = SAMPLES["grey png"]
    return data[:33] + b"".join(chunk(name, body) for name, body in metadata) + data[33:]


def jpeg_with(*metadata: tuple[bytes, bytes]) -> bytes:
    data = SAMPLES["jpeg"]
    return data[:2] + b"".join(m + struct.pack(">H", len(body) + 2) + body for m, body in metadata) + data[2:]


def webp_with(*metadata: tuple[bytes, bytes]) -> bytes:
    body = SAMPLES["webp"][12:] + b"".join(
        name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for name, body in metadata
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


SECRET = b"a name, a place and a time"
ZIPPED = b"x\0\0" + zlib.compress(bytes(50_000_000))
METADATA = {
    "PNG text": ("PNG", (b"tEXt", b"Author\0" + SECRET)),
    "PNG zTXt bomb": ("PNG", (b"zTXt", ZIPPED)),
    "PNG iTXt bomb": ("PNG", (b"iTXt", b"x\0\1\0\0\0" + ZIPPED[3:])),
    "PNG iCCP bomb": ("PNG", (b"iCCP", ZIPPED)),
    "PNG of no known name": ("PNG", (b"seCr", SECRET)),
    "JPEG comment": ("JPEG", (b"\xff\xfe", SECRET)),
    "JPEG XMP": ("JPEG", (b"\xff\xe1", b"http://ns.adobe.com/xap/1.0/\0" + SECRET)),
    "JPEG profile": ("JPEG", (b"\xff\xe2", b"ICC_PROFILE\0\1\1" + bytes(60_000))),
    "WebP profile": ("WEBP", (b"ICCP", bytes(5_000_000))),
    "WebP XMP": ("WEBP", (b"XMP ", SECRET)),
    "WebP of no known name": ("WEBP", (b"secr", SECRET)),
}


@pytest.mark.parametrize(("kind", "part"), METADATA.values(), ids=METADATA)
def test_metadata_never_reaches_the_decoder(kind: str, part: tuple[bytes, bytes]) -> None:
    """Nor is it unpacked: 50 MB of zeros in a text chunk are 50 KB, and no memory here."""
    container = open_container(chunks_of(kind)(part), ImageLimits())
    assert part[1] not in container.payload
    assert len(container.payload) < 5000
    plain = decode_image(chunks_of(kind)(), channels=3)
    tracemalloc.start()
    decoded = decode_image(chunks_of(kind)(part), channels=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16_000_000
    np.testing.assert_array_equal(decoded, plain)


@pytest.mark.parametrize("name", ["grey png", "jpeg", "progressive jpeg", "webp", "lossless webp"])
@pytest.mark.parametrize(
    "tail", [b"PK\3\4" + bytes(60), b"<?php system($_GET[0]); ?>", b"\xff\xda" * 200, SAMPLES["webp"]]
)
def test_what_follows_an_image_is_never_looked_at(name: str, tail: bytes) -> None:
    """An archive, a script, a phone's film: the pixels are the image's, and nothing else is used or kept."""
    plain, joined = SAMPLES[name], SAMPLES[name] + tail
    np.testing.assert_array_equal(decode_image(joined, channels=3), decode_image(plain, channels=3))
    assert tail not in open_container(joined, ImageLimits()).payload


@pytest.mark.parametrize("head", [b"GIF89a", b"PK\3\4", b"\0", b"\n", b"%PDF-1.4\n", b"\xff"])
def test_an_image_with_something_before_it_is_none(head: bytes) -> None:
    for data in SAMPLES.values():
        with pytest.raises((ImageTypeError, ImageMalformedError)):
            decode_image(head + data, channels=3)


def test_pixels_that_unpack_to_more_than_the_image_cost_no_more() -> None:
    """50 MB of zeros behind 8 x 8 pixels, in 220 KB."""
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(10_000_000)) for _ in range(5)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    started = time.process_time()
    with contextlib.suppress(ImageError):
        assert decode_image(data, channels=1).shape == (1, 8, 8)
    assert time.process_time() - started < 0.2


def test_webp_chunks_are_held_to_their_container() -> None:
    data = webp_with((b"XMP ", SECRET))
    for size in (len(data) - 7, 2**32 - 1):
        with pytest.raises(ImageMalformedError, match="truncated"):
            decode_image(data[:4] + struct.pack("<I", size) + data[8:], channels=3)
    with pytest.raises(ImageMalformedError, match="does not end in it"):
        decode_image(data.replace(b"XMP \x1a", b"XMP \xff"), channels=3)
    with pytest.raises(ImageTooLargeError, match="chunks"):
        decode_image(webp_with(*[(b"oops", b"")] * MAX_SEGMENTS), channels=3)


@pytest.mark.parametrize(
    ("shape", "resize"), [((3, 40, 56), "exact"), ((3, 32, 24), "center-crop"), ((1, 56, 40), "exact")]
)
def test_opening_first_gives_the_same_pixels(shape: tuple[int, int, int], resize: Resize) -> None:
    for data in SAMPLES.values():
        expected = outcome(
            lambda data=data: fit_image(decode_image(data, channels=shape[0]), shape=shape, resize=resize)
        )
        found = outcome(lambda data=data: open_image(data, shape=shape, resize=resize).decode())
        np.testing.assert_array_equal(found, expected)


def outcome(work: Callable[[], UInt8Image]) -> UInt8Image | str:
    try:
        return work()
    except ImageError as error:
        return str(error)


def test_an_image_of_the_wrong_size_is_refused_by_its_header() -> None:
    broken = zeros(4000, 4000)[:-30] + chunk(b"IEND", b"")[:12].rjust(30, b"\0")
    with pytest.raises(ImageError):
        decode_image(broken, channels=1)
    whole = zeros(4000, 4000)
    with pytest.raises(ImageUnusableError, match="4000x4000 px, this model takes exactly 8x8"):
        open_image(whole, shape=(1, 8, 8), resize="exact")
    with pytest.raises(ImageUnusableError, match="aspect ratio"):
        open_image(zeros(4000, 400), shape=(1, 8, 8), resize="center-crop")
    assert open_image(whole, shape=(1, 8, 8), resize="center-crop").pixels == 16_000_000


@given(numbers=st.lists(st.integers(0, 2**32), min_size=200, max_size=200))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_files_damaged_by_their_structure_raise_nothing_but_image_errors(numbers: list[int]) -> None:
    """Two thousand; benchmarks/fuzz_decode.py has taken a hundred thousand."""
    limits = ImageLimits(max_pixels=200_000)
    for number in numbers:
        draw = random.Random(number)
        data = mutate(draw.choice(CORPUS), draw, CORPUS)
        with contextlib.suppress(ImageError):
            assert decode_image(data, channels=1 + number % 2 * 2, limits=limits).size <= 600_000
