"""The one image decoder: JPEG, PNG or WebP bytes to uint8 pixels, and pixels to the shape that a model takes.

Thread-safe: no call leaves anything behind, and no setting of Pillow is touched. Its plugins are called by
name, so that neither its registry nor its pixel-bomb warning (a process-wide filter decides what that does)
takes part; ``ImageLimits`` is enforced before, on the container. ``LOAD_TRUNCATED_IMAGES`` must stay False,
its default.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from mithridate.errors import (
    ImageError,
    ImageMalformedError,
    ImageTooLargeError,
    ImageUnusableError,
    OptionError,
)
from mithridate.image_headers import Container, ImageHeader, ImageLimits, open_container, orientation

__all__ = [
    "ImageHeader",
    "ImageLimits",
    "OpenImage",
    "Resize",
    "UInt8Image",
    "decode_image",
    "encode_png",
    "fit_image",
    "open_image",
    "read_header",
    "to_channels",
]

UInt8Image: TypeAlias = npt.NDArray[np.uint8]
Resize: TypeAlias = Literal["exact", "center-crop"]

DEFAULT_LIMITS: Final = ImageLimits()
MAX_ASPECT_RATIO: Final = 8
_DECODERS: Final[dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
}
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_header(data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS) -> ImageHeader:
    """Type, size and colour of an image file, pixels not decoded; raises what ``decode_image`` raises."""
    return open_container(data, limits).header


def open_image(
    data: bytes, *, shape: tuple[int, int, int], resize: Resize, limits: ImageLimits = DEFAULT_LIMITS
) -> OpenImage:
    """A file held to ``limits`` and to what ``fit_image`` takes, pixels not decoded: the cost is known before.

    Raises what ``decode_image`` and then ``fit_image`` would, but for what only the pixels tell.
    """
    container = open_container(data, limits)
    width, height = container.header.width, container.header.height
    if orientation(container.exif) >= 5:
        width, height = height, width
    _check_fit(width, height, shape=shape, resize=resize)
    return OpenImage(pixels=width * height, container=container, shape=shape, resize=resize)


@dataclass(frozen=True, kw_only=True)
class OpenImage:
    """An image that may be decoded; ``pixels`` is how many that will be."""

    pixels: int
    container: Container
    shape: tuple[int, int, int]
    resize: Resize

    def decode(self) -> UInt8Image:
        """uint8 of ``shape``, as ``decode_image`` and ``fit_image`` give it; raises ``ImageError`` of some kind."""
        image = _decode_container(self.container, self.shape[0])
        return fit_image(image, shape=self.shape, resize=self.resize)


def decode_image(data: bytes, *, channels: int, limits: ImageLimits = DEFAULT_LIMITS) -> UInt8Image:
    """The pixels of a JPEG, PNG or WebP file: uint8 ``[channels, H, W]``, contiguous and owned.

    ``channels`` is 1 (ITU-R 601 luma; exact where r = g = b) or 3. The type is sniffed, a declared one is
    never looked at. EXIF orientation is applied, then all metadata is dropped, colour profiles included.
    Transparent pixels are composited over white, as a browser shows them on a bare page: the model gets what
    a person sees, not the colours that hide under alpha 0. Opaque pixels are unchanged. 16-bit grey is
    divided by 257 and rounded, 16-bit colour keeps its high bytes; a colour key in a 16-bit PNG is ignored. A
    multi-picture JPEG counts as its first picture.

    Raises ``ImageTypeError``, ``ImageTooLargeError`` (before pixels are decoded), ``ImageMalformedError``
    (empty, truncated, corrupt), ``ImageUnusableError`` (animated), and nothing else, whatever the bytes;
    ``OptionError`` for another ``channels``.
    """
    _check_channels(channels)
    return _decode_container(open_container(data, limits), channels)


def _decode_container(container: Container, channels: int) -> UInt8Image:
    kind = container.header.kind
    try:
        return _decode(container, channels)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # limits wider than libwebp's or Pillow's own
        raise ImageTooLargeError(f"{kind} image refused by its decoder: {error}") from error
    except Exception as error:  # Pillow raises a dozen types for corrupt files, and its next release others
        raise ImageMalformedError(f"{kind} image is truncated or corrupt: {error}") from error


def encode_png(image: UInt8Image) -> bytes:
    """A PNG of uint8 ``[1 | 3, H, W]``, lossless: ``decode_image`` gives the same array back.

    Raises ``ImageUnusableError`` for another dtype or shape.
    """
    out = io.BytesIO()
    _to_pillow(image).save(out, format="PNG")
    return out.getvalue()


def to_channels(image: UInt8Image, channels: int) -> UInt8Image:
    """uint8 ``[1 | 3, H, W]`` as ``[channels, H, W]``, grey as in ``decode_image``.

    Raises ``ImageUnusableError`` for another dtype or shape, ``OptionError`` for another ``channels``.
    """
    _check_channels(channels)
    pillow = _to_pillow(image)
    if len(image) == channels:
        return image
    return _from_pillow(pillow.convert("L" if channels == 1 else "RGB"))


def fit_image(image: UInt8Image, *, shape: tuple[int, int, int], resize: Resize) -> UInt8Image:
    """A decoded ``[C, H, W]`` brought to ``shape`` ``[C, H', W']``; of that shape, it is returned as it is.

    ``"exact"`` refuses any other size. ``"center-crop"`` takes the largest centred rectangle of the target's
    aspect ratio and scales it with Pillow's bicubic filter, whose support widens when it shrinks
    (antialiasing). Raises ``ImageUnusableError`` for another number of channels, a side under a quarter of
    the target's, an aspect ratio over 8:1; ``OptionError`` for another ``resize``.
    """
    if resize not in ("exact", "center-crop"):
        raise OptionError(f"resize is {resize!r}: allowed are 'exact' and 'center-crop'")
    if image.shape == shape:
        return image
    channels, height, width = shape
    pillow = _to_pillow(image)
    if len(image) != channels:
        raise ImageUnusableError(f"image has {len(image)} channels, this model takes {channels}")
    _check_fit(pillow.width, pillow.height, shape=shape, resize=resize)
    return _from_pillow(pillow.resize((width, height), Image.Resampling.BICUBIC, box=_cover(pillow, width, height)))


def _check_fit(width: int, height: int, *, shape: tuple[int, int, int], resize: Resize) -> None:
    _, to_height, to_width = shape
    if (width, height) == (to_width, to_height):
        return
    seen, taken = f"image is {width}x{height} px, this model takes", f"{to_width}x{to_height} px"
    if resize == "exact":
        raise ImageUnusableError(f"{seen} exactly {taken}: resize it first")
    if 4 * height < to_height or 4 * width < to_width:
        raise ImageUnusableError(f"{seen} {taken}: each side must have a quarter of that or more")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageUnusableError(f"{seen} {taken}: crop it to an aspect ratio of at most {MAX_ASPECT_RATIO}:1")


def _cover(image: Image.Image, width: int, height: int) -> tuple[float, float, float, float]:
    """The largest centred box (left, top, right, bottom) of the aspect ratio of width x height."""
    scale = min(image.width / width, image.height / height)
    left = max(0.0, (image.width - width * scale) / 2)
    top = max(0.0, (image.height - height * scale) / 2)
    return left, top, min(image.width, left + width * scale), min(image.height, top + height * scale)


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise OptionError(f"channels is {channels}: allowed are 1 (grey) and 3 (red, green, blue)")


def _decode(container: Container, channels: int) -> UInt8Image:
    header = container.header
    with _DECODERS[header.kind](io.BytesIO(container.payload)) as image:
        if image.size != (header.width, header.height):
            raise ImageMalformedError(f"{header.kind} image is corrupt: it states two sizes")
        if container.animated or getattr(image, "n_frames", 1) > 1:
            raise ImageUnusableError(f"{header.kind} image is animated: send a single frame")
        image.load()
        method = _UPRIGHT.get(orientation(container.exif))
        flat = _flatten(image).convert("L" if channels == 1 else "RGB")
    return _from_pillow(flat if method is None else flat.transpose(method))


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode that the three decoders produce, as opaque 8-bit ``L`` or ``RGB``."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _from_pillow(image: Image.Image) -> UInt8Image:
    pixels = np.asarray(image)  # [H, W] or [H, W, 3]
    out = np.empty((1 if pixels.ndim == 2 else 3, *pixels.shape[:2]), np.uint8)
    out[...] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels
    return out  # [C, H, W]


def _to_pillow(image: UInt8Image) -> Image.Image:
    if image.dtype != np.uint8 or image.ndim != 3 or len(image) not in (1, 3) or not image.size:
        seen = f"{image.dtype} {list(image.shape)}"
        raise ImageUnusableError(f"image is {seen}: allowed are uint8 [1, height, width] and [3, height, width]")
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
