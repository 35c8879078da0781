"""Data sets: the same images in the same order everywhere, or a ``DatasetError`` that says what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mithridate.datasets import DatasetSpec, LabelledImages, load_dataset, parse_spec
from mithridate.errors import DatasetError
from mithridate.images import UInt8Image

SHARED = Path(__file__).resolve().parents[3] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason=f"needs the data sets in {SHARED}/data")
RNG = np.random.Generator(np.random.PCG64(3))


def random_images(count: int, channels: int = 3, height: int = 6, width: int = 6) -> UInt8Image:
    return RNG.integers(0, 256, (count, channels, height, width), dtype=np.uint8)


def refused(spec: str, *parts: str, **options: Any) -> None:
    """``load_dataset`` refuses, and the message holds every one of ``parts``."""
    with pytest.raises(DatasetError) as caught:
        load_dataset(spec, **options)
    for part in parts:
        assert part in str(caught.value)


# The specification


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("digits", DatasetSpec(source="digits")),
        ("cifar10[test,:1000]", DatasetSpec(source="cifar10", split="test", stop=1000)),
        ("mnist[5:]", DatasetSpec(source="mnist", start=5)),
        (" mnist [ train , 5 : 7 ] ", DatasetSpec(source="mnist", split="train", start=5, stop=7)),
        ("folder:a b/c", DatasetSpec(source="folder", argument="a b/c")),
        ("npz:C:/x.npz[test]", DatasetSpec(source="npz", argument="C:/x.npz", split="test")),
        ("parquet:d/t-[0-9]*.pq[:8]", DatasetSpec(source="parquet", argument="d/t-[0-9]*.pq", stop=8)),
        ("parquet:d/x[:3][:]", DatasetSpec(source="parquet", argument="d/x[:3]")),
        ("parquet:d/t-[0-9]", DatasetSpec(source="parquet", argument="d/t-[0-9]")),
        ("parquet:d/[tv]*[1:2][test]", DatasetSpec(source="parquet", argument="d/[tv]*[1:2]", split="test")),
    ],
)
def test_specification_examples(text: str, expected: DatasetSpec) -> None:
    assert parse_spec(text) == expected
    assert parse_spec(str(expected)) == expected


arguments = st.text(st.sampled_from("ab/.*?[]0-9:,test "), min_size=1).filter(lambda text: text.strip() == text)
ends = st.none() | st.integers(0, 10**6)


@given(argument=arguments, split=st.sampled_from([None, "train", "test"]), start=ends, stop=ends)
@settings(max_examples=200)
def test_specification_survives_writing_and_parsing(
    argument: str, split: Any, start: int | None, stop: int | None
) -> None:
    spec = DatasetSpec(source="parquet", argument=argument, split=split, start=start, stop=stop)
    assert parse_spec(str(spec)) == spec
    assert list(range(100))[spec.window] == list(range(100))[start:stop]


@given(text=st.text(st.sampled_from("digtsmnparquet:[]0123456789,- "), max_size=25))
@settings(max_examples=200)
def test_any_text_is_a_specification_or_a_dataset_error(text: str) -> None:
    try:
        spec = parse_spec(text)
    except DatasetError:
        return
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["allowed are digits, mnist", "parquet:GLOB"]),
        ("CIFAR-10", ["did you mean 'cifar10'?"]),
        ("fashionmnist", ["did you mean 'fashion-mnist'?"]),
        ("http://example.org/x.npz", ["unknown data set 'http'"]),
        ("digits[val]", ["'[val]' is not a selection", "[SPLIT,START:STOP]"]),
        ("digits[:-5]", ["is not a selection"]),
        ("digits[test,5]", ["is not a selection"]),
        ("digits[:5][:5]", ["is not a selection"]),
        ("digits[:" + "9" * 5000 + "]", ["is not a selection"]),
        ("digits:8x8", ["takes no ':8x8'"]),
        ("folder", ["write folder:DIR"]),
        ("npz:[:5]", ["write npz:FILE"]),
    ],
)
def test_specifications_that_are_refused(text: str, parts: Sequence[str]) -> None:
    refused(text, *parts)


# What every source shares


def test_importing_costs_no_torch() -> None:
    code = "import sys, mithridate.datasets, mithridate.images; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_labelled_images_check_themselves() -> None:
    good: dict[str, Any] = {
        "images": random_images(2),
        "labels": np.array([0, 1]),
        "classes": ("a", "b"),
        "spec": "x",
    }
    assert LabelledImages(**good).image_shape == (3, 6, 6)
    assert len(LabelledImages(**good)) == 2
    bad: dict[str, dict[str, Any]] = {
        "images are float32": {"images": np.zeros((2, 3, 6, 6), np.float32)},
        "images are uint8 [2, 2, 6, 6]": {"images": random_images(2, channels=2)},
        "selection is empty": {"images": random_images(0), "labels": np.zeros(0, np.int64)},
        "labels are int32": {"labels": np.array([0, 1], np.int32)},
        "labels are int64 [3]": {"labels": np.array([0, 1, 1])},
        "image 1 has label 2, allowed are 0 to 1": {"labels": np.array([0, 2])},
        "image 0 has label -1": {"labels": np.array([-1, 0])},
    }
    for message, change in bad.items():
        with pytest.raises(DatasetError) as caught:
            LabelledImages(**{**good, **change})
        assert message in str(caught.value)


def test_fingerprint_changes_with_every_part_and_with_nothing_else() -> None:
    parts: dict[str, Any] = {
        "images": random_images(2),
        "labels": np.array([0, 1]),
        "classes": ("a", "b"),
        "spec": "x",
    }
    original = LabelledImages(**parts).fingerprint()
    assert original.startswith("sha256:")
    same: dict[str, Any] = {"images": np.asfortranarray(parts["images"]), "spec": "elsewhere"}
    assert LabelledImages(**{**parts, **same}).fingerprint() == original
    flipped = parts["images"].copy()
    flipped[1, 2, 3, 4] ^= 1
    changes: list[dict[str, Any]] = [
        {"images": flipped},
        {"images": parts["images"].reshape(2, 3, 4, 9)},
        {"labels": np.array([1, 1])},
        {"classes": ("ab", "")},
    ]
    prints = {LabelledImages(**{**parts, **change}).fingerprint() for change in changes}
    assert len(prints | {original}) == 5


def test_options_out_of_range() -> None:
    refused("digits", "image size is 0", image_size=0)
    refused("digits", "channels is 2, allowed are 1 and 3", channels=2)
    refused("digits", "default split is 'val'", default_split="val")
    refused("digits[1000:2000]", "image 1000", "8x8 px", "--image-size 99", image_size=99)


# digits


def test_digits_are_the_same_everywhere() -> None:
    train, test = load_dataset("digits"), load_dataset("digits[test]")
    assert (len(train), len(test), train.image_shape) == (1438, 359, (1, 8, 8))
    assert train.fingerprint() == "sha256:8cb97211491ca11aec82ece266950bc543a55dc71d3a731382790fdbfbab2257"
    assert test.fingerprint() == "sha256:9c047f244e3943ee5c4a39e2bee5a5bdf35b8a70265200c69bba44a07d89d66f"


def test_digits_are_split_by_class_and_any_prefix_is_mixed() -> None:
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    train, test = load_dataset("digits[train]"), load_dataset("digits[test]")
    assert train.classes == tuple("0123456789")
    both = np.concatenate([train.images, test.images])[:, 0]
    expected = np.rint(raw.images * 255 / 16).astype(np.uint8)
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in expected)
    share = np.bincount(test.labels) / np.bincount(raw.target)
    assert np.all(np.abs(share - 0.2) < 0.005)
    for data in (train, test):
        assert set(data.labels[:100]) == set(range(10))


def test_selection_is_a_slice_of_the_split() -> None:
    whole, part = load_dataset("digits[test]"), load_dataset("digits[test,100:105]")
    np.testing.assert_array_equal(part.images, whole.images[100:105])
    np.testing.assert_array_equal(part.labels, whole.labels[100:105])
    assert part.spec == "digits[test,100:105]"
    default = load_dataset("digits[100:105]", default_split="test")
    np.testing.assert_array_equal(default.images, part.images)
    assert len(load_dataset("digits[test,350:9999]")) == 9
    refused("digits[test,359:]", "selection is empty")
    refused("digits[7:7]", "selection is empty")


def test_channels_and_size_are_brought_about() -> None:
    grey, color = load_dataset("digits[:5]"), load_dataset("digits[:5]", channels=3, image_size=16)
    assert color.image_shape == (3, 16, 16)
    np.testing.assert_array_equal(color.images[:, 0], color.images[:, 2])
    assert np.abs(color.images[:, :1, ::2, ::2].astype(int) - grey.images).mean() < 40
    assert load_dataset("digits[:5]", image_size=8).fingerprint() == grey.fingerprint()


# The real ones


@needs_shared
def test_real_cifar10() -> None:
    data = load_dataset(f"parquet:{SHARED}/data/cifar10/*.parquet[test,:200]")
    assert (data.image_shape, len(data), data.classes[3]) == ((3, 32, 32), 200, "cat")
    assert data.labels[:5].tolist() == [3, 8, 8, 0, 6]
    end = load_dataset(f"parquet:{SHARED}/data/cifar10/train-*.parquet[49990:]")
    assert len(end) == 10


@needs_shared
def test_real_fashion_mnist() -> None:
    data = load_dataset("fashion-mnist[test]", data_root=SHARED / "data")
    assert (data.image_shape, np.bincount(data.labels).tolist()) == ((1, 28, 28), [1000] * 10)
    assert [data.classes[label] for label in data.labels[:3]] == ["Ankle boot", "Pullover", "Trouser"]
    assert np.isclose(data.images.mean() / 255, 0.2868, atol=1e-3)
