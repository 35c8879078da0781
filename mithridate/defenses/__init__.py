"""Defences: each answers for clients, and gives attackers its best differentiable path."""

from mithridate.defenses.base import (
    Adaptation,
    Budget,
    Defence,
    Neighborhood,
    Outcome,
    Prediction,
    Request,
    Resources,
    Tuned,
)
from mithridate.defenses.pipeline import (
    DEFAULT_DEFENCES,
    WITH_PRM,
    build_defence,
    defence_name,
    describe_defence,
    parse_defence,
    servable_defences,
)

__all__ = [
    "DEFAULT_DEFENCES",
    "WITH_PRM",
    "Adaptation",
    "Budget",
    "Defence",
    "Neighborhood",
    "Outcome",
    "Prediction",
    "Request",
    "Resources",
    "Tuned",
    "build_defence",
    "defence_name",
    "describe_defence",
    "parse_defence",
    "servable_defences",
]
