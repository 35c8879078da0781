"""What a measurement of a service is made on where nobody names anything: the digits bundle of ``make demo``."""

from __future__ import annotations

from pathlib import Path

from cli.demo import run_command
from mithridate.datasets import load_dataset
from mithridate.images import encode_png


def bundle_or_digits(bundle: Path | None) -> Path:
    """``bundle``, or the digits one, built where it is not there yet."""
    if bundle is not None:
        return bundle
    digits = Path("build/demo/bundle")
    digits.parent.mkdir(parents=True, exist_ok=True)
    run_command("build", "--dataset", "digits[train]", "--epsilon", "32/255", "--out", str(digits), "--resume")
    return digits


def image_or_digit(image: Path | None) -> bytes:
    """The file ``image``, or the first test digit as PNG."""
    return image.read_bytes() if image else encode_png(load_dataset("digits[test,:1]").images[0])
