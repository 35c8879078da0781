"""The decoder: what a user sees is what the model gets, and no bytes raise anything but an ``ImageError``."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from image_helpers import PHOTO, SAMPLES, SMOOTH, chunk, oriented, png, save, zeros
from PIL import Image

from mithridate.errors import (
    ImageError,
    ImageMalformedError,
    ImageTooLargeError,
    ImageTypeError,
    ImageUnusableError,
    OptionError,
)
from mithridate.image_headers import MAX_SCANS, MAX_SEGMENTS
from mithridate.images import (
    ImageLimits,
    UInt8Image,
    decode_image,
    encode_png,
    fit_image,
    read_header,
    to_channels,
)


def chw(pixels: UInt8Image) -> UInt8Image:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


each_sample = pytest.mark.parametrize("data", SAMPLES.values(), ids=SAMPLES)

images = arrays(
    np.uint8,
    st.sampled_from([1, 3]).flatmap(
        lambda c: array_shapes(min_dims=2, max_dims=2, max_side=9).map(lambda hw: (c, *hw))
    ),
)


@given(image=images)
@settings(max_examples=60, deadline=None)
def test_png_round_trip_is_lossless(image: UInt8Image) -> None:
    decoded = decode_image(encode_png(image), channels=len(image))
    np.testing.assert_array_equal(decoded, image)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert decoded.flags.owndata
    assert decoded.flags.writeable


@given(image=images)
@settings(max_examples=30, deadline=None)
def test_grey_survives_a_detour_through_color(image: UInt8Image) -> None:
    grey = image[:1]
    color = to_channels(grey, 3)
    assert color.shape == (3, *grey.shape[1:])
    np.testing.assert_array_equal(to_channels(color, 1), grey)
    np.testing.assert_array_equal(decode_image(encode_png(color), channels=1), grey)
    np.testing.assert_array_equal(decode_image(encode_png(grey), channels=3), color)


def test_lossless_webp_and_png_agree() -> None:
    for data in (SAMPLES["lossless webp"], save(Image.fromarray(PHOTO), "PNG")):
        np.testing.assert_array_equal(decode_image(data, channels=3), chw(PHOTO))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_opaque_alpha_is_lossless_and_transparency_shows_white(kind: str) -> None:
    alpha = np.full(PHOTO.shape[:2], 255, np.uint8)
    alpha[0, 0], alpha[0, 1] = 0, 128
    rgba = Image.fromarray(np.dstack([PHOTO, alpha]))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    decoded = decode_image(save(rgba, kind, **options), channels=3)
    opaque = alpha == 255
    np.testing.assert_array_equal(decoded[:, opaque], chw(PHOTO)[:, opaque])
    assert decoded[:, 0, 0].tolist() == [255, 255, 255]
    blended = (PHOTO[0, 1].astype(float) * 128 + 255 * 127) / 255
    np.testing.assert_allclose(decoded[:, 0, 1], blended, atol=1)


def test_every_way_to_say_transparent_is_white() -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode=None).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    one = decode_image(save(palette, "PNG", transparency=1), channels=3)
    several = decode_image(save(palette, "PNG", transparency=bytes([255, 0, 255])), channels=3)
    np.testing.assert_array_equal(one, several)
    assert one[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
    key = decode_image(save(Image.fromarray(np.array([[5, 6]], np.uint8)), "PNG", transparency=5), channels=1)
    assert key.tolist() == [[[255, 6]]]
    grey_alpha = Image.merge("LA", [Image.new("L", (2, 1), 9), Image.fromarray(np.array([[0, 255]], np.uint8))])
    assert decode_image(save(grey_alpha, "PNG"), channels=1).tolist() == [[[255, 9]]]


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.array([[0, 128, 129, 257, 300, 32_768, 65_406, 65_407, 65_535]], np.uint16)
    expected = np.rint(levels / 257).astype(np.uint8)
    data = save(Image.fromarray(levels), "PNG")
    assert data[24] == 16  # the bit depth in the header
    np.testing.assert_array_equal(decode_image(data, channels=1)[0], expected)
    np.testing.assert_array_equal(decode_image(data, channels=3)[2], expected)


def test_16_bit_color_keeps_the_high_bytes_and_ignores_a_color_key() -> None:
    row = b"\0" + bytes.fromhex("1234 5678 9abc")
    key = chunk(b"tRNS", bytes.fromhex("0012 0056 009a"))  # not the pixel, though equal to its high bytes
    for extra in (b"", key):
        decoded = decode_image(png(1, 1, depth=16, color=2, pixels=row, extra=extra), channels=3)
        assert decoded.ravel().tolist() == [0x12, 0x56, 0x9A]


def test_one_bit_and_palette_images() -> None:
    bits = np.array([[True, False, True]])
    assert decode_image(save(Image.fromarray(bits), "PNG"), channels=1).tolist() == [[[255, 0, 255]]]
    color = decode_image(save(Image.fromarray(PHOTO).quantize(256), "PNG"), channels=3)
    np.testing.assert_array_equal(color, chw(np.asarray(Image.fromarray(PHOTO).quantize(256).convert("RGB"))))


def test_cmyk_jpeg_shows_its_colors() -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK")
    decoded = decode_image(save(red, "JPEG", quality=95), channels=3)
    np.testing.assert_allclose(decoded.mean(axis=(1, 2)), [200, 30, 40], atol=4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("number", range(1, 10))
def test_exif_orientation_is_applied(kind: str, number: int) -> None:
    """As every viewer shows the file; 9 does not exist and means upright."""
    plain, rotated = (save(Image.fromarray(SMOOTH), kind, exif=oriented(n)) for n in (1, number))
    stored = decode_image(plain, channels=1)[0]
    quarter_turns = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.T,
        6: stored[::-1].T, 7: stored[::-1, ::-1].T, 8: stored.T[::-1], 9: stored,
    }  # fmt: skip
    decoded = decode_image(rotated, channels=1)
    np.testing.assert_array_equal(decoded[0], quarter_turns[number])
    assert decoded.flags.c_contiguous


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
def test_corrupt_exif_is_no_reason_to_refuse(exif: bytes) -> None:
    decoded = decode_image(save(Image.fromarray(SMOOTH), "JPEG", exif=exif), channels=3)
    np.testing.assert_array_equal(decoded, decode_image(save(Image.fromarray(SMOOTH), "JPEG"), channels=3))


def test_what_tells_the_color_space_of_a_jpeg_is_kept() -> None:
    """Adobe's marker with transform 0: the three components are red, green and blue, not luma and chroma."""
    data = SAMPLES["jpeg"]
    end_of_jfif = 4 + struct.unpack(">H", data[4:6])[0]
    adobe = b"\xff\xee" + struct.pack(">H5sHHHB", 14, b"Adobe", 100, 0, 0, 0)
    rgb = data[:2] + adobe + data[end_of_jfif:]
    with Image.open(io.BytesIO(rgb)) as image:
        expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(decode_image(rgb, channels=3), chw(expected))
    assert not np.array_equal(decode_image(data, channels=3), chw(expected))


