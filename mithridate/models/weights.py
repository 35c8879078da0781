"""Weights on disk: safetensors only, checked before they are used."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from mithridate.errors import ModelError
from mithridate.models.classifier import Classifier, build_classifier
from mithridate.models.splitting import DEFAULT_LAYER

HEADER = "mithridate"
"""The one entry in a file's header that is ours; what is no classifier names its ``kind`` there."""


def save_weights(classifier: Classifier, path: Path) -> None:
    """Writes the network's state and, in the header, what is needed to build it again.

    Raises OSError where the disk refuses.
    """
    state = {key: value.detach().cpu().contiguous().clone() for key, value in classifier.network.state_dict().items()}
    # Cloned, since safetensors refuses tensors that share memory. One entry in the header, since it writes several in
    # random order, and the same build must give the same bytes.
    header = {HEADER: json.dumps(classifier.spec.metadata(), sort_keys=True)}
    path.write_bytes(save(state, metadata=header))  # save_file would make a file that only its owner can read


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in the header. Raises ModelError for what is not a safetensors file."""
    return _read(path)[1]


def load_weights(network: nn.Module, path: Path) -> None:
    """Fills ``network`` from ``path``. Raises ModelError where names, shapes or values do not fit."""
    state, _ = _read(path)
    if state and all(key.startswith("module.") for key in state):  # saved from a data-parallel wrapper
        state = {key.removeprefix("module."): value for key, value in state.items()}
    wanted = network.state_dict()
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in wanted]
    misshapen = [k for k in state if k in wanted and state[k].shape != wanted[k].shape]
    if missing or unexpected or misshapen:
        raise ModelError(
            f"{path} does not fit the architecture: {_describe(missing, unexpected, misshapen, state, wanted)}"
        )
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise ModelError(f"{path} holds NaN or infinite numbers in {_some(bad)}")
    network.load_state_dict(state, strict=False)


def load_classifier(
    path: Path | None,
    *,
    arch: str | None,
    num_classes: int,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    embedding_layer: str = DEFAULT_LAYER,
    tail_layer: str | None = None,
) -> Classifier:
    """Builds ``arch`` and fills it from ``path``; what is not given is taken from the file's header.

    Raises ModelError where the two disagree with the data's classes or image shape.
    """
    metadata = read_metadata(path) if path else {}
    if "kind" in metadata:
        raise ModelError(f"{path} is a {metadata['kind'].upper()}, not a classifier; give it with --prm")
    arch = arch or metadata.get("arch")
    if arch is None:
        raise ModelError(f"{path} does not name its architecture; give it with --arch (small-cnn, resnet20, ...)")
    try:
        _check_against_header(metadata, path, num_classes=num_classes, image_shape=image_shape)
        mean = mean or _numbers(metadata, "mean", "normalize_mean")
        std = std or _numbers(metadata, "std", "normalize_std")
    except (ValueError, TypeError) as error:
        raise ModelError(f"the header of {path} is not readable ({error})") from error
    classifier = build_classifier(
        arch,
        num_classes=num_classes,
        image_shape=image_shape,
        mean=mean,
        std=std,
        embedding_layer=embedding_layer,
        tail_layer=tail_layer,
    )
    if path:
        load_weights(classifier.network, path)
    return classifier


def _check_against_header(
    metadata: dict[str, str], path: Path | None, *, num_classes: int, image_shape: tuple[int, int, int]
) -> None:
    seen_classes = metadata.get("num_classes")
    if seen_classes is not None and int(seen_classes) != num_classes:
        raise ModelError(f"{path} was trained for {seen_classes} classes; the data has {num_classes}")
    seen_shape = metadata.get("image_shape")
    if seen_shape is not None and tuple(json.loads(seen_shape)) != tuple(image_shape):
        raise ModelError(f"{path} was trained on {seen_shape} images (C, H, W); the data has {list(image_shape)}")


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not path.is_file():
        raise ModelError(f"no model file at {path}; allowed: a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            if HEADER in header:
                header = {str(key): str(value) for key, value in json.loads(header[HEADER]).items()}
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error}); no other format is taken") from error


def _numbers(metadata: dict[str, str], *keys: str) -> tuple[float, ...] | None:
    for key in keys:
        if key in metadata:
            return tuple(float(part) for part in metadata[key].strip("[]").split(","))
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _describe(
    missing: list[str],
    unexpected: list[str],
    misshapen: list[str],
    state: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
) -> str:
    shapes = [f"{k} is {tuple(state[k].shape)}, wanted {tuple(wanted[k].shape)}" for k in misshapen]
    parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    return "; ".join(f"{title}: {_some(names)}" for title, names in parts if names)
