"""Attacks: pure functions over batches of uint8 images."""

from mithridate.attacks.carlini_wagner import CarliniWagner
from mithridate.attacks.deepfool import DeepFool
from mithridate.attacks.jsma import JSMA
from mithridate.attacks.judging import Attack, Forward
from mithridate.attacks.one_pixel import OnePixel
from mithridate.attacks.pgd import PGD, parse_attack

__all__ = ["JSMA", "PGD", "Attack", "CarliniWagner", "DeepFool", "Forward", "OnePixel", "parse_attack"]
