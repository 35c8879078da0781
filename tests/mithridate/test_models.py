"""Architectures: whatever can be named is cut at the right place, or refused in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits

from mithridate.datasets import LabelledImages, load_dataset
from mithridate.defenses.none import base_pass
from mithridate.errors import ModelError
from mithridate.models import Classifier, ModelSpec, architecture_names, build_classifier, is_factory, load_classifier
from mithridate.models.registry import build_network
from mithridate.models.splitting import split_network
from mithridate.types import to_images

GREY, COLOUR = (1, 8, 8), (3, 32, 32)


def build(arch: str, shape: tuple[int, int, int] = GREY, classes: int = 10, layer: str = "auto") -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_classifier(arch, num_classes=classes, image_shape=shape, embedding_layer=layer)


def random_images(count: int, shape: tuple[int, int, int] = GREY) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """A ModelError of one line that holds each of ``parts``."""
    with pytest.raises(ModelError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


@pytest.fixture(scope="module")
def small(digits_bundle: Path) -> Classifier:
    return load_classifier(digits_bundle / "model.safetensors", arch=None, num_classes=10, image_shape=GREY)


# Architectures by name


def test_published_cifar_weights_fit_and_classify(shared: Path) -> None:
    data = load_dataset(f"parquet:{shared}/data/cifar10/test-*.parquet[:200]")
    images, labels = to_images(torch.from_numpy(data.images)), torch.from_numpy(data.labels)
    right = {}
    for name in ("standard", "nfgsm"):
        path = shared / "models" / f"cifar10-resnet20-{name}.safetensors"
        model = load_classifier(path, arch="resnet20", num_classes=10, image_shape=COLOUR)
        with torch.no_grad():
            right[name] = float((model(images).argmax(1) == labels).double().mean())
    assert right["standard"] >= 0.9
    assert right["nfgsm"] >= 0.6


@pytest.mark.parametrize(
    ("arch", "shape", "dimension"),
    [
        ("small-cnn", GREY, 128),
        ("resnet20", COLOUR, 64),
        ("resnet18", COLOUR, 512),
        ("mobilenet_v3_small", COLOUR, 1024),
        ("googlenet", COLOUR, 1024),
    ],
)
def test_the_embedding_is_what_the_last_linear_layer_is_given(
    arch: str, shape: tuple[int, int, int], dimension: int
) -> None:
    model, images = build(arch, shape, classes=7), random_images(3, shape)
    with torch.no_grad():
        embedding = model.embed(images)
        assert embedding.shape == (3, dimension)
        torch.testing.assert_close(model.head(embedding), model(images))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.network.modules())


def test_a_network_without_a_linear_end_still_has_an_embedding() -> None:
    model, images = build("squeezenet1_1", COLOUR), random_images(3, COLOUR)
    assert not model.has_head
    with refused("squeezenet1_1 does not end in a linear layer", "rmc:scope=all"):
        _ = model.head
    with torch.no_grad():
        assert model.embed(images).shape == (3, 512)  # what feeds its last convolution
        torch.testing.assert_close(base_pass(model, images).logits, model(images))


def test_a_transformer_has_its_class_token_as_embedding_even_after_a_move() -> None:
    network = torchvision.models.VisionTransformer(32, 8, 2, 2, 48, 96, num_classes=5)
    spec = ModelSpec(arch="vit", num_classes=5, image_shape=COLOUR, mean=(0.5,) * 3, std=(0.5,) * 3)
    model, images = Classifier(network, spec), random_images(2, COLOUR)
    with torch.no_grad():
        torch.nn.init.normal_(network.heads.head.weight)
        torch.testing.assert_close(model.head(model.embed(images)), model(images))
        model = model.double()
        torch.testing.assert_close(model.head(model.embed(images.double())), model(images.double()))


@pytest.mark.parametrize(
    ("arch", "shape", "parts"),
    [
        ("vit_b_16", COLOUR, ["vit_b_16 cannot take 3x32x32 images", "224"]),
        ("alexnet", GREY, ["alexnet cannot take 1x8x8 images"]),
        ("resnet19", COLOUR, ["unknown architecture 'resnet19'", "did you mean resnet18", "package.module:factory"]),
        ("", COLOUR, ["unknown architecture ''"]),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(arch: str, shape: tuple[int, int, int], parts: list[str]) -> None:
    with refused(*parts):
        build(arch, shape)


def test_every_torchvision_classifier_is_listed() -> None:
    names = architecture_names()
    assert names[0] == "small-cnn"
    assert {"resnet20", "resnet18", "vit_b_16", "convnext_tiny", "swin_t", "googlenet"} < set(names)
    assert not any(is_factory(name) or "segment" in name or "rcnn" in name for name in names)


def test_grey_images_through_a_colour_network_are_repeated() -> None:
    model, grey = build("resnet20", (1, 16, 16)), random_images(4, (1, 16, 16))
    with torch.no_grad():
        assert torch.equal(model(grey), model(grey.expand(-1, 3, -1, -1)))
        assert model.embed(grey).shape == (4, 64)


def test_normalisation_must_have_as_many_channels_as_the_network() -> None:
    with refused("takes 3 channels", "a mean of 1"):
        build_classifier("resnet20", num_classes=10, image_shape=COLOUR, mean=(0.5,), std=(0.5,))
    with refused("takes 3 channels", "images with 2"):
        build("resnet20", (2, 32, 32))


# Cutting at a named layer


@pytest.mark.parametrize(
    ("layer", "dimension"), [("layer3", 64), ("layer2.0.relu", 32), ("layer1", 16), ("linear", 10)]
)
def test_a_named_layer_is_pooled_and_leaves_the_head_alone(layer: str, dimension: int) -> None:
    model, plain = build("resnet20", COLOUR, layer=layer), build("resnet20", COLOUR)
    images = random_images(3, COLOUR)
    with torch.no_grad():
        embedding, head_input = model.features(images)
        assert embedding.shape == (3, dimension)
        assert torch.equal(head_input, plain.embed(images))
        torch.testing.assert_close(base_pass(model, images).logits, model(images))
        if layer == "layer3":  # pooled as the network itself pools it
            torch.testing.assert_close(embedding, plain.embed(images))


@pytest.mark.parametrize("layer", ["layer9", "", "layer3.7", "conv1.weight", "x.y"])
def test_an_unknown_layer_is_named_and_the_known_ones_too(layer: str) -> None:
    with refused(f"no layer {layer!r}", "layer1, layer2, layer3"):
        build("resnet20", COLOUR, layer=layer)


# The same image, the same embedding


@pytest.mark.parametrize("arch", ["small-cnn", "resnet20"])
def test_features_do_not_depend_on_the_batch_to_the_bit(
    arch: str, small: Classifier, digits_test: LabelledImages
) -> None:
    if arch == "small-cnn":
        model, images = small, to_images(torch.from_numpy(digits_test.images[:64]))
    else:
        model, images = build(arch, COLOUR), random_images(64, COLOUR)
    with torch.no_grad():
        alone = torch.cat([model.embed(image) for image in images.split(1)])
        for size in (2, 3, 7, 64):
            batched = torch.cat([model.embed(batch) for batch in images.split(size)])
            assert torch.equal(batched, alone), size
        order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
        assert torch.equal(model.embed(images[order]), alone[order])


def test_private_weights_are_the_models_own_until_they_train(small: Classifier) -> None:
    before = {key: value.clone() for key, value in small.state_dict().items()}
    network = small.private_network()
    images = small.normalise(random_images(2))
    assert torch.equal(network(images), small.network(images))
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not network.training
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(torch.nan)
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


def test_threads_may_build_at_the_same_time() -> None:
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: build_classifier("small-cnn", num_classes=3, image_shape=GREY), range(8)))
    for model in models:
        with torch.no_grad():
            torch.testing.assert_close(model.head(model.embed(random_images(2))), model(random_images(2)))


@pytest.mark.parametrize(("arch", "shape"), [("small-cnn", (1, 8, 8)), ("resnet20", (3, 32, 32))])
@pytest.mark.parametrize("tail", [None, "auto"])
def test_a_network_of_ours_is_cut_alike_with_and_without_torchvision(
    arch: str, shape: tuple[int, int, int], tail: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build_network(arch, num_classes=10, image_shape=shape).network.eval()
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    with_it = split_network(network, example=images, tail_layer=tail)
    monkeypatch.delitem(sys.modules, "torchvision")
    without = split_network(network, example=images, tail_layer=tail)
    assert "torchvision" not in sys.modules
    for one, other in zip(with_it.trunk(images), without.trunk(images), strict=True):
        assert torch.equal(one, other)
    assert with_it.head is without.head
    names = [
        {name for name, _ in split.tail.named_parameters()} if split.tail else None for split in (with_it, without)
    ]
    assert names[0] == names[1]


def test_what_a_network_of_ours_does_not_need_is_not_imported() -> None:
    """Either takes about as long as torch itself, each time that a command or an engine starts."""
    code = """
import sys
from mithridate.datasets import load_dataset
from mithridate.models import build_classifier
from index_builder.build import build_bundle
load_dataset("digits[test]")
build_classifier("small-cnn", num_classes=10, image_shape=(1, 8, 8))
print([name for name in ("torchvision", "sklearn", "torch._dynamo") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("readable", [True, False])
def test_the_digits_are_scikit_learns(readable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not readable:  # packed where it has no file, say
        monkeypatch.setattr("mithridate.datasets.builtin.find_spec", lambda name: None)
    theirs = load_digits()
    ours = np.concatenate([load_dataset(f"digits[{split}]").images for split in ("train", "test")])
    levels = np.rint(theirs.images * (255 / 16)).astype(np.uint8)
    assert sorted(image.tobytes() for image in ours) == sorted(image.tobytes() for image in levels)
    label = {image.tobytes(): int(label) for image, label in zip(levels, theirs.target, strict=True)}
    test = load_dataset("digits[test]")
    assert [label[image.tobytes()] for image in test.images] == test.labels.tolist()
