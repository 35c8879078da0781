"""One answer of every route, as the OpenAPI document shows it."""

from __future__ import annotations

from typing import Any

DIGIT = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAP0lEQVR4nAXBAQ2AMAwAsIYg4BLugDnhEibhTpCAFSygAAmXMFrISjDqBn19ZkNWRF12"
    "p3F4EatqNRA12dA9/Iy5EakHpvaFAAAAAElFTkSuQmCC"
)
"""A four, from scikit-learn's digits: a PNG of 8x8 px."""

_ID = "8c8f4a6f2f0b4b4d9d1f7f3f0c3f6f0e"
_BUNDLE = {"name": "digits-small-cnn", "digest": f"sha256:{64 * '0'}"}
_BEFORE = {"name": "digits-small-cnn", "digest": f"sha256:{64 * '1'}"}
_FOUR, _ONE = ({"label": label, "class_index": int(label), "confidence": p} for label, p in (("4", 0.98), ("1", 0.71)))


def _prediction(undefended: dict[str, Any]) -> dict[str, Any]:
    return {
        **_FOUR,
        "top": [_FOUR],
        "undefended": undefended,
        "suspicious": undefended["label"] != _FOUR["label"],
        "abstained": False,
        "adaptation": {
            "steps": 40,
            "stop_reason": "converged",
            "answered_from": "adapted",
            "held_out_loss": {"before": 0.61, "after": 0.08},
            "neighbors": 256,
            "neighbor_labels": {"4": 211, "1": 45},
            "adversarial_fraction": 0.93,
        },
        "neighbors": None,
    }


_PHASES = {"queue": 0.1, "decode": 0.4, "embed": 1.2, "search": 0.3, "adapt": 2.0, "predict": 0.2}

PREDICT: dict[str, Any] = {
    "id": _ID,
    "bundle": _BUNDLE,
    "defense": "rmc",
    "predictions": [_prediction(_ONE)],
    "batch": {"requests": 1, "images": 1},
    "timings_ms": {**_PHASES, "total": 4.4},
}

LAB: dict[str, Any] = {
    "id": _ID,
    "bundle": _BUNDLE,
    "defense": "rmc",
    "attack": "static",
    "steps": 20,
    "epsilon": "8/255",
    "label": _FOUR,
    "largest_change": 8,
    "clean": _prediction(_FOUR),
    "adversarial": _prediction(_ONE),
    "adversarial_png": DIGIT,
    "clean_png": DIGIT,
    "attack_ms": 31.0,
    "timings_ms": {**_PHASES, "total": 36.2},
}

BUNDLE: dict[str, Any] = {
    **_BUNDLE,
    "dataset": "digits[train]",
    "classes": [str(digit) for digit in range(10)],
    "image_shape": [1, 8, 8],
    "resize": "exact",
    "arch": "small-cnn",
    "exemplars": 2874,
    "copies": [
        {"name": "clean", "epsilon": None, "base_accuracy": 0.998},
        {"name": "pgd10", "epsilon": "32/255", "base_accuracy": 0.21},
    ],
    "index": "Flat",
    "prm": [],
}

DEFENSES: dict[str, Any] = {
    "default": "rmc",
    "defenses": [
        {"name": "none", "description": "the base model as it is", "cost": 1.0},
        {
            "name": "rmc",
            "description": "per image, the last layer is fitted to its nearest clean and adversarial exemplars",
            "cost": 2.3,
        },
        {
            "name": "rmc:scope=all",
            "description": "per image, all weights are fine-tuned (the published procedure, reset each time): slow",
            "cost": None,
        },
    ],
}


def _measured(right: int, accuracy: float, low: float, high: float) -> dict[str, Any]:
    return {"right": right, "images": 1000, "accuracy": accuracy, "low": low, "high": high}


CARD: dict[str, Any] = {
    "schema_version": 1,
    "bundle": _BUNDLE["digest"],
    "mithridate": "0.1.0",
    "created": "2026-01-31T12:00:00+00:00",
    "command": None,
    "dataset": {"spec": "cifar10[test,:1000]", "fingerprint": f"sha256:{64 * '2'}"},
    "images": 1000,
    "epsilon": "8/255",
    "suite": "full",
    "effort": {"rounds": 10, "steps": 40, "queries": 1000, "repeats": 20, "gate_images": 50, "minutes": 20},
    "seed": 0,
    "defenses": [
        {
            "name": "none",
            "random": False,
            "clean": _measured(920, 0.92, 0.902, 0.935),
            "worst_case": _measured(350, 0.35, 0.321, 0.38),
            "gain": None,
            "clean_cost": None,
            "ruling": "base",
            "reasons": [],
            "gates_passed": 11,
            "gates_failed": [],
            "latency_factor": None,
        },
        {
            "name": "rmc",
            "random": False,
            "clean": _measured(910, 0.91, 0.891, 0.926),
            "worst_case": _measured(320, 0.32, 0.292, 0.35),
            "gain": {"difference": -0.03, "low": -0.041, "high": -0.019, "p": 0.0001, "gained": 5, "lost": 35},
            "clean_cost": {"difference": -0.01, "low": -0.017, "high": -0.003, "p": 0.01, "gained": 2, "lost": 12},
            "ruling": "harmful",
            "reasons": ["the interval of the gain lies below zero"],
            "gates_passed": 11,
            "gates_failed": [],
            "latency_factor": 2.3,
        },
    ],
}

LIVE_BUNDLES: dict[str, Any] = {"current": _BUNDLE, "previous": _BEFORE, "loading": None}
METRICS = """\
# HELP mithridate_requests_total Requests to predict
# TYPE mithridate_requests_total counter
mithridate_requests_total{defense="rmc",outcome="ok"} 1.0
"""
