"""Attacks: pure functions over batches of uint8 images."""

from mithridate.attacks.judging import Attack, Forward
from mithridate.attacks.trace import Trace
from mithridate.attacks.white_box.apgd import APGD
from mithridate.attacks.white_box.carlini_wagner import CarliniWagner
from mithridate.attacks.white_box.deepfool import DeepFool
from mithridate.attacks.white_box.jsma import JSMA
from mithridate.attacks.white_box.names import parse_attack, parse_pgd
from mithridate.attacks.white_box.one_pixel import OnePixel
from mithridate.attacks.white_box.pgd import PGD

__all__ = [
    "APGD",
    "JSMA",
    "PGD",
    "Attack",
    "CarliniWagner",
    "DeepFool",
    "Forward",
    "OnePixel",
    "Trace",
    "parse_attack",
    "parse_pgd",
]
