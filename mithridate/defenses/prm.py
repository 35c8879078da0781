"""``prm``: before the classifier, an autoencoder that reads few of the pixels, and another few for every image.

Random PRM of Hwang et al. 2019: the image is moved by one pixel in a direction of its own, so that the lattice that the
PRM reads falls on pixels which an attack on the unmoved model never touched. As their code runs it, that model is what
is attacked: with v0 and lambda 1 every one of the eight moves then leaves the attacked pixels unread, and the result
says little. An attacker who averages over the moves is what this defence has to be measured against, and what
``surrogate`` is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from mithridate.defenses.averaging import Draws, Generators, bytes_of_a_pass
from mithridate.defenses.base import Resources
from mithridate.defenses.options import require, shortened, unknown
from mithridate.defenses.randomization import taken
from mithridate.errors import OptionError
from mithridate.models import PRM
from mithridate.models.classifier import padded
from mithridate.types import Images

SHIFTS = {
    "n": (-1, 0),
    "ne": (-1, 1),
    "e": (0, 1),
    "se": (1, 1),
    "s": (1, 0),
    "sw": (1, -1),
    "w": (0, -1),
    "nw": (-1, -1),
}
"""(rows, columns) that the image moves."""

_MOVES = torch.tensor(list(SHIFTS.values()))
_MOST, _LONGEST = 8, 100

_BYTES = 3
"""A PRM holds about twice as much of an image as a network does, and the network comes behind it."""


@dataclass(frozen=True, kw_only=True)
class PRMConfig:
    """The network sees (1 - ``lambda``) x + ``lambda`` g(x) of the moved image x. Values joined by ``/`` are drawn
    from, for every image anew: ``lambda=0/0.5/1``, ``stack=1/2`` (how many modules in turn, each with its own draws).
    ``module``: ``all`` draws from those in the bundle, a number (from 0) names one. ``shift``: ``random`` is one of the
    eight neighbours, ``none`` or a compass point (``ne``) is fixed.

    Attackers see ``attack_passes`` draws: ``averaged``, where these go through all eight moves in turn; ``sampled``, as
    they fall; a known move, ``ne``; or ``none``, the unmoved image, as the published table has it.
    """

    lambda_: str = "1"
    shift: str = "random"
    module: str = "all"
    stack: str = "1"
    passes: int = 1
    attack: str = "averaged"
    attack_passes: int = 8

    def __post_init__(self) -> None:
        # Written in one way only, so that one defence has one name.
        self._rewrite("lambda_", _written(self.lambdas))
        self._rewrite("stack", _written(self.stacks))
        if any(value % 1 for value in self.stacks):
            raise OptionError(f"prm: stack={self.stack} is not whole numbers")
        if self.module != "all":
            if not re.fullmatch(r"[0-9]{1,4}", self.module):
                raise OptionError(
                    f"prm: module={shortened(self.module)} is not known; allowed: all, or a number from 0"
                )
            self._rewrite("module", str(int(self.module)))
        for key, seen, allowed in (
            ("shift", self.shift, ("random", "none", *SHIFTS)),
            ("attack", self.attack, ("averaged", "sampled", "none", *SHIFTS)),
        ):
            if seen not in allowed:
                raise OptionError(unknown(f"{key} of prm", seen[:20], allowed))
        require("prm", "passes", self.passes, 1, 100_000)
        require("prm", "attack_passes", self.attack_passes, 1, 10_000)

    @property
    def lambdas(self) -> tuple[float, ...]:
        """What is drawn from."""
        return _numbers("lambda", self.lambda_, 0, 1)

    @property
    def stacks(self) -> tuple[float, ...]:
        """What is drawn from."""
        return _numbers("stack", self.stack, 1, _MOST)

    def _rewrite(self, field: str, value: str) -> None:
        object.__setattr__(self, field, value)


def _written(values: tuple[float, ...]) -> str:
    """So that it reads back as the same numbers; once, where they are all the same."""
    texts = [str(int(value)) if value == int(value) else repr(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else "/".join(texts)


def _numbers(key: str, text: str, low: float, high: float) -> tuple[float, ...]:
    """Each in ``low`` .. ``high``."""
    if len(text) > _LONGEST:
        raise OptionError(f"prm: {key}={text[:20]!r}... is too long; allowed: {_LONGEST} characters")
    parts = text.split("/")
    if not all(re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", part) for part in parts):
        raise OptionError(f"prm: {key}={text!r} is not a number, or numbers joined by /")
    values = tuple(float(part) for part in parts)
    for value in values:
        require("prm", key, value, low, high)
    return values


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """Of ``R`` images and at most ``S`` modules in turn: how many are used ``[R]``, which ``[S, R]``, with which lambda
    ``[S, R]``, moved by how much ``[S, R, 2]``."""

    stacks: torch.Tensor
    modules: torch.Tensor
    lambdas: torch.Tensor
    moves: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Manipulator:
    """The image through a PRM. Raises OptionError where the bundle has none, or not the one that is named."""

    resources: Resources
    config: PRMConfig

    def __post_init__(self) -> None:
        count = len(self.resources.prms)
        if not count:
            raise OptionError(
                "the bundle has no PRM; train one with mithridate train --prm v0, and build with --prm FILE"
            )
        if self.config.module != "all" and int(self.config.module) >= count:
            raise OptionError(f"prm: module={self.config.module} is not there; the bundle has {count}, numbered from 0")

    @property
    def _modules(self) -> tuple[PRM, ...]:
        prms = self.resources.prms
        return prms if self.config.module == "all" else (prms[int(self.config.module)],)

    @property
    def bytes_a_row(self) -> int:
        return _BYTES * bytes_of_a_pass(self.resources)

    @property
    def attack_is_fixed(self) -> bool:
        moved = self.config.shift == "random" and self.config.attack in ("averaged", "sampled")
        drawn = len(self._modules) > 1 or len(self.config.lambdas) > 1 or len(self.config.stacks) > 1
        return not (moved or drawn)

    def apply(self, images: Images, generators: Generators) -> Images:
        return self._through(images, self._draw(generators))

    def apply_attack(self, images: Images, draws: Draws) -> Images:
        """The exact gradient."""
        found, attack = self._draw(draws.generators), self.config.attack
        if attack == "averaged" and self.config.shift == "random":
            found.moves[0] = _MOVES[draws.turns % len(_MOVES)]
        elif attack not in ("averaged", "sampled"):
            found.moves[:] = torch.tensor(SHIFTS.get(attack, (0, 0)))
        return self._through(images, found)

    def _draw(self, generators: Generators) -> _Draws:
        config, most = self.config, int(max(self.config.stacks))
        drawn = [torch.rand(3 * most + 1, generator=g, dtype=torch.float64) for g in generators]
        shares = torch.stack(drawn, 1)  # [3 S + 1, R]
        lambdas, stacks = (torch.tensor(values) for values in (config.lambdas, config.stacks))
        if config.shift == "random":
            moves = _MOVES[_places(shares[:most], len(_MOVES))]
        else:
            moves = torch.tensor(SHIFTS.get(config.shift, (0, 0))).expand(most, len(drawn), 2).clone()
        return _Draws(
            stacks=stacks[_places(shares[-1], len(stacks))],
            modules=_places(shares[most : 2 * most], len(self._modules)),
            lambdas=lambdas[_places(shares[2 * most : 3 * most], len(lambdas))],
            moves=moves,
        )

    def _through(self, images: Images, draws: _Draws) -> Images:
        fill = self._fill(images)
        for number, (modules, lambdas, moves) in enumerate(zip(draws.modules, draws.lambdas, draws.moves, strict=True)):
            moved = shifted(images, moves, fill)
            shares = lambdas.to(images)[:, None, None, None]
            mixed = (1 - shares) * moved + shares * self._rebuilt(moved, modules)
            images = torch.where((draws.stacks > number).to(images.device)[:, None, None, None], mixed, images)
        return images

    def _fill(self, images: Images) -> torch.Tensor:
        """What comes in at the edge: what is 0 to the network, or grey where it normalises by itself."""
        mean = self.resources.classifier.mean
        mean = mean if mean.shape[1] == images.shape[1] else mean.mean(1, keepdim=True)
        return mean if bool(mean.any()) else torch.full_like(mean, 0.5)

    def _rebuilt(self, images: Images, modules: torch.Tensor) -> Images:
        """Each row by the module of its own."""
        if len(self._modules) == 1:
            return _canonical(self._modules[0], images)
        whole = torch.zeros_like(images)
        for number, module in enumerate(self._modules):
            rows = (modules == number).nonzero()[:, 0].to(images.device)
            if len(rows):
                whole = whole.index_add(0, rows, _canonical(module, images[rows]))
        return whole


def _canonical(module: PRM, images: Images) -> Images:
    """The same for an image, to the bit, in every batch."""
    rebuilt: Images = module(padded(images))
    return rebuilt[: len(images)]


def _places(shares: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) to places 0 .. count - 1."""
    return (shares * count).long()


def shifted(images: Images, moves: torch.Tensor, fill: torch.Tensor | float) -> Images:
    """``[R, C, H, W]``, row i moved by ``moves[i]`` (rows, columns), ``fill`` coming in."""
    for axis in (2, 3):
        side = images.shape[axis]
        source = torch.arange(side) - moves[:, axis - 2, None]  # [R, side]
        inside = (source >= 0) & (source < side)
        source = source.clamp(0, side - 1)
        images = taken(images, source.to(images.device), inside.to(images.device), axis, fill)
    return images