def test_multi_picture_jpeg_counts_as_its_first_picture() -> None:
    first, second = Image.fromarray(SMOOTH), Image.new("RGB", (8, 8))
    decoded = decode_image(save(first, "MPO", save_all=True, append_images=[second]), channels=3)
    np.testing.assert_array_equal(decoded, decode_image(save(first, "JPEG"), channels=3))


def test_a_single_frame_that_calls_itself_an_animation_is_taken() -> None:
    data = png(1, 1, pixels=b"\0\x07", extra=chunk(b"acTL", struct.pack(">II", 1, 0)))
    assert decode_image(data, channels=1).tolist() == [[[7]]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animations_are_unusable(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = save(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    with pytest.raises(ImageUnusableError, match="animated"):
        decode_image(data, channels=3)


def test_header_tells_grey_from_color() -> None:
    header = read_header(SAMPLES["grey png"])
    assert (header.kind, header.width, header.height, header.grey) == ("PNG", 17, 12, True)
    assert read_header(save(Image.fromarray(SMOOTH[..., 0]), "JPEG")).grey
    colored = {name for name, data in SAMPLES.items() if not read_header(data).grey}
    assert colored == set(SAMPLES) - {"grey png"}


@pytest.mark.parametrize(
    "data",
    [b"hello", b"\x89PN", b"<svg/>", save(Image.new("L", (2, 2)), "GIF"), save(Image.new("L", (2, 2)), "BMP"),
     save(Image.new("L", (2, 2)), "TIFF"), b"RIFF\0\0\0\0WAVEfmt "],
)  # fmt: skip
def test_other_types_are_refused_by_their_bytes(data: bytes) -> None:
    with pytest.raises(ImageTypeError, match="allowed are JPEG, PNG and WebP"):
        decode_image(data, channels=3)


def test_empty_upload() -> None:
    with pytest.raises(ImageMalformedError, match="empty"):
        decode_image(b"", channels=3)


def webp_canvas(width: int, height: int) -> bytes:
    body = b"VP8X\x0a\0\0\0\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def jpeg_of(width: int, height: int) -> bytes:
    data = SAMPLES["jpeg"]
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize("make", [zeros, webp_canvas, jpeg_of])
@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (10_000, 9_900), (16_400, 10), (5, 17_000)])
def test_pixel_bombs_are_refused_before_decoding(make: Callable[[int, int], bytes], width: int, height: int) -> None:
    """10,000 x 9,900 lies where Pillow only warns; under -W error that would be another exception."""
    with pytest.raises(ImageTooLargeError, match=rf"{width}x{height} px: at most"):
        decode_image(make(width, height), channels=3)


def test_limits_are_inclusive_and_name_what_was_seen() -> None:
    data = SAMPLES["grey png"]  # 17 x 12
    exact = ImageLimits(max_bytes=len(data), max_pixels=17 * 12, max_side=17)
    assert decode_image(data, channels=1, limits=exact).shape == (1, 12, 17)
    too_small = [
        ImageLimits(max_bytes=len(data) - 1),
        ImageLimits(max_pixels=17 * 12 - 1),
        ImageLimits(max_side=16),
    ]
    for limits, seen in zip(too_small, [f"{len(data)} bytes", "203 pixels", "16 px a side"], strict=True):
        with pytest.raises(ImageTooLargeError, match=seen):
            decode_image(data, channels=1, limits=limits)


def test_work_bombs_are_refused() -> None:
    """Thousands of scans over the same pixels, or millions of empty chunks, cost time and not size."""
    data = SAMPLES["progressive jpeg"]
    start = data.rindex(b"\xff\xda")
    scans = data[:start] + data[start:-2] * (MAX_SCANS + 1) + data[-2:]
    with pytest.raises(ImageTooLargeError, match="scans"):
        decode_image(scans, channels=3)
    with pytest.raises(ImageTooLargeError, match="chunks"):
        decode_image(png(1, 1, pixels=b"\0\0", extra=chunk(b"aaAa", b"") * MAX_SEGMENTS), channels=3)
    with pytest.raises(ImageTooLargeError, match="segments"):
        decode_image(b"\xff\xd8\xff" + b"\xff\xd0" * MAX_SEGMENTS + SAMPLES["jpeg"][2:], channels=3)


def test_two_sizes_in_one_file_are_corrupt() -> None:
    small = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    with pytest.raises(ImageMalformedError, match="unexpected chunk b'IHDR'"):
        decode_image(png(1, 1, pixels=b"\0\0", extra=small), channels=1)
    data = SAMPLES["jpeg"]
    at = data.index(b"\xff\xc0")
    frame = data[at : at + 19]
    with pytest.raises(ImageMalformedError, match="two frame headers"):
        decode_image(data[:at] + frame + data[at:], channels=3)


@pytest.mark.parametrize(
    "data",
    [png(0, 5), jpeg_of(0, 5), jpeg_of(5, 0), png(1, 1, depth=3, pixels=b"\0\0"), png(4, 4),
     SAMPLES["jpeg"][:2] + b"\xff\xfe\0\1" + SAMPLES["jpeg"][2:]],
)  # fmt: skip
def test_impossible_headers_are_malformed(data: bytes) -> None:
    with pytest.raises(ImageMalformedError):
        decode_image(data, channels=1)


@each_sample
def test_every_truncation_is_malformed(data: bytes) -> None:
    """Also the very last byte: half an image must not be classified as if it were whole."""
    decode_image(data, channels=3)
    for length in [*range(12, len(data), max(1, len(data) // 60)), len(data) - 1]:
        with pytest.raises(ImageMalformedError):
            decode_image(data[:length], channels=3)


@pytest.mark.parametrize("name", ["grey png", "color png", "palette png"])
def test_no_flipped_byte_of_a_png_goes_unnoticed(name: str) -> None:
    """Each chunk has a checksum, the one over the pixels included (Pillow alone would not look at it)."""
    data = SAMPLES[name]
    for at in range(len(data)):
        with pytest.raises((ImageMalformedError, ImageTypeError)):
            decode_image(data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :], channels=3)


@given(
    data=st.sampled_from(list(SAMPLES.values())),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255), st.booleans()), min_size=1, max_size=6),
    channels=st.sampled_from([1, 3]),
)
@settings(max_examples=100, deadline=None)
def test_damaged_files_raise_nothing_but_image_errors(
    data: bytes, edits: list[tuple[int, int, bool]], channels: int
) -> None:
    damaged = bytearray(data)
    for at, value, insert in edits:
        at %= len(damaged)
        damaged[at : at + (not insert)] = bytes([value])
    with contextlib.suppress(ImageError):
        assert decode_image(bytes(damaged), channels=channels).shape[0] == channels


