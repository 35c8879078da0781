"""Architectures, and the classifier that wraps any of them."""

from mithridate.models.classifier import Classifier, ModelSpec, Trace, build_classifier
from mithridate.models.registry import architecture_names, is_factory
from mithridate.models.weights import load_classifier, load_weights, read_metadata, save_weights

__all__ = [
    "Classifier",
    "ModelSpec",
    "Trace",
    "architecture_names",
    "build_classifier",
    "is_factory",
    "load_classifier",
    "load_weights",
    "read_metadata",
    "save_weights",
]
