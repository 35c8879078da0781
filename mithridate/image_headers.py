"""What an image file says of itself, read before a decoder sees it: type, size, orientation, animation.

Uploaded bytes may be hostile, so the container is walked here first, in bounded time, and what goes on to
Pillow is a copy without metadata. Pillow's own EXIF, text and multi-picture parsers are thereby never
reached: they warn through process-wide state, which cannot be silenced safely in a pool of threads.
``mithridate.images`` is the public face.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from mithridate.errors import ImageMalformedError, ImageTooLargeError, ImageTypeError

ImageKind: TypeAlias = Literal["JPEG", "PNG", "WebP"]

MAX_SCANS: Final = 100  # an encoder writes about ten; each one costs a pass over all pixels
MAX_SEGMENTS: Final = 100_000  # 16 MiB in chunks of 4 KiB are 4,096; each one costs about a microsecond
_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_CRITICAL: Final = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_WEBP_PIXELS: Final = frozenset({b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"})
_JPEG_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE: Final = frozenset([0x00, 0x01, *range(0xD0, 0xD9)])  # markers without a length: TEM, restart, start
_JPEG_MARKER: Final = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")  # not stuffing, fill or a restart
_JPEG_METADATA: Final = frozenset(range(0xE1, 0xF0)) - {0xEE} | {0xFE}  # not JFIF, Adobe: they tell the colour space


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What is refused before a pixel is decoded: more bytes, pixels in all, or pixels a side than this."""

    max_bytes: int = 16 * 1024 * 1024
    max_pixels: int = 16_777_216
    max_side: int = 16_384


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """What the container says; sizes are before EXIF orientation. ``grey``: no colour channels are stored."""

    kind: ImageKind
    width: int
    height: int
    grey: bool


@dataclass(frozen=True, kw_only=True)
class Container:
    """A header, and ``payload``: the same file with nothing in it but what the pixels need."""

    header: ImageHeader
    payload: bytes
    exif: bytes = b""
    animated: bool = False
    scans: int = 1


def open_container(data: bytes, limits: ImageLimits) -> Container:
    """Walk the container of a JPEG, PNG or WebP file, known by its first bytes; hold it to ``limits``.

    Raises ``ImageTypeError``, ``ImageTooLargeError`` and ``ImageMalformedError``.
    """
    if not data:
        raise ImageMalformedError("image is empty (0 bytes): send a JPEG, PNG or WebP file")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"image has {len(data):,} bytes: at most {limits.max_bytes:,} are allowed")
    if data.startswith(b"\xff\xd8\xff"):
        walk = _walk_jpeg
    elif data.startswith(_PNG_SIGNATURE):
        walk = _walk_png
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        walk = _walk_webp
    else:
        raise ImageTypeError(f"image starts with {data[:8]!r}: allowed are JPEG, PNG and WebP files")
    try:
        container = walk(data)
    except (struct.error, IndexError) as error:  # read past the end
        message = f"image is truncated: it ends inside its header, after {len(data):,} bytes"
        raise ImageMalformedError(message) from error
    _check_size(container, limits)
    return container


def orientation(exif: bytes) -> int:
    """The orientation, 1 (upright) to 8, in an EXIF block; 1 where there is none or it makes no sense.

    Source: EXIF 2.32 section 4.6.2 (a TIFF header, then 12-byte entries); tag 0x0112, type SHORT.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    endian = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if endian is None:
        return 1
    try:
        (offset,) = struct.unpack_from(f"{endian}I", exif, 4)
        (count,) = struct.unpack_from(f"{endian}H", exif, offset)
        for entry in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{endian}HHIH", exif, entry)
            if tag == 0x0112:
                return int(value) if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:  # an offset or a count that points past the end
        return 1
    return 1


def _check_size(container: Container, limits: ImageLimits) -> None:
    header = container.header
    seen = f"{header.kind} image of {header.width}x{header.height} px"
    if not header.width or not header.height:
        raise ImageMalformedError(f"{seen}: both sides must be at least 1 px")
    if max(header.width, header.height) > limits.max_side:
        raise ImageTooLargeError(f"{seen}: at most {limits.max_side:,} px a side are allowed")
    if header.width * header.height > limits.max_pixels:
        raise ImageTooLargeError(f"{seen}: at most {limits.max_pixels:,} pixels are allowed")
    if container.scans > MAX_SCANS:
        raise ImageTooLargeError(f"{seen} in {container.scans:,} scans: at most {MAX_SCANS} scans are allowed")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of every chunk, checksum verified: Pillow itself skips the checksums of pixels."""
    start = len(_PNG_SIGNATURE)
    for _ in range(MAX_SEGMENTS):
        length, name = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            raise ImageMalformedError(f"PNG image is truncated: {len(data):,} bytes seen, {end:,} needed")
        if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise ImageMalformedError(f"PNG image is corrupt: chunk {name!r} at byte {start:,} fails its checksum")
        yield name, start, end
        if name == b"IEND":
            return
        start = end
    raise ImageTooLargeError(f"PNG image has over {MAX_SEGMENTS:,} chunks: at most that many are allowed")


