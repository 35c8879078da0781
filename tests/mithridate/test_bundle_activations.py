"""Bundles with activations: whatever is wrong with them is found before they serve."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_bundle import edit, refused, set_to, sign, without

from index_builder.build import BuildPlan, build_bundle
from index_builder.training import TrainingPlan
from mithridate.bundle import Bundle
from mithridate.datasets import load_dataset
from mithridate.defenses import Resources


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tail") / "bundle"
    data = load_dataset("digits[train,:96]")
    plan = BuildPlan(data=data, out=out, attacks=("pgd2",), tail_layer="auto", training=TrainingPlan(epochs=1))
    build_bundle(plan)
    return out


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_they_are_mapped_and_never_written(copy: Path) -> None:
    resources = Resources.load(Bundle.open(copy))
    assert resources.exemplars.activations is not None
    resources.exemplars.activations.mul_(0)
    assert list(Bundle.open(copy).problems()) == []
    assert resources.classifier.has_tail


def poisoned(value: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[-1, 3, 1, 2] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (poisoned(np.nan), ["holds NaN or infinite numbers"]),
        (poisoned(-np.inf), ["holds NaN or infinite numbers"]),
        (lambda a: a.astype(np.float32), ["is float32 [192, 64, 4, 4]", "wanted float16 [192, ...]"]),
        (lambda a: a[:-1], ["is float16 [191, 64, 4, 4]", "wanted float16 [192, ...]"]),
        (lambda a: a[:, 0, 0, 0].copy(), ["is float16 [192]", "wanted float16 [192, ...]"]),
        (lambda a: a.astype(object), ["is not a readable array"]),
    ],
)
def test_activations_that_cannot_be_are_refused_though_signed(
    copy: Path, change: Callable[[Any], Any], parts: list[str]
) -> None:
    file = copy / "activations.npy"
    np.save(file, change(np.load(file)), allow_pickle=True)
    sign(copy)
    refused(copy, "activations.npy", *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (without("files", "activations.npy"), ["model.tail_layer is 'auto'", "activations.npy"]),
        (without("model", "tail_layer"), ["model.tail_layer is None", "activations.npy"]),
        (set_to("model", "tail_layer", value=3), ["model.tail_layer"]),
        (set_to("metric", value="l3"), ["metric"]),
        (set_to("copies", 1, "defense", value=3), ["defense"]),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], None], parts: list[str]
) -> None:
    edit(copy, change)
    refused(copy, "not a valid manifest", *parts)


def test_damage_is_named(copy: Path) -> None:
    file = copy / "activations.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(copy, "activations.npy has been changed")
    file.unlink()
    refused(copy, "activations.npy is missing")


def test_an_index_of_another_metric_is_refused(copy: Path) -> None:
    edit(copy, set_to("metric", value="ip"))
    refused(copy, "metric 'ip'")


def test_checking_them_takes_little_memory(copy: Path) -> None:
    """Half a gigabyte of activations, the last of them not a number."""
    file = copy / "activations.npy"
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(192, 1_400_000))
    array[191, -1] = np.nan
    array.flush()
    del array
    opened = Bundle.open(copy, verify=False)
    tracemalloc.start()
    try:
        with pytest.raises(Exception, match="NaN or infinite"):
            _ = opened.activations
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def test_a_tail_of_stored_activations_answers_as_the_network(bundle: Path) -> None:
    resources = Resources.load(Bundle.open(bundle))
    classifier, exemplars = resources.classifier, resources.exemplars
    ids = torch.tensor([0, 95, 96, 191, 7])
    with torch.no_grad():
        stored = classifier.tail(exemplars.gather_activations(ids).float())
        fresh = classifier(exemplars.pixels(ids).float() / 255)
    torch.testing.assert_close(stored, fresh, atol=0.01, rtol=0.01)
