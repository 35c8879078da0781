"""Attacks that only ask: one a file, all over the same kind of oracle."""

from mithridate.attacks.black_box.boundary import Boundary
from mithridate.attacks.black_box.hopskipjump import HopSkipJump
from mithridate.attacks.black_box.names import BLACK_BOX, parse_black_box
from mithridate.attacks.black_box.nes import NES
from mithridate.attacks.black_box.null_control import null_control
from mithridate.attacks.black_box.random_noise import RandomNoise
from mithridate.attacks.black_box.rays import RayS
from mithridate.attacks.black_box.simba import SimBA
from mithridate.attacks.black_box.square import Square

__all__ = [
    "BLACK_BOX",
    "NES",
    "Boundary",
    "HopSkipJump",
    "RandomNoise",
    "RayS",
    "SimBA",
    "Square",
    "null_control",
    "parse_black_box",
]
