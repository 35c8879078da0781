"""The scopes of RMC: their default options, how options and presets are read, and how the defence is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mithridate.defenses.adapting import Adapter
from mithridate.defenses.averaging import Averaging, FirstStage
from mithridate.defenses.base import Resources, Tuned
from mithridate.defenses.exemplar_scores import ExemplarScores
from mithridate.defenses.guard import GuardConfig, suited
from mithridate.defenses.head_adam import AdamConfig
from mithridate.defenses.head_ridge import RidgeConfig, RidgeHead
from mithridate.defenses.options import canonical, fill, flatten, split_text, unknown
from mithridate.defenses.presets import preset_options
from mithridate.defenses.rmc import RMC
from mithridate.defenses.rmc_all import AllAdapter, AllConfig
from mithridate.defenses.rmc_config import RMCConfig
from mithridate.defenses.rmc_head import AdamHead
from mithridate.defenses.rmc_tail import TailAdapter, TailConfig
from mithridate.defenses.selection import SelectionConfig
from mithridate.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class _Scope:
    """One way to adapt: its default options, how its adapter is made, and how its name begins."""

    config: RMCConfig
    make: Callable[[Resources, Any], Adapter]
    prefix: Mapping[str, str]


def _ridge(resources: Resources, config: RidgeConfig) -> Adapter:
    return RidgeHead(resources=resources, config=config, scores=ExemplarScores(resources))


_GATED = GuardConfig(gate="auto")
"""Do no harm: without a gate, adaptation halves what an adversarially trained base withstands; how much of one it takes
depends on the base (docs/rmc.md).
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


@dataclass(frozen=True)
class RMCOptions:
    """``rmc``'s options as they were written. Raises OptionError for what is wrong with them, whatever the bundle."""

    written: Mapping[str, str]

    def __post_init__(self) -> None:
        full = _rmc_options(self.written)
        if full is not None:
            _read_rmc(full)

    def name(self, resources: Tuned) -> str:
        """The canonical text. Makes nothing."""
        return _rmc_name(*self._read(resources), resources)

    def make(
        self, resources: Resources, *, first: FirstStage | None = None, average: Averaging | None = None, name: str = ""
    ) -> RMC:
        """Between the other stages where there are any; ``name`` is then that of the whole."""
        scope, config = self._read(resources)
        return RMC(
            name=name or _rmc_name(scope, config, resources),
            resources=resources,
            adapter=scope.make(resources, config.adapting),
            selection=config.selection,
            guarding=suited(config.guarding, resources.exemplars),
            first=first,
            average=average,
        )

    def _read(self, resources: Tuned) -> tuple[_Scope, RMCConfig]:
        full = _rmc_options(self.written)
        return _read_rmc(_tuned(resources, self.written) if full is None else full)


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


def _tuned(resources: Tuned, options: Mapping[str, str]) -> Mapping[str, str]:
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


def _rmc_name(scope: _Scope, config: RMCConfig, resources: Tuned) -> str:
    name = canonical("rmc", config, scope.config, prefix=scope.prefix)
    return "rmc:preset=balanced" if name == "rmc" and resources.tuning is not None else name