def test_decoding_in_threads_gives_the_same_pixels() -> None:
    jobs = list(SAMPLES.values()) * 10
    alone = [decode_image(data, channels=3) for data in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode_image(data, channels=3), jobs))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_fit_returns_the_right_shape_unchanged() -> None:
    image = chw(PHOTO)
    assert fit_image(image, shape=(3, 12, 17), resize="exact") is image
    assert fit_image(image, shape=(3, 12, 17), resize="center-crop") is image


def test_exact_refuses_any_other_size() -> None:
    with pytest.raises(ImageUnusableError, match="image is 1x1 px, this model takes exactly 8x8 px"):
        fit_image(np.zeros((1, 1, 1), np.uint8), shape=(1, 8, 8), resize="exact")
    with pytest.raises(ImageUnusableError, match="3 channels, this model takes 1"):
        fit_image(chw(PHOTO), shape=(1, 12, 17), resize="center-crop")


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (1, 1, "quarter"),
        (31, 200, "quarter"),
        (200, 31, "quarter"),
        (40, 321, "aspect ratio"),
        (401, 50, "aspect ratio"),
    ],
)
def test_center_crop_refuses_what_it_would_have_to_invent(height: int, width: int, message: str) -> None:
    with pytest.raises(ImageUnusableError, match=rf"image is {width}x{height} px.*{message}"):
        fit_image(np.zeros((3, height, width), np.uint8), shape=(3, 128, 128), resize="center-crop")


