"""A real service over a real port, and digits to send to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from client_helpers import listening

from attack_client import Client
from mithridate.datasets import LabelledImages
from mithridate.images import encode_png
from service.app import create_app
from service.settings import load_settings


@pytest.fixture(scope="session")
def served(digits_bundle: Path) -> Iterator[str]:
    """The address of a service with the digits bundle."""
    with listening(create_app(load_settings(bundle=digits_bundle, seed=7)), lifespan="on") as url:
        with Client(url) as client:
            client.wait_until_ready()
        yield url


@pytest.fixture(scope="session")
def files(digits_test: LabelledImages) -> list[bytes]:
    """Digits as PNG; the first is a four."""
    return [encode_png(image) for image in digits_test.images[:8]]
