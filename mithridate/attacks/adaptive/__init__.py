"""Attacks that know the defence: they simulate it, and move against what it becomes.

They need a defence, so they are not imported with the other attacks, which defences themselves use.
"""

from mithridate.attacks.adaptive.contamination import Contamination, contaminate
from mithridate.attacks.adaptive.cost import CostAttack
from mithridate.attacks.adaptive.hijack import Hijack
from mithridate.attacks.adaptive.rounds import FPA, GMSA, LockStep
from mithridate.attacks.adaptive.simulation import AdaptiveAttack, Found, Simulation
from mithridate.attacks.adaptive.through import AutoThroughSurrogate, ThroughSurrogate

__all__ = [
    "FPA",
    "GMSA",
    "AdaptiveAttack",
    "AutoThroughSurrogate",
    "Contamination",
    "CostAttack",
    "Found",
    "Hijack",
    "LockStep",
    "Simulation",
    "ThroughSurrogate",
    "contaminate",
]
