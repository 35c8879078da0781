"""A served digits bundle, in this process, and digits to send to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from service_helpers import QUICK_ALL, Serving, wait_ready
from starlette.testclient import TestClient

from mithridate.attacks import parse_attack
from mithridate.datasets import LabelledImages
from mithridate.defenses import DEFAULT_DEFENCES, Resources
from mithridate.images import encode_png
from mithridate.types import Epsilon
from service.app import create_app
from service.settings import load_settings


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("MITHRIDATE_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def serving(digits_bundle: Path) -> Serving:
    """``with serving(queue_size=1) as client``: the real application, ready, with a fixed seed."""

    @contextmanager
    def start(**flags: Any) -> Iterator[TestClient]:
        app = create_app(load_settings(**{"bundle": digits_bundle, "seed": 7, **flags}))
        # By a loopback name: without keys it answers to no other.
        with TestClient(
            app, base_url="http://localhost", raise_server_exceptions=False, client=("127.0.0.1", 50_000)
        ) as client:
            wait_ready(client)
            yield client

    return start


@pytest.fixture(scope="session")
def client(serving: Serving) -> Iterator[TestClient]:
    """A service with the settings a user starts with, but for the seed and one more defence."""
    with serving(offer=(*DEFAULT_DEFENCES, QUICK_ALL)) as client:
        yield client


@pytest.fixture(scope="session")
def clean(digits_test: LabelledImages) -> list[bytes]:
    """Forty digits of the test split, as PNG."""
    return [encode_png(image) for image in digits_test.images[:40]]


@pytest.fixture(scope="session")
def adversarial(resources: Resources, digits_test: LabelledImages) -> list[bytes]:
    """The same digits as PGD leaves them, with a radius that the base model does not survive."""
    pgd = parse_attack("pgd20", epsilon=Epsilon(32))
    pixels, labels = torch.from_numpy(digits_test.images[:40]), torch.from_numpy(digits_test.labels[:40])
    found = pgd.run(resources.classifier, pixels, labels, generator=torch.Generator().manual_seed(3))
    return [encode_png(image) for image in found.numpy()]
