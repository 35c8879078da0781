"""Bundles: whatever is wrong with one is found before it serves, and the message names the thing."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mithridate.bundle import Bundle, sha256_of
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources
from mithridate.errors import BundleError, InputError, ModelError
from mithridate.neighbors import NeighborIndex

Content = dict[str, Any]
FILES = [
    "model.safetensors",
    "labels.npy",
    "predictions.npy",
    "embeddings.npy",
    "index.faiss",
    "exemplars/clean-00000.npy",
    "exemplars/clean-00002.npy",
    "exemplars/pgd10-00001.npy",
]


@pytest.fixture
def copy(digits_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be changed."""
    return Path(shutil.copytree(digits_bundle, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[Content], object]) -> None:
    """Changes the manifest."""
    content = json.loads((bundle / "manifest.json").read_text())
    change(content)
    (bundle / "manifest.json").write_text(json.dumps(content))


def sign(bundle: Path) -> None:
    """Makes the manifest agree with what is there: what somebody does who can write to the bundle."""

    def update(content: Content) -> None:
        for name, entry in content["files"].items():
            entry.update(sha256=sha256_of(bundle / name), bytes=(bundle / name).stat().st_size)

    edit(bundle, update)


def refused(bundle: Path, *parts: str, error: type[InputError] = BundleError) -> None:
    """Neither opened nor, if its digests fit, loaded; the message is one line with all of ``parts``."""
    with pytest.raises(error) as caught:
        Resources.load(Bundle.open(bundle))
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def test_the_digest_is_the_sha256_of_the_manifest(digits_bundle: Path) -> None:
    bundle = Bundle.open(digits_bundle)
    raw = (digits_bundle / "manifest.json").read_bytes()
    assert bundle.digest == f"sha256:{hashlib.sha256(raw).hexdigest()}"
    assert bundle.manifest.encode() == raw
    assert list(bundle.problems()) == []
    for name, entry in bundle.manifest.files.items():
        assert hashlib.sha256((digits_bundle / name).read_bytes()).hexdigest() == entry.sha256


def test_opening_and_using_it_changes_no_byte(digits_bundle: Path) -> None:
    """The arrays are mapped copy-on-write: whoever writes to one writes to memory."""
    bundle = Bundle.open(digits_bundle)
    resources = Resources.load(bundle)
    resources.exemplars.features.mul_(0)
    bundle.embeddings[:] = 1
    assert list(Bundle.open(digits_bundle).problems()) == []


def test_exemplars_are_the_training_images_and_their_copies(resources: Resources, digits_train: LabelledImages) -> None:
    exemplars, count = resources.exemplars, len(digits_train)
    assert len(exemplars) == 2 * count
    assert exemplars.clean_count == count
    ids = torch.tensor([count - 1, 0, 700, 700, count + 511, 2 * count - 1, count])
    pixels = exemplars.pixels(ids)
    for row, number in enumerate(ids.tolist()):
        source, copy_name = exemplars.origin(number)
        assert (source, copy_name) == (number % count, "clean" if number < count else "pgd10")
        assert exemplars.labels[number] == int(digits_train.labels[source])
        distance = np.abs(pixels[row].numpy().astype(int) - digits_train.images[source]).max()
        assert distance == 0 if copy_name == "clean" else 0 < distance <= 32
    assert exemplars.pixels(torch.empty(0, dtype=torch.int64)).shape == (0, 1, 8, 8)


def test_stored_embeddings_are_what_the_classifier_computes(resources: Resources) -> None:
    ids = torch.tensor([0, 5, 1500, 2875])
    images = resources.exemplars.pixels(ids).float() / 255
    with torch.no_grad():
        embedding = resources.classifier.embed(images)
        assert torch.equal(resources.classifier(images).argmax(1), resources.exemplars.predictions[ids])
    torch.testing.assert_close(embedding, resources.index.embeddings(ids))
    assert resources.index.search(embedding, 1).ids.flatten().tolist() == ids.tolist()


# Damage


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(copy: Path, name: str) -> None:
    file = copy / name
    content = file.read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        flipped = bytearray(content)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        refused(copy, f"{name} has been changed", "sha256")
    file.write_bytes(content[:-1])
    refused(copy, f"{name} has {len(content) - 1} bytes", f"the manifest says {len(content)}")
    file.write_bytes(b"")
    refused(copy, f"{name} has 0 bytes")
    file.unlink()
    refused(copy, f"{name} is missing")
    file.mkdir()
    refused(copy, f"{name} is missing")


