"""Weights on disk: what is loaded is what was saved, and what does not fit is named."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mithridate.errors import ModelError
from mithridate.models import Classifier, build_classifier, load_classifier, read_metadata, save_weights

GREY = (1, 8, 8)
State = dict[str, torch.Tensor]


def fresh(**options: Any) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_classifier("small-cnn", num_classes=10, image_shape=GREY, **options)


def load(path: Path | None, **changes: Any) -> Classifier:
    return load_classifier(path, **{"arch": None, "num_classes": 10, "image_shape": GREY, **changes})


def refused(path: Path | None, *parts: str, **changes: Any) -> None:
    with pytest.raises(ModelError) as caught:
        load(path, **changes)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_weights(fresh(mean=(0.25,), std=(0.125,)), path)
    return path


def rewrite(path: Path, change: Callable[[State], object], **metadata: str) -> Path:
    """The state in another file, changed, with a header of one's own."""
    state = load_file(path)
    change(state)
    out = path.with_name("changed.safetensors")
    save_file(state, out, metadata={"arch": "small-cnn", **metadata})
    return out


def same(state: State) -> None:
    """Changes nothing."""


def test_what_is_loaded_is_what_was_saved(saved: Path) -> None:
    wanted, model = fresh(mean=(0.25,), std=(0.125,)), load(saved)
    assert model.spec == wanted.spec
    for key, value in wanted.network.state_dict().items():
        assert torch.equal(model.network.state_dict()[key], value), key
    images = torch.rand(2, *GREY, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), wanted(images))
    assert torch.equal(model.embed(images), wanted.embed(images))  # the cut sees the loaded weights too
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_same_weights_are_the_same_bytes_and_anyone_may_read_them(saved: Path, tmp_path: Path) -> None:
    again, plain = tmp_path / "again.safetensors", tmp_path / "plain"
    plain.touch()
    for _ in range(5):
        save_weights(fresh(mean=(0.25,), std=(0.125,)), again)
        assert again.read_bytes() == saved.read_bytes()
    assert stat.S_IMODE(again.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_what_is_said_goes_before_what_the_header_says(saved: Path) -> None:
    assert load(saved).spec.mean == (0.25,)
    assert load(saved, mean=(0.5,), std=(0.5,)).spec.mean == (0.5,)
    assert read_metadata(saved)["arch"] == "small-cnn"
    assert json.loads(read_metadata(saved)["image_shape"]) == list(GREY)


def test_tied_weights_can_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
from torch import nn
def make(num_classes):
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, second, nn.Linear(64, num_classes))
"""
    (tmp_path / "tied_nets.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    path, shape = tmp_path / "tied.safetensors", {"num_classes": 3, "image_shape": GREY}
    model = build_classifier("tied_nets:make", **shape)
    save_weights(model, path)
    images = torch.rand(2, *GREY, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_classifier(path, arch=None, **shape)(images), model(images))


def test_weights_of_a_data_parallel_wrapper_fit(saved: Path) -> None:
    def wrap(state: State) -> None:
        for key in list(state):
            state[f"module.{key}"] = state.pop(key)

    model, wanted = load(rewrite(saved, wrap)), load(saved)
    assert torch.equal(model.head.weight, wanted.head.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_precision_become_float32(saved: Path, dtype: torch.dtype) -> None:
    def convert(state: State) -> None:
        state.update({k: v.to(dtype) for k, v in state.items() if v.is_floating_point()})

    weight = load(rewrite(saved, convert)).head.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, load(saved).head.weight.to(dtype).float())


def test_batch_counters_may_be_missing(saved: Path) -> None:
    def drop(state: State) -> None:
        for key in [key for key in state if key.endswith("num_batches_tracked")]:
            del state[key]

    assert torch.equal(load(rewrite(saved, drop)).head.weight, load(saved).head.weight)


def broken(value: float) -> Callable[[State], object]:
    def change(state: State) -> None:
        state["stage1.0.weight"][0, 0, 0, 0] = value

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda state: state.pop("linear.bias"), ["missing: linear.bias"]),
        (lambda state: state.update(extra=torch.zeros(1)), ["unexpected: extra"]),
        (
            lambda state: state.update({"linear.weight": torch.zeros(10, 64)}),
            ["of another shape: linear.weight is (10, 64), wanted (10, 128)"],
        ),
        (
            lambda state: state.clear() or state.update(x=torch.zeros(1)),
            ["missing: stem.0.weight", "more", "unexpected: x"],
        ),
        (broken(float("nan")), ["NaN or infinite", "stage1.0.weight"]),
        (broken(float("-inf")), ["NaN or infinite", "stage1.0.weight"]),
    ],
    ids=["missing", "unexpected", "misshapen", "another network", "nan", "infinite"],
)
def test_weights_that_do_not_fit_are_named(saved: Path, change: Callable[[State], object], parts: list[str]) -> None:
    refused(rewrite(saved, change), "changed.safetensors", *parts)


def test_a_header_that_disagrees_with_the_data_is_refused(saved: Path) -> None:
    refused(saved, "trained for 10 classes", "the data has 9", num_classes=9)
    refused(saved, "trained on [1, 8, 8] images", "the data has [1, 16, 16]", image_shape=(1, 16, 16))


def test_weights_for_other_classes_are_refused_without_a_header(saved: Path) -> None:
    refused(rewrite(saved, same), "linear.weight is (10, 128), wanted (9, 128)", num_classes=9)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("num_classes", "ten"),
        ("image_shape", "8x8"),
        ("image_shape", "3"),
        ("mean", "grey"),
        ("std", ""),
        ("mithridate", "[]"),
        ("mithridate", "{"),
    ],
)
def test_a_header_that_cannot_be_read_is_refused(saved: Path, key: str, text: str) -> None:
    refused(rewrite(saved, same, **{key: text}), "changed.safetensors", "not")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\xff" * 64, b"{}"])
def test_what_is_not_a_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    refused(path, "model.pt is not a readable safetensors file", arch="small-cnn")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save(fresh().network.state_dict(), path)
    refused(path, "not a readable safetensors file", arch="small-cnn")


def test_a_cut_off_file_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in (4, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        refused(saved, "not a readable safetensors file", arch="small-cnn")


def test_no_file_and_no_architecture(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "no model file at", ".safetensors")
    refused(tmp_path, "no model file at")
    save_file(load_file(saved), saved)  # without a header
    refused(saved, "does not name its architecture", "--arch")
    assert load(saved, arch="small-cnn").spec.arch == "small-cnn"
    refused(saved, "does not fit the architecture", arch="resnet20")


def test_numbers_in_a_header_are_read_as_others_write_them(saved: Path) -> None:
    path = rewrite(saved, same, normalize_mean="0.1", normalize_std="[0.2]")
    spec = load(path).spec
    assert np.allclose([*spec.mean, *spec.std], [0.1, 0.2])
