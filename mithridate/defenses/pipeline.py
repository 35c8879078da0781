"""Defences by name, and several of them as the stages of one.

A defence is ``none``, a neighbour vote, or up to three stages, in this order: *transform* the image (``prm``,
``randomization``, ``pixel-deflection``), *adapt* the weights (``rmc``), *average* many passes (``sap``, ``region``,
``tta``): ``prm+rmc+sap``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from mithridate.defenses.averaging import Averaging, FirstStage, Sampler, Transform, Transformed
from mithridate.defenses.base import Defence, Resources, Tuned
from mithridate.defenses.knn_oat import KNNOAT, KNNOATConfig
from mithridate.defenses.neighbor_vote import NeighborVote, NeighborVoteConfig
from mithridate.defenses.none import NoDefence
from mithridate.defenses.options import canonical, fill, shortened, split_text, unknown
from mithridate.defenses.pixel_deflection import Deflector, PixelDeflectionConfig
from mithridate.defenses.prm import Manipulator, PRMConfig
from mithridate.defenses.randomization import RandomizationConfig, Resizer
from mithridate.defenses.region import RegionConfig, Surroundings
from mithridate.defenses.rmc import RMC
from mithridate.defenses.rmc_scopes import RMCOptions
from mithridate.defenses.sampled import Sampled
from mithridate.defenses.sap import Pruner, SAPConfig
from mithridate.defenses.tta import TTAConfig, Views
from mithridate.errors import OptionError, UnknownDefenceError

DEFAULT_DEFENCES = ("none", "rmc", "webnn", "deepnn")
"""What a service offers unless told otherwise. Not ``rmc:scope=all``: one request of it keeps all others waiting."""

WITH_PRM = ("prm", "prm+rmc")
"""And these, where the bundle has a PRM."""

DESCRIPTIONS = {
    "none": "the base model as it is",
    "rmc": "per image, the last layer is fitted to its nearest clean and adversarial exemplars",
    "rmc:scope=tail": "per image, the last layers are fine-tuned on the exemplars' stored activations",
    "rmc:scope=all": "per image, all weights are fine-tuned (the published procedure, reset each time): slow",
    "prm": "the image, moved by a pixel, is rebuilt from a quarter or half of its pixels",
    "sap": "passes are averaged, in each a random part of all activations dropped: a forward pass each, 100 by default",
    "randomization": "the image at a random size, somewhere on a larger canvas",
    "region": "the majority vote of many points around the image: a forward pass each, 1,000 by default",
    "tta": "the mean over the image mirrored and moved: a forward pass each, 10 by default (5 in grey)",
    "pixel-deflection": "some pixels are replaced by others nearby, then wavelets take the noise away",
    "webnn": "what the nearest exemplars are, clean and adversarial, averaged",
    "deepnn": "what the nearest clean exemplars are, averaged",
    "knn-oat": "per image, all weights are trained on freshly attacked clean neighbours: a control, offline only",
}

Maker = Callable[[Resources], Defence]


@dataclass(frozen=True, kw_only=True)
class _First:
    """A defence that transforms the image: its default options, and how it is made."""

    config: Any
    make: Callable[[Resources, Any], Transform]


@dataclass(frozen=True, kw_only=True)
class _Last:
    """One that averages passes."""

    config: Any
    make: Callable[[Resources, Any], Sampler]
    reduce: Literal["softmax", "vote"] = "softmax"


@dataclass(frozen=True, kw_only=True)
class _Alone:
    """One that is no stage."""

    config: Any
    make: Callable[[Resources, Any], Defence]


_FIRST: Mapping[str, _First] = {
    "prm": _First(config=PRMConfig(), make=lambda resources, config: Manipulator(resources=resources, config=config)),
    "randomization": _First(
        config=RandomizationConfig(), make=lambda resources, config: Resizer(resources=resources, config=config)
    ),
    "pixel-deflection": _First(
        config=PixelDeflectionConfig(), make=lambda resources, config: Deflector(resources=resources, config=config)
    ),
}
_LAST: Mapping[str, _Last] = {
    "sap": _Last(config=SAPConfig(), make=lambda resources, config: Pruner(resources=resources, config=config)),
    "region": _Last(
        config=RegionConfig(),
        make=lambda resources, config: Surroundings(resources=resources, config=config),
        reduce="vote",
    ),
    "tta": _Last(config=TTAConfig(), make=lambda resources, config: Views(resources=resources, config=config)),
}
_ALONE: Mapping[str, _Alone] = {
    "webnn": _Alone(
        config=NeighborVoteConfig(),
        make=lambda resources, config: NeighborVote(resources=resources, kind="webnn", config=config),
    ),
    "deepnn": _Alone(
        config=NeighborVoteConfig(),
        make=lambda resources, config: NeighborVote(resources=resources, kind="deepnn", config=config),
    ),
    "knn-oat": _Alone(config=KNNOATConfig(), make=lambda resources, config: KNNOAT(resources=resources, config=config)),
}

NAMES = ("none", "rmc", *_FIRST, *_LAST, *_ALONE)

_ORDER = ("transform", "adapt", "average")


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One part of a defence's text, read: ``options`` is a config, or RMCOptions for ``rmc``."""

    family: str
    options: Any

    @property
    def kind(self) -> str | None:
        """Which stage this is, None where it stands alone."""
        if self.family == "rmc":
            return "adapt"
        return "transform" if self.family in _FIRST else "average" if self.family in _LAST else None

    def name(self, resources: Tuned) -> str:
        """The canonical text."""
        if isinstance(self.options, RMCOptions):
            return self.options.name(resources)
        return self.family if self.options is None else canonical(self.family, self.options, type(self.options)())


