"""Defences by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mithridate.defenses.adapting import Adapter
from mithridate.defenses.base import Defence, Resources
from mithridate.defenses.exemplar_scores import ExemplarScores
from mithridate.defenses.guard import GuardConfig
from mithridate.defenses.head_adam import AdamConfig
from mithridate.defenses.head_ridge import RidgeConfig, RidgeHead
from mithridate.defenses.knn_oat import KNNOAT, KNNOATConfig
from mithridate.defenses.neighbor_vote import NeighborVote, NeighborVoteConfig
from mithridate.defenses.none import NoDefence
from mithridate.defenses.options import canonical, fill, flatten, split_text, unknown
from mithridate.defenses.pixel_deflection import PixelDeflectionConfig, make_pixel_deflection
from mithridate.defenses.presets import preset_options
from mithridate.defenses.randomization import RandomizationConfig, make_randomization
from mithridate.defenses.region import RegionConfig, make_region
from mithridate.defenses.rmc import RMC
from mithridate.defenses.rmc_all import AllAdapter, AllConfig
from mithridate.defenses.rmc_config import RMCConfig
from mithridate.defenses.rmc_head import AdamHead
from mithridate.defenses.rmc_tail import TailAdapter, TailConfig
from mithridate.defenses.sap import SAPConfig, make_sap
from mithridate.defenses.selection import SelectionConfig
from mithridate.errors import OptionError

DEFAULT_DEFENCES = ("none", "rmc", "webnn", "deepnn")
"""What a service offers unless told otherwise. Not ``rmc:scope=all``: one request of it keeps all others waiting."""

DESCRIPTIONS = {
    "none": "the base model as it is",
    "rmc": "per image, the last layer is fitted to its nearest clean and adversarial exemplars",
    "rmc:scope=tail": "per image, the last layers are fine-tuned on the exemplars' stored activations",
    "rmc:scope=all": "per image, all weights are fine-tuned (the published procedure, reset each time): slow",
    "sap": "100 passes are averaged, in each a random part of all activations is dropped: 100 times the cost",
    "randomization": "the image at a random size, somewhere on a larger canvas",
    "region": "the majority vote of 1,000 points around the image: 1,000 times the cost",
    "pixel-deflection": "some pixels are replaced by others nearby, then wavelets take the noise away",
    "webnn": "what the nearest exemplars are, clean and adversarial, averaged",
    "deepnn": "what the nearest clean exemplars are, averaged",
    "knn-oat": "per image, all weights are trained on freshly attacked clean neighbours: a control, offline only",
}

Maker = Callable[[Resources], Defence]


@dataclass(frozen=True, kw_only=True)
class _Scope:
    """One way to adapt: its default options, how its adapter is made, and how its name begins."""

    config: RMCConfig
    make: Callable[[Resources, Any], Adapter]
    prefix: Mapping[str, str]


def _ridge(resources: Resources, config: RidgeConfig) -> Adapter:
    return RidgeHead(resources=resources, config=config, scores=ExemplarScores(resources))


_GATED = GuardConfig(gate=0.05)
"""Do no harm: without a gate, adaptation halves what an adversarially trained base withstands; with it, it costs a
static repair or two in a hundred (docs/rmc.md).
"""

# The options that each scope has without any: the preset ``balanced``.
_SCOPES = {
    ("head", "ridge"): _Scope(
        config=RMCConfig(
            selection=SelectionConfig(neighbors=256, temperature=0.25), adapting=RidgeConfig(), guarding=_GATED
        ),
        make=_ridge,
        prefix={},
    ),
    ("head", "adam"): _Scope(
        config=RMCConfig(selection=SelectionConfig(neighbors=256), adapting=AdamConfig(), guarding=_GATED),
        make=lambda resources, config: AdamHead(resources=resources, config=config),
        prefix={"solver": "adam"},
    ),
    ("tail", None): _Scope(
        config=RMCConfig(
            selection=SelectionConfig(neighbors=16),
            adapting=TailConfig(learning_rate=0.01, epochs=6, batch_size=16, refit=False),
            guarding=_GATED,
        ),
        make=lambda resources, config: TailAdapter(resources=resources, config=config),
        prefix={"scope": "tail"},
    ),
    ("all", None): _Scope(
        config=RMCConfig(
            selection=SelectionConfig(neighbors=16),
            adapting=AllConfig(learning_rate=0.003, epochs=6, batch_size=16),
            guarding=_GATED,
        ),
        make=lambda resources, config: AllAdapter(resources=resources, config=config),
        prefix={"scope": "all"},
    ),
}


@dataclass(frozen=True, kw_only=True)
class _Other:
    """A defence whose options do not depend on anything: the default ones, and how it is made."""

    config: Any
    make: Callable[[Resources, Any], Defence]


_OTHERS: Mapping[str, _Other] = {
    "sap": _Other(config=SAPConfig(), make=make_sap),
    "randomization": _Other(config=RandomizationConfig(), make=make_randomization),
    "region": _Other(config=RegionConfig(), make=make_region),
    "pixel-deflection": _Other(config=PixelDeflectionConfig(), make=make_pixel_deflection),
    "webnn": _Other(
        config=NeighborVoteConfig(),
        make=lambda resources, config: NeighborVote(resources=resources, kind="webnn", config=config),
    ),
    "deepnn": _Other(
        config=NeighborVoteConfig(),
        make=lambda resources, config: NeighborVote(resources=resources, kind="deepnn", config=config),
    ),
    "knn-oat": _Other(config=KNNOATConfig(), make=lambda resources, config: KNNOAT(resources=resources, config=config)),
}

NAMES = ("none", "rmc", *_OTHERS)


def parse_defence(text: str) -> Maker:
    """``none``, ``rmc[:scope=head|tail|all,preset=NAME,...]``, or another of ``NAMES`` with its options.

    Gives what makes the defence out of a bundle's resources. Raises OptionError for unknown names and options.
    """
    name, options = split_text(text)
    if name == "rmc":
        return _parse_rmc(options)
    if name == "none":
        if options:
            raise OptionError(f"none takes no options; seen: {text!r}")
        return lambda resources: NoDefence(resources=resources)
    if name not in _OTHERS:
        raise OptionError(unknown("defence", name, NAMES))
    other = _OTHERS[name]
    config = fill(other.config, options, of=name)
    return lambda resources: other.make(resources, config)


def _parse_rmc(options: dict[str, str]) -> Maker:
    full = _rmc_options(options)
    if full is not None:
        _read_rmc(full)  # says now what is wrong with it
    return lambda resources: _make_rmc(_tuned(resources, options) if full is None else full, resources)


def _rmc_options(options: Mapping[str, str]) -> Mapping[str, str] | None:
    """With the preset's in place; None where a bundle's tuning decides. Without a preset that is ``balanced``."""
    name = options.get("preset")
    rest = {key: value for key, value in options.items() if key != "preset"}
    if name == "tuned":
        for key in ("scope", "solver"):
            if key in rest:
                raise OptionError(f"rmc: preset=tuned brings its own {key}; leave out {key}={rest[key]}")
        known = {key for scope in _SCOPES.values() for key in flatten(scope.config)}
        for key in rest:
            if key not in known:
                raise OptionError(unknown("option of rmc", key, known))
    if name == "tuned" or not options:
        return None
    scope = rest.get("scope", "head")
    scopes = {scope for scope, _ in _SCOPES}
    if scope not in scopes:
        raise OptionError(unknown("scope", scope, scopes))
    preset = preset_options(name or "balanced", scope)
    solver = preset.get("solver", "ridge")
    if scope == "head" and preset and rest.get("solver", solver) != solver:
        raise OptionError(f"rmc: preset={name} is for solver={solver}; leave out solver={rest['solver']}")
    return {**preset, **rest}


def _tuned(resources: Resources, options: Mapping[str, str]) -> Mapping[str, str]:
    """What the bundle was tuned to, and ``options`` beside it. Raises OptionError where it must have been and was
    not.
    """
    rest = {key: value for key, value in options.items() if key != "preset"}
    if resources.tuning is not None:
        return {**split_text(resources.tuning)[1], **rest}
    if "preset" in options:
        raise OptionError("this bundle has not been tuned; run mithridate bench BUNDLE --tune, or name another preset")
    return {**preset_options("balanced", "head"), **rest}


def _read_rmc(options: Mapping[str, str]) -> tuple[_Scope, RMCConfig]:
    rest = dict(options)
    scope, solver = rest.pop("scope", "head"), rest.pop("solver", None)
    if scope == "head":
        solver = solver or "ridge"
        if solver not in ("ridge", "adam"):
            raise OptionError(unknown("solver", solver, ("ridge", "adam")))
    elif solver is not None:
        raise OptionError(f"rmc:scope={scope} has no choice of solvers; solver belongs to scope=head")
    found = _SCOPES[scope, solver]
    of = "rmc" + (":" + ",".join(f"{k}={v}" for k, v in found.prefix.items()) if found.prefix else "")
    return found, fill(found.config, rest, of=of)


def _rmc_name(scope: _Scope, config: RMCConfig, resources: Resources) -> str:
    name = canonical("rmc", config, scope.config, prefix=scope.prefix)
    return "rmc:preset=balanced" if name == "rmc" and resources.tuning is not None else name


def _make_rmc(options: Mapping[str, str], resources: Resources) -> Defence:
    scope, config = _read_rmc(options)
    return RMC(
        name=_rmc_name(scope, config, resources),
        resources=resources,
        adapter=scope.make(resources, config.adapting),
        selection=config.selection,
        guarding=config.guarding,
    )


def build_defence(text: str, resources: Resources) -> Defence:
    """The defence that ``text`` names, on ``resources``."""
    return parse_defence(text)(resources)


def defence_name(text: str, resources: Resources) -> str:
    """The canonical name of what ``text`` names. Makes nothing: a service asks this of whatever a request says."""
    name, options = split_text(text)
    if name == "rmc":
        full = _rmc_options(options)
        return _rmc_name(*_read_rmc(_tuned(resources, options) if full is None else full), resources)
    if name in _OTHERS:
        config = _OTHERS[name].config
        return canonical(name, fill(config, options, of=name), config)
    parse_defence(text)  # none, or it says what is wrong
    return name


def describe_defence(defence: Defence) -> str:
    """One sentence on what a defence does."""
    family, options = split_text(defence.name)
    scope = f"{family}:scope={options.get('scope')}"
    return DESCRIPTIONS.get(scope, DESCRIPTIONS[family])
