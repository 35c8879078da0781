"""Architectures by name: ours, torchvision's, and a user's own ``package.module:factory``."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from mithridate.errors import ModelError
from mithridate.models.cifar_resnet import BLOCKS_PER_STAGE, CifarResNet
from mithridate.models.small_cnn import SmallCNN

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network with fresh weights, and how its input is normalised when nobody says otherwise.

    ``in_channels`` is what the network itself takes; grey images are repeated for a colour network.
    """

    network: nn.Module
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def build_network(arch: str, *, num_classes: int, image_shape: tuple[int, int, int]) -> Architecture:
    """Builds ``arch`` for images of ``image_shape`` (C, H, W) and ``num_classes`` classes.

    Raises ModelError for an unknown name, or a factory that cannot be imported or called.
    """
    channels, side = image_shape[0], min(image_shape[1:])
    if is_factory(arch):
        return _from_factory(arch, num_classes=num_classes, channels=channels)
    if arch == "small-cnn":
        network: nn.Module = SmallCNN(num_classes=num_classes, in_channels=channels, side=side)
        return Architecture(network=network, in_channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    if arch in BLOCKS_PER_STAGE:
        network = CifarResNet(BLOCKS_PER_STAGE[arch], num_classes=num_classes)
        return Architecture(network=network, in_channels=3, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return _from_torchvision(arch, num_classes=num_classes)


def is_factory(arch: str) -> bool:
    """Whether ``arch`` names code outside Mithridate (``package.module:factory``)."""
    return ":" in arch


def architecture_names() -> list[str]:
    """Every built-in and torchvision classifier, ours first."""
    import torchvision

    return ["small-cnn", *BLOCKS_PER_STAGE, *torchvision.models.list_models(module=torchvision.models)]


def _from_torchvision(arch: str, *, num_classes: int) -> Architecture:
    import torchvision

    names = architecture_names()
    if arch not in names:
        near = difflib.get_close_matches(arch, names, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ModelError(
            f"unknown architecture {arch!r}{hint} Allowed: small-cnn, {', '.join(BLOCKS_PER_STAGE)}, any torchvision "
            "classifier (resnet18, vit_b_16, ...), or package.module:factory"
        )
    # Without this the two oldest builders warn about a default that is going to change.
    extra = {"init_weights": False} if arch in ("googlenet", "inception_v3") else {}
    network = torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **extra)
    return Architecture(network=network, in_channels=3, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _from_factory(arch: str, *, num_classes: int, channels: int) -> Architecture:
    """Calls the user's factory with those of ``num_classes`` and ``in_channels`` that it takes.

    The network is given un-normalised images in [0, 1]; what it needs beyond that it does itself.
    """
    factory = _import_factory(arch)
    offered = {"num_classes": num_classes, "in_channels": channels}
    try:
        parameters = inspect.signature(factory).parameters.values()
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters}
        network = factory(**{k: v for k, v in offered.items() if takes_all or k in names})
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"the factory {arch!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"the factory {arch!r} returned {type(network).__name__}; it must return a torch.nn.Module")
    return Architecture(network=network, in_channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)


def _import_factory(arch: str) -> Callable[..., object]:
    module_name, _, attribute = arch.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ModelError(
            f"cannot import {arch!r}: {type(error).__name__}: {error}. Write it as package.module:factory, "
            "importable from the current directory or the Python path"
        ) from error
    if not callable(factory):
        raise ModelError(f"{arch!r} is a {type(factory).__name__}; it must be a callable that returns a module")
    typed: Callable[..., object] = factory
    return typed
