"""Named settings of RMC, by scope. Every one can be changed by options beside it: ``rmc:preset=fast,neighbors=32``."""

from __future__ import annotations

from collections.abc import Mapping

from mithridate.defenses.options import unknown
from mithridate.errors import OptionError

Options = Mapping[str, str]

_PAPER = {"epochs": "100", "batch_size": "128", "patience": "5", "held_out": "0.2", "gate": "0"}
"""Wu et al. 2020 and their code: at most 100 epochs of batches of 128, the nearest fifth held out, patience 5; no gate.
"""

_PAPER_HEAD = {"tolerance": "0", "refit": "false", "gate": "0"}
"""The same rules for the head, whose steps take all neighbours at once: as many as the epochs have batches."""

PRESETS: Mapping[str, Mapping[str, Options]] = {
    # The authors' constants for ImageNet: 2,048 neighbours, Adam with 1e-5, on all weights.
    "paper-imagenet": {
        "head": {
            "solver": "adam",
            "neighbors": "2048",
            "learning_rate": "1e-05",
            "steps": "1300",
            "patience": "65",
            **_PAPER_HEAD,
        },
        "tail": {"neighbors": "2048", "learning_rate": "1e-05", **_PAPER},
        "all": {"neighbors": "2048", "learning_rate": "1e-05", **_PAPER},
    },
    # The constants of the CIFAR-10 re-implementation of Chen et al. (ICLR 2022): 1,024 neighbours, Adam with 2.5e-5.
    "paper-cifar10": {
        "head": {
            "solver": "adam",
            "neighbors": "1024",
            "learning_rate": "2.5e-05",
            "steps": "700",
            "patience": "35",
            **_PAPER_HEAD,
        },
        "tail": {"neighbors": "1024", "learning_rate": "2.5e-05", **_PAPER},
        "all": {"neighbors": "1024", "learning_rate": "2.5e-05", **_PAPER},
    },
    # Ours. What every scope does without a preset: these stay empty, the settings are the defaults in pipeline.py.
    "balanced": {"head": {}, "tail": {}, "all": {}},
    # Ours: cheaper, and still repairs most of a static attack.
    "fast": {
        "head": {"neighbors": "64", "anchor": "0.01"},
        "tail": {"learning_rate": "0.02", "epochs": "2"},
        "all": {"epochs": "3"},
    },
}


def preset_options(name: str, scope: str) -> Options:
    """The options of a preset in a scope. Raises OptionError for a name that is not known."""
    if name not in PRESETS:
        raise OptionError(unknown("preset", name, (*PRESETS, "tuned")))
    return PRESETS[name][scope]