@given(height=st.integers(2, 40), width=st.integers(2, 40), side=st.integers(1, 8), level=st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_center_crop_keeps_a_plain_color(height: int, width: int, side: int, level: int) -> None:
    if max(height, width) <= 8 * min(height, width):
        image = np.full((3, height, width), level, np.uint8)
        np.testing.assert_array_equal(
            fit_image(image, shape=(3, side, side), resize="center-crop"), np.full((3, side, side), level)
        )


def test_center_crop_takes_the_centre_and_antialiases() -> None:
    wide = np.zeros((1, 8, 24), np.uint8)
    wide[:, :, 8:16] = chw(PHOTO)[:1, :8, :8]
    np.testing.assert_array_equal(fit_image(wide, shape=(1, 8, 8), resize="center-crop"), wide[:, :, 8:16])
    stripes = np.tile(np.array([0, 255], np.uint8), (1, 64, 32))  # sampled, not averaged, they would be all 0 or 255
    small = fit_image(stripes, shape=(1, 8, 8), resize="center-crop")
    assert np.all(np.abs(small.astype(int) - 127) < 25)


def test_options_and_arrays_that_make_no_sense() -> None:
    with pytest.raises(OptionError, match="allowed are 1"):
        decode_image(SAMPLES["jpeg"], channels=4)
    with pytest.raises(OptionError, match="center-crop"):
        fit_image(chw(PHOTO), shape=(3, 8, 8), resize="stretch")  # type: ignore[arg-type]
    for shape, dtype in [
        ((2, 8, 8), np.uint8),
        ((8, 8), np.uint8),
        ((3, 8, 8), np.float32),
        ((1, 0, 8), np.uint8),
    ]:
        with pytest.raises(ImageUnusableError, match="allowed are uint8"):
            encode_png(np.zeros(shape, dtype))