@pytest.mark.parametrize("name", ["notes.txt", "exemplars/pgd30-00000.npy", ".hidden", "features.npy", "a/b/c"])
def test_an_extra_file_is_named(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(b"x")
    refused(copy, f"{name} is not listed in the manifest")


def test_a_card_that_is_none_is_named(copy: Path) -> None:
    (copy / "card.json").write_text("{}")
    refused(copy, "card.json is not a valid card", "remove it or run mithridate evaluate again")


@pytest.mark.parametrize("path", ["", "none", "bundle/labels.npy"])
def test_what_is_not_a_bundle_is_refused(copy: Path, path: str) -> None:
    refused(copy.parent / path, "is not a bundle", "manifest.json")


# The manifest


def set_to(*place: str | int, value: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        *path, last = place
        for key in path:
            content = content[key]
        content[last] = value

    return change


def without(*place: str) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for key in place[:-1]:
            content = content[key]
        del content[place[-1]]

    return change


ENTRY = {"sha256": "0" * 64, "bytes": 1}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (set_to("schema_version", value=2), ["schema version 2", "reads 1"]),
        (set_to("schema_version", value="1"), ["schema version '1'", "reads 1"]),
        (without("schema_version"), ["schema version None", "reads 1"]),
        (set_to("colour", value="red"), ["not a valid manifest", "colour"]),
        (set_to("model", "pickle", value="x"), ["not a valid manifest", "model.pickle"]),
        (without("classes"), ["not a valid manifest", "classes"]),
        (without("model", "arch"), ["not a valid manifest", "model.arch"]),
        (set_to("image_shape", value=[8, 8]), ["not a valid manifest", "image_shape"]),
        (set_to("dataset", "images", value=0), ["not a valid manifest", "dataset.images"]),
        (set_to("shard_size", value=0), ["not a valid manifest", "shard_size"]),
        (set_to("resize", value="stretch"), ["not a valid manifest", "resize"]),
        (set_to("files", "../x", value=ENTRY), ["files", "'../x' points outside the bundle"]),
        (set_to("files", "a/../../x", value=ENTRY), ["'a/../../x' points outside the bundle"]),
        (set_to("files", "/etc/passwd", value=ENTRY), ["'/etc/passwd' points outside the bundle"]),
        (set_to("files", value={}), ["not a valid manifest: it does not list"]),
        (without("files", "exemplars/pgd10-00002.npy"), ["does not list exemplars/pgd10-00002.npy"]),
        (without("files", "labels.npy"), ["does not list labels.npy"]),
        (without("files", "model.safetensors"), ["does not list model.safetensors"]),
        (set_to("shard_size", value=1), ["does not list exemplars/clean-00003.npy"]),
        (set_to("shard_size", value=400), ["does not list exemplars/clean-00003.npy"]),
        (set_to("schema_version", value=True), ["schema version True"]),
        (set_to("classes", value=["7"] * 10), ["two classes have one name"]),
        (set_to("model", "std", value=[0.0]), ["model.std"]),
        (set_to("model", "mean", value=[0.1, 0.1]), ["2 means and 1 deviations"]),
        (set_to("copies", 0, "base_correct", value=1439), ["more images classified correctly than there are"]),
        (set_to("copies", value=[]), ["does not begin with the clean copy"]),
        (set_to("copies", 0, "name", value="pgd10"), ["does not begin with the clean copy"]),
        (set_to("copies", 1, "name", value="../../etc/x"), ["does not list exemplars/../../etc/x-00000.npy"]),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(copy: Path, change: Callable[[Content], None], parts: list[str]) -> None:
    edit(copy, change)
    refused(copy, *parts)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\xff", b"null", b"[]", b'"x"', b"1", b"[" * 200_000, b"\x80\x04]\x94."]
)
def test_a_manifest_that_is_not_json_is_refused(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    refused(copy, "manifest.json")


# Damage with digests that fit


def nan(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flat[-1] = np.nan
    return array


def nines(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array[3] = 10
    return array


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("embeddings.npy", nan, ["holds NaN or infinite numbers"]),
        ("embeddings.npy", lambda a: a.astype(np.float64), ["is float64 [2876, 128]", "wanted float32"]),
        ("embeddings.npy", lambda a: a[:-1], ["is float32 [2875, 128]", "2876"]),
        ("embeddings.npy", lambda a: a[:, 0].copy(), ["is float32 [2876]", "wanted"]),
        ("labels.npy", nines, ["labels outside 0..9"]),
        ("labels.npy", lambda a: a - 1, ["labels outside 0..9"]),
        ("labels.npy", lambda a: a.astype(np.int32), ["is int32 [1438]", "wanted int64"]),
        ("labels.npy", lambda a: a.astype(object), ["is not a readable array"]),
        ("predictions.npy", lambda a: a[:7], ["is int32 [7]"]),
        ("exemplars/pgd10-00001.npy", lambda a: a[:-1], ["is uint8 [511, 1, 8, 8]", "wanted uint8 [512, 1, 8, 8]"]),
        ("exemplars/pgd10-00001.npy", lambda a: a.astype(np.float32), ["is float32", "wanted uint8"]),
        ("exemplars/clean-00000.npy", lambda a: a[..., :7], ["is uint8 [512, 1, 8, 7]"]),
        ("exemplars/clean-00000.npy", lambda a: a.astype(object), ["is not a readable array"]),
    ],
)
def test_an_array_that_cannot_be_is_refused_though_signed(
    copy: Path, name: str, change: Callable[[Any], Any], parts: list[str]
) -> None:
    array = change(np.load(copy / name))
    np.save(copy / name, array, allow_pickle=True)
    sign(copy)
    refused(copy, name, *parts)


@pytest.mark.parametrize("name", ["labels.npy", "exemplars/clean-00001.npy"])
def test_no_pickle_runs_whatever_is_signed(copy: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(copy.parent / "it ran"),)

    (copy / name).write_bytes(pickle.dumps(Bomb()))
    sign(copy)
    refused(copy, name, "is not a readable array")
    with (copy / name).open("wb") as file:
        np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    sign(copy)
    refused(copy, name, "is not a readable array")
    np.savez(copy / "z.npz", np.zeros(3))
    (copy / "z.npz").rename(copy / name)
    sign(copy)
    refused(copy, name, "is not a readable array")
    assert not (copy.parent / "it ran").exists()


def test_bad_weights_are_refused_though_signed(copy: Path) -> None:
    path = copy / "model.safetensors"
    good = load_file(path)

    def write(state: dict[str, torch.Tensor], **metadata: str) -> None:
        save_file(state, path, metadata=metadata)
        sign(copy)

    write({**good, "linear.bias": torch.full((10,), torch.nan)})
    refused(copy, "model.safetensors holds NaN or infinite numbers in linear.bias", error=ModelError)
    write({key: value for key, value in good.items() if key != "linear.bias"})
    refused(copy, "model.safetensors does not fit", "missing: linear.bias", error=ModelError)
    write(good, num_classes="12")
    refused(copy, "model.safetensors was trained for 12 classes", "the data has 10", error=ModelError)
    path.write_bytes(pickle.dumps(good))
    sign(copy)
    refused(copy, "model.safetensors is not a readable safetensors file", error=ModelError)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (set_to("classes", value=list("012345678")), ["trained for 10 classes", "the data has 9"]),
        (set_to("image_shape", value=[1, 16, 16]), ["trained on [1, 8, 8] images", "[1, 16, 16]"]),
        (set_to("model", "arch", value="resnet20"), ["resnet20 takes 3 channels"]),
        (set_to("model", "arch", value="resnet21"), ["unknown architecture 'resnet21'"]),
        (set_to("model", "embedding_layer", value="stage9"), ["no layer 'stage9'"]),
        (lambda content: content["model"].update(mean=[0.1] * 2, std=[0.1] * 2), ["a mean of 2"]),
    ],
)
def test_a_model_that_does_not_fit_is_refused(copy: Path, change: Callable[[Content], None], parts: list[str]) -> None:
    edit(copy, change)
    refused(copy, *parts, error=ModelError)


