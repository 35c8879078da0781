"""Defences by name."""

from __future__ import annotations

from collections.abc import Callable

from mithridate.defenses.base import Defence, Resources
from mithridate.defenses.neighbor_vote import NeighborVote, NeighborVoteConfig
from mithridate.defenses.none import NoDefence
from mithridate.defenses.options import fill, split_text, unknown
from mithridate.defenses.rmc_all import RMCAll, RMCAllConfig
from mithridate.defenses.rmc_head import RMCHead, RMCHeadConfig
from mithridate.errors import OptionError

DEFAULT_DEFENCES = ("none", "rmc", "webnn", "deepnn")
"""What a service offers unless told otherwise. Not ``rmc:scope=all``: one request of it keeps all others waiting."""

DESCRIPTIONS = {
    "none": "the base model as it is",
    "rmc": "per image, the last layer is fine-tuned on its nearest clean and adversarial exemplars",
    "rmc:scope=all": "per image, all weights are fine-tuned (the published procedure, reset each time): slow",
    "webnn": "majority of the nearest exemplars, clean and adversarial",
    "deepnn": "majority of the nearest clean exemplars",
}

Maker = Callable[[Resources], Defence]


def parse_defence(text: str) -> Maker:
    """``none``, ``rmc[:scope=head|all,...]``, ``webnn[:neighbors=K]``, ``deepnn[:neighbors=K]``.

    Gives what makes the defence out of a bundle's resources. Raises OptionError for unknown names and options.
    """
    name, options = split_text(text)
    match name:
        case "none":
            if options:
                raise OptionError(f"none takes no options; seen: {text!r}")
            return lambda resources: NoDefence(resources=resources)
        case "webnn" | "deepnn":
            kind, vote = name, fill(NeighborVoteConfig, options, of=name)
            return lambda resources: NeighborVote(resources=resources, kind=kind, config=vote)
        case "rmc":
            return _parse_rmc(options)
        case _:
            raise OptionError(unknown("defence", name, ("none", "rmc", "webnn", "deepnn")))


def _parse_rmc(options: dict[str, str]) -> Maker:
    scope = options.pop("scope", "head")
    match scope:
        case "head":
            head = fill(RMCHeadConfig, options, of="rmc")
            return lambda resources: RMCHead(resources=resources, config=head)
        case "all":
            everything = fill(RMCAllConfig, options, of="rmc:scope=all")
            return lambda resources: RMCAll(resources=resources, config=everything)
        case _:
            raise OptionError(unknown("scope", scope, ("head", "all")))


def build_defence(text: str, resources: Resources) -> Defence:
    """The defence that ``text`` names, on ``resources``."""
    return parse_defence(text)(resources)


def describe_defence(defence: Defence) -> str:
    """One sentence on what a defence does."""
    family = defence.name.split(":")[0]
    return DESCRIPTIONS["rmc:scope=all" if isinstance(defence, RMCAll) else family]