def _walk_png(data: bytes) -> Container:
    """PNG specification (third edition), 5 and 11; a colour key (tRNS) is kept for 8-bit pixels only."""
    kept, names, exif, animated = [_PNG_SIGNATURE], set[bytes](), b"", False
    width = height = depth = color = 0
    for name, start, end in _png_chunks(data):
        body = data[start + 8 : end - 4]
        critical = name[0] & 0x20 == 0
        if (name == b"IHDR") is bool(names) or (critical and name not in _PNG_CRITICAL):
            raise ImageMalformedError(f"PNG image is corrupt: unexpected chunk {name!r} at byte {start:,}")
        if name == b"IHDR":
            width, height, depth, color = struct.unpack_from(">IIBB", body)
        if critical or (name == b"tRNS" and depth < 16):
            kept.append(data[start:end])
        elif name == b"eXIf":
            exif = body
        elif name == b"fdAT" or (name == b"acTL" and struct.unpack_from(">I", body)[0] > 1):
            animated = True
        names.add(name)
    if b"IDAT" not in names:
        raise ImageMalformedError("PNG image is corrupt: it holds no pixels (no IDAT chunk)")
    header = ImageHeader(kind="PNG", width=width, height=height, grey=color in (0, 4))
    return Container(header=header, payload=b"".join(kept), exif=exif, animated=animated)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment up to the first scan; libjpeg too skips bytes between them."""
    start = 2
    for _ in range(MAX_SEGMENTS):
        start = data.find(b"\xff", start)
        if start < 0 or data[start + 1] == 0xD9:
            raise ImageMalformedError(f"JPEG image is truncated or corrupt: no pixels in its {len(data):,} bytes")
        marker = data[start + 1]
        if marker == 0xFF or marker in _JPEG_BARE:
            start += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, start + 2)
        end = start + 2 + length
        if length < 2 or end > len(data):
            raise ImageMalformedError(f"JPEG image is truncated or corrupt: bad segment at byte {start:,}")
        yield marker, start, end
        if marker == 0xDA:
            return
        start = end
    raise ImageTooLargeError(f"JPEG image has over {MAX_SEGMENTS:,} segments: at most that many are allowed")


def _walk_jpeg(data: bytes) -> Container:
    """ITU-T T.81 annex B. A picture after the first one (MPO) stays where it is: no decoder looks there."""
    kept, exif, header = [data[:2]], b"", None
    pixels = 0
    for marker, start, end in _jpeg_segments(data):
        body = data[start + 4 : end]
        if marker in _JPEG_FRAMES:
            if header is not None:
                raise ImageMalformedError("JPEG image is corrupt: it has two frame headers")
            _, height, width, components = struct.unpack_from(">BHHB", body)
            header = ImageHeader(kind="JPEG", width=width, height=height, grey=components == 1)
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif = exif or body
        if marker == 0xDA:
            pixels = start
        elif marker not in _JPEG_METADATA:
            kept.append(data[start:end])
    if header is None:
        raise ImageMalformedError("JPEG image is corrupt: pixels come before the frame header")
    end = _jpeg_end(data, pixels)
    scans = data.count(b"\xff\xda", pixels, end)  # among entropy-coded bytes 0xda never follows 0xff
    return Container(header=header, payload=b"".join([*kept, data[pixels:end]]), exif=exif, scans=scans)


def _jpeg_end(data: bytes, start: int) -> int:
    """Where the first picture ends: a film or an archive may follow, and be megabytes. ``start``: its first scan."""
    for _ in range(MAX_SEGMENTS):
        found = _JPEG_MARKER.search(data, start)
        if found is None:
            return len(data)
        start, marker = found.end(), data[found.end() - 1]
        if marker == 0xD9:
            return start
        if marker not in _JPEG_BARE:
            start += int.from_bytes(data[start : start + 2])
    raise ImageTooLargeError(f"JPEG image has over {MAX_SEGMENTS:,} segments: at most that many are allowed")


def _walk_webp(data: bytes) -> Container:
    """RFC 9649, sections 2.5 to 2.7. The size is in the first chunk: libwebp allocates the canvas when it opens."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        _ = data[29]
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
    elif chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif chunk == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise ImageMalformedError(f"WebP image is corrupt: first chunk {chunk!r}; allowed are VP8, VP8L and VP8X")
    header = ImageHeader(kind="WebP", width=width, height=height, grey=False)
    kept, exif, frames = [b""], b"", 0
    for name, start, end in _webp_chunks(data):
        if name == b"VP8X":  # says no longer that there are a profile, EXIF and XMP
            kept.append(data[start : start + 8] + bytes([data[start + 8] & ~0x2C]) + data[start + 9 : end])
        elif name in _WEBP_PIXELS:
            kept.append(data[start:end])
            frames += name == b"ANMF"
        elif name == b"EXIF":
            exif = exif or data[start + 8 : end]
    kept[0] = b"RIFF" + struct.pack("<I", 4 + sum(map(len, kept))) + b"WEBP"
    return Container(header=header, payload=b"".join(kept), exif=exif, animated=frames > 1)


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end with padding) of every chunk in the RIFF container; what follows it is nobody's."""
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 > len(data):
        raise ImageMalformedError(f"WebP image is truncated: {len(data):,} bytes seen, {size + 8:,} needed")
    start = 12
    for _ in range(MAX_SEGMENTS):
        if start >= size + 8:
            return
        name, length = struct.unpack_from("<4sI", data, start)
        end = start + 8 + length + length % 2
        if start + 8 + length > size + 8:
            raise ImageMalformedError(f"WebP image is corrupt: chunk {name!r} at byte {start:,} does not end in it")
        yield name, start, end
        start = end
    raise ImageTooLargeError(f"WebP image has over {MAX_SEGMENTS:,} chunks: at most that many are allowed")
