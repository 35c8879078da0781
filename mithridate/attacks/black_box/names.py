"""Black-box attacks by name, as on the command line: ``square``, ``rays``, ``nes:pairs=25``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mithridate.attacks.black_box.boundary import Boundary
from mithridate.attacks.black_box.hopskipjump import HopSkipJump
from mithridate.attacks.black_box.nes import NES
from mithridate.attacks.black_box.random_noise import RandomNoise
from mithridate.attacks.black_box.rays import RayS
from mithridate.attacks.black_box.simba import SimBA
from mithridate.attacks.black_box.square import Square
from mithridate.attacks.oracle import BlackBoxAttack
from mithridate.defenses.options import fill, flatten, split_text, unknown
from mithridate.errors import OptionError
from mithridate.types import Epsilon

Maker = Callable[[Epsilon, bool], BlackBoxAttack]
"""From the radius, and whether the defence is random."""

BLACK_BOX: Mapping[str, Maker] = {
    "square": lambda epsilon, random: Square(epsilon=epsilon, random=random, repeats=10 if random else 1),
    "simba": lambda epsilon, random: SimBA(epsilon=epsilon, random=random),
    "simba-dct": lambda epsilon, random: SimBA(epsilon=epsilon, random=random, basis="dct"),
    "nes": lambda epsilon, random: NES(epsilon=epsilon, random=random),
    "boundary": lambda epsilon, random: Boundary(epsilon=epsilon, random=random),
    "hopskipjump": lambda epsilon, random: HopSkipJump(epsilon=epsilon, random=random),
    "rays": lambda epsilon, random: RayS(epsilon=epsilon, random=random),
    "random-noise": lambda epsilon, random: RandomNoise(epsilon=epsilon, random=random),
    "random-corners": lambda epsilon, random: RandomNoise(epsilon=epsilon, random=random, kind="corners"),
}

_GIVEN = {"levels", "random", "basis", "kind"}
"""Not options: the radius and the defence say the first two, the name the others."""


def parse_black_box(text: str, *, epsilon: Epsilon, random: bool = False) -> BlackBoxAttack:
    """One of BLACK_BOX with its options: ``name:key=value,...``. ``random``: the defence answers otherwise each time.

    Raises OptionError for an unknown name or option, or a value out of its range.
    """
    name, options = split_text(text)
    if name not in BLACK_BOX:
        raise OptionError(unknown("black-box attack", name, BLACK_BOX))
    attack = BLACK_BOX[name](epsilon, random)
    known = set(flatten(attack)) - _GIVEN
    for key in options:
        if key not in known:
            raise OptionError(unknown(f"option of {name}", key, known) if known else f"{name} has no options")
    return fill(attack, options, of=name)
