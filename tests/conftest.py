"""What most tests need: real digits, and a small bundle built from them once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch is loaded: see cli/main.py

if "PYTEST_XDIST_WORKER" in os.environ:  # make test has two processes; threads of theirs would count for themselves
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from browser_helpers import Browser, find_browser

from index_builder.build import BuildPlan, build_bundle
from index_builder.prm_training import PRMPlan, train_prm
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages, load_dataset
from mithridate.defenses import Resources
from mithridate.models import save_prm
from mithridate.neighbors import set_search_threads
from mithridate.types import Epsilon

SHARED = Path(__file__).resolve().parents[2] / "shared"


THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
"""In all: make test has two processes."""


def use_threads() -> None:
    torch.set_num_threads(THREADS)
    set_search_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    use_threads()
    os.environ["TEST_THREADS"] = str(THREADS)  # for processes that the tests start


@pytest.fixture(autouse=True)
def _still_two_threads() -> Iterator[None]:
    """After a test that ran a command with another number: what is built next would be rounded otherwise."""
    yield
    use_threads()


_LONG = (
    "test_demo",
    "test_build_interrupted",
    "test_engine_process",
    "test_service_swap",
    "test_evaluate",
    "test_faults",
)
"""Files with few tests that take long: begun last, one would run while the other process has nothing left to do."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in _LONG)


@pytest.fixture(scope="session")
def digits_train() -> LabelledImages:
    return load_dataset("digits[train]")


@pytest.fixture(scope="session")
def digits_test() -> LabelledImages:
    return load_dataset("digits[test]")


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory, digits_train: LabelledImages) -> Path:
    """A verified bundle with a trained model and one adversarial copy. Do not write to it: copy it first."""
    out = tmp_path_factory.mktemp("bundles") / "digits"
    build_bundle(BuildPlan(data=digits_train, out=out, attacks=("pgd10",), epsilon=Epsilon(32), shard_size=512))
    return out


@pytest.fixture(scope="session")
def manipulated_bundle(
    tmp_path_factory: pytest.TempPathFactory, digits_bundle: Path, digits_train: LabelledImages
) -> Path:
    """The same model in a smaller bundle, with a trained PRM."""
    directory = tmp_path_factory.mktemp("manipulated")
    save_prm(train_prm(digits_train, PRMPlan(epochs=2)), directory / "prm.safetensors")
    plan = BuildPlan(
        data=replace(digits_train, images=digits_train.images[:600], labels=digits_train.labels[:600]),
        out=directory / "digits",
        model=digits_bundle / "model.safetensors",
        prm=(directory / "prm.safetensors",),
        attacks=("pgd10",),
        epsilon=Epsilon(32),
    )
    build_bundle(plan)
    return plan.out


@pytest.fixture(scope="session")
def resources(digits_bundle: Path) -> Resources:
    return Resources.load(Bundle.open(digits_bundle))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data and weights that are not part of the project; the test skips where they are not at hand."""
    if not SHARED.is_dir():
        pytest.skip(f"there is no {SHARED.name}/ with data and weights beside the checkout")
    return SHARED


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = find_browser()
    if binary is None:
        pytest.skip("there is no Chromium on this machine; install one, or name it in CHROMIUM")
    with Browser(binary, tmp_path_factory.mktemp("profile")) as browser:
        yield browser