def test_an_index_of_something_else_is_refused_though_signed(copy: Path) -> None:
    NeighborIndex.build(np.zeros((5, 128), np.float32)).write(copy / "index.faiss")
    sign(copy)
    refused(copy, "5 vectors of 128 numbers", "2876 of 128")
    (copy / "index.faiss").write_bytes(b"IxF2 but not really")
    sign(copy)
    refused(copy, "index.faiss is not a FAISS index")


def test_an_embedding_layer_of_another_width_is_refused(copy: Path) -> None:
    """The manifest names a layer that the stored embeddings do not come from."""
    edit(copy, set_to("model", "embedding_layer", value="stage1"))
    refused(copy, "embeddings are 128 numbers, the model's are 64")


def test_a_users_code_runs_only_when_it_is_named_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
from pathlib import Path
from mithridate.models.small_cnn import SmallCNN
Path(__file__).with_name("it ran").touch()
def make(num_classes): return SmallCNN(num_classes=num_classes, side=8)
"""
    (copy.parent / "bundled_nets.py").write_text(source)
    monkeypatch.syspath_prepend(copy.parent)
    edit(copy, set_to("model", "arch", value="bundled_nets:make"))
    for allowed in (None, "bundled_nets:other", "small-cnn"):
        with pytest.raises(BundleError, match=r"'bundled_nets:make'; repeat it with --arch bundled_nets:make"):
            Resources.load(Bundle.open(copy), allow_factory=allowed)
    assert not (copy.parent / "it ran").exists()
    loaded = Resources.load(Bundle.open(copy), allow_factory="bundled_nets:make")
    assert loaded.classifier.spec.arch == "bundled_nets:make"