def parse_defence(text: str) -> Maker:
    """``none``, ``rmc[:scope=head|tail|all,preset=NAME,...]``, another of ``NAMES`` with its options, or stages joined
    by ``+`` (or a space, which is what a ``+`` in a URL says).

    Gives what makes the defence out of a bundle's resources. Raises OptionError for unknown names and options, and for
    stages that do not go together.
    """
    stages = _read(text)
    return lambda resources: _make(stages, resources)


def build_defence(text: str, resources: Resources) -> Defence:
    """The defence that ``text`` names, on ``resources``."""
    return parse_defence(text)(resources)


def defence_name(text: str, resources: Tuned) -> str:
    """The canonical name of what ``text`` names. Makes nothing: a service asks this of whatever a request says."""
    return _name(_read(text), resources)


def describe_defence(defence: Defence) -> str:
    """One sentence on what a defence does."""
    said = []
    for part in split_stages(defence.name):
        family, options = split_text(part)
        scope = f"{family}:scope={options.get('scope')}"
        gate = f", gate {defence.guarding.lead:g}" if family == "rmc" and isinstance(defence, RMC) else ""
        said.append(DESCRIPTIONS.get(scope, DESCRIPTIONS[family]) + gate)
    return "; then ".join(said)


def servable_defences(resources: Resources) -> tuple[str, ...]:
    """Every defence that may make sense on ``resources``, with its default options: all single ones but what is for
    offline comparison, and the compositions of PRM, RMC and SAP. Some networks do not take some of them.
    """
    alone = [name for name in ("none", "rmc", *_FIRST, *_LAST, *_ALONE) if name != "knn-oat"]
    found = [*alone, "prm+rmc", "prm+sap", "rmc+sap", "prm+rmc+sap"]
    return tuple(text for text in found if resources.prms or "prm" not in split_stages(text))


def split_stages(text: str) -> list[str]:
    """The stages' texts. A number may have a ``+`` of its own, as in 1e+3; a name begins with a letter."""
    return re.split(r"[+ ](?=[^\W\d_])", text.strip())


