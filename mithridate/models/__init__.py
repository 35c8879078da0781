"""Architectures, and the classifier that wraps any of them."""

from mithridate.models.classifier import Classifier, ModelSpec, Trace, build_classifier
from mithridate.models.prm import PRM, PRMSpec, build_prm, load_prm, save_prm
from mithridate.models.registry import architecture_names, is_factory
from mithridate.models.weights import load_classifier, load_weights, read_metadata, save_weights

__all__ = [
    "PRM",
    "Classifier",
    "ModelSpec",
    "PRMSpec",
    "Trace",
    "architecture_names",
    "build_classifier",
    "build_prm",
    "is_factory",
    "load_classifier",
    "load_prm",
    "load_weights",
    "read_metadata",
    "save_prm",
    "save_weights",
]
