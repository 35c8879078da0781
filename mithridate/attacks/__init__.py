"""Attacks: pure functions over batches of uint8 images."""

from mithridate.attacks.pgd import PGD, Forward, parse_attack

__all__ = ["PGD", "Forward", "parse_attack"]