def _read(text: str) -> tuple[_Stage, ...]:
    parts = split_stages(text)
    if len(parts) > len(_ORDER):
        raise OptionError(f"{len(parts)} stages are joined in {shortened(text)}; {_grammar()}")
    stages = tuple(_read_stage(part) for part in parts)
    kinds = [stage.kind for stage in stages]
    if len(stages) > 1:
        for stage in stages:
            if stage.kind is None:
                raise OptionError(f"{stage.family} stands alone and is no stage of {shortened(text)}; {_grammar()}")
        places = [_ORDER.index(str(kind)) for kind in kinds]
        if any(later <= earlier for earlier, later in pairwise(places)):
            seen = ", ".join(f"{stage.family} ({stage.kind})" for stage in stages)
            raise OptionError(f"{shortened(text)} is not in order, or has two stages of a kind: {seen}; {_grammar()}")
        if kinds[0] == "transform" and stages[0].options.passes != 1:
            raise OptionError(
                f"{stages[0].family}: passes={stages[0].options.passes} cannot be followed by another stage, which "
                "sees one image; leave passes out"
            )
    return stages


def _grammar() -> str:
    return f"allowed: at most one each of {' | '.join(_FIRST)}, then rmc, then {' | '.join(_LAST)}, as in prm+rmc+sap"


def _read_stage(text: str) -> _Stage:
    name, options = split_text(text)
    if name == "rmc":
        return _Stage(family=name, options=RMCOptions(options))
    if name == "none":
        if options:
            raise OptionError(f"none takes no options; seen: {text!r}")
        return _Stage(family=name, options=None)
    found = _FIRST.get(name) or _LAST.get(name) or _ALONE.get(name)
    if found is None:
        raise UnknownDefenceError(unknown("defence", name, NAMES))
    return _Stage(family=name, options=fill(found.config, options, of=name))


def _name(stages: Sequence[_Stage], resources: Tuned) -> str:
    return "+".join(stage.name(resources) for stage in stages)


def _make(stages: Sequence[_Stage], resources: Resources) -> Defence:
    name, by_kind = _name(stages, resources), {stage.kind: stage for stage in stages}
    if None in by_kind:
        alone = by_kind[None]
        return (
            NoDefence(resources=resources)
            if alone.family == "none"
            else _ALONE[alone.family].make(resources, alone.options)
        )
    transform, adapt, average = (by_kind.get(kind) for kind in _ORDER)
    averaging = _averaging(average, resources) if average else None
    if transform and not (adapt or average):
        return Sampled(name=name, resources=resources, averaging=_transforming(transform, resources))
    first = _first_stage(transform, resources) if transform else None
    if adapt:
        made: Defence = adapt.options.make(resources, first=first, average=averaging, name=name)
        return made
    assert averaging is not None
    return Sampled(name=name, resources=resources, averaging=averaging, first=first)


def _averaging(stage: _Stage, resources: Resources) -> Averaging:
    last = _LAST[stage.family]
    sampler = last.make(resources, stage.options)
    if isinstance(sampler, Views):  # so many passes as there are views, and attackers are given them all
        views = len(sampler.views)
        return Averaging(sampler=sampler, passes=views, attack_passes=views)
    options = stage.options
    return Averaging(sampler=sampler, passes=options.passes, attack_passes=options.attack_passes, reduce=last.reduce)


def _transforming(stage: _Stage, resources: Resources) -> Averaging:
    transform = _FIRST[stage.family].make(resources, stage.options)
    return Averaging(
        sampler=Transformed(transform=transform),
        passes=stage.options.passes,
        attack_passes=1 if transform.attack_is_fixed else stage.options.attack_passes,
    )


def _first_stage(stage: _Stage, resources: Resources) -> FirstStage:
    transform = _FIRST[stage.family].make(resources, stage.options)
    return FirstStage(
        transform=transform, attack_passes=1 if transform.attack_is_fixed else stage.options.attack_passes
    )
