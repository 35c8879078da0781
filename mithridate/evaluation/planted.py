"""Defences that are broken on purpose, and one that does nothing: what the gates and the suite are proved on.

Each of the four hides its base from one kind of evaluation and is worth no more than it. All are mistakes that were
published as defences (Athalye, Carlini, Wagner 2018; Carlini and Wagner 2016 for the temperature).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional as F

from mithridate.attacks import Forward, parse_attack
from mithridate.attacks.black_box import Square
from mithridate.attacks.in_process import InProcessOracle
from mithridate.defenses.base import (
    Batch,
    Budget,
    Defence,
    Outcome,
    Prediction,
    Request,
    Resources,
    answer_one,
    answer_together,
)
from mithridate.defenses.none import base_pass
from mithridate.evaluation.findings import AttackKind
from mithridate.evaluation.probes import averaged, surrogate
from mithridate.evaluation.repeated import is_random, score
from mithridate.evaluation.trust import Tried
from mithridate.models import Classifier
from mithridate.types import Epsilon, Images, Labels, Logits, Pixels, to_images

Path = Callable[[Classifier, Images], Logits]

TEMPERATURE = 1000.0
LEVELS = 16
NOISE = 0.02
"""Standard deviation, in units of the pixel range."""

DRAWS = 10
"""Averaged for a gradient by the attacker who has found the hidden randomness out."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """``answers`` is what clients get, ``shows`` what white-box attackers are given."""

    name: str
    resources: Resources
    answers: Path
    shows: Path

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        return answer_one(self.predict_together, images, generator, budget)

    @torch.no_grad()
    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        return answer_together(requests, self.resources.classifier.device, self._answer)

    def _answer(self, batch: Batch) -> Prediction:
        classifier, nothing = self.resources.classifier, (None,) * len(batch.images)
        return Prediction(
            scores=self.answers(classifier, batch.images).softmax(1).cpu(),
            base_scores=_plain(classifier, batch.images).softmax(1).cpu(),
            adaptations=nothing,
            neighborhoods=nothing,
            seconds={},
        )

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        del generator
        budget.check()
        return self.shows(self.resources.classifier, images)


def planted(name: str, resources: Resources, *, seed: int = 0) -> Planted:
    """One of ``PLANTED``. ``seed``: of the randomness that ``hidden-randomness`` keeps to itself."""
    shows = _plain if name == _HIDDEN else _PATHS[name]
    answers = _Shaken(torch.Generator().manual_seed(seed)) if name == _HIDDEN else shows
    return Planted(name=name, resources=resources, answers=answers, shows=shows)


def _plain(classifier: Classifier, images: Images) -> Logits:
    return base_pass(classifier, images).logits


def _rounded(classifier: Classifier, images: Images, *, levels: int) -> Logits:
    """Steps have no slope: the gradient of rounding is zero everywhere."""
    return _plain(classifier, (images * (levels - 1)).round() / (levels - 1))


def _hot(classifier: Classifier, images: Images) -> Logits:
    """The same answers, each with probability 1: the cross-entropy's gradient underflows."""
    return TEMPERATURE * _plain(classifier, images)


@dataclass(frozen=True)
class _Shaken:
    """At a random size and place, with noise on top, from a source that no request has a say in: no seed repeats an
    answer, and one lucky draw passes for a success, or for a defence. The source is seeded: measurements can be
    repeated."""

    source: torch.Generator

    def __call__(self, classifier: Classifier, images: Images) -> Logits:
        seen = torch.cat([self._one(image[None]) for image in images])
        noise = NOISE * torch.randn(seen.shape, generator=self.source).to(seen.device)
        return _plain(classifier, (seen + noise).clamp(0, 1))

    def _one(self, image: Images) -> Images:
        side = image.shape[-1]
        size = int(torch.randint(round(0.9 * side), side + 1, (), generator=self.source))
        left, top = torch.randint(side - size + 1, (2,), generator=self.source).tolist()
        small = F.interpolate(image, size=(size, size), mode="nearest")
        return F.pad(small, (left, side - size - left, top, side - size - top))


_killed: Path = partial(_rounded, levels=256)  # on 8-bit images it changes nothing but the gradient
_quantised: Path = partial(_rounded, levels=LEVELS)

_PATHS: Mapping[str, Path] = {
    "gradient-killer": _killed,
    "quantiser": _quantised,
    "temperature": _hot,
    "identity": _plain,
}
"""By name: what it answers with and shows."""

_HIDDEN = "hidden-randomness"

BROKEN = (*(name for name in _PATHS if name != "identity"), _HIDDEN)
PLANTED = (*BROKEN, "identity")


def attack_planted(
    defence: Defence, base: Defence, pixels: Pixels, labels: Labels, *, epsilon: Epsilon, seed: int, queries: int = 500
) -> list[Tried]:
    """A small suite that breaks all of ``PLANTED``: PGD on the base, PGD with two losses on what the defence shows,
    with the mean of ``DRAWS`` answers on what a random one hides, Square on what it answers. ``pixels`` uint8
    ``[N, C, H, W]``, ``labels`` ``[N]``."""
    generator, random = torch.Generator().manual_seed(seed), is_random(defence, pixels, seed=seed)
    shown = surrogate(defence, generator)
    climbs: list[tuple[str, AttackKind, Forward]] = [
        ("pgd40", "transfer", surrogate(base, generator)),
        ("pgd40x2", "white-box", shown),
        ("pgd40x2-margin", "white-box", shown),
    ]
    if random:
        hidden = partial(defence.answers, defence.resources.classifier) if isinstance(defence, Planted) else shown
        climbs.append(("pgd40", "adaptive", averaged(hidden, DRAWS)))
    tried = []
    for name, kind, forward in climbs:
        attack = parse_attack(name, epsilon=epsilon)
        sent = attack.run(forward, pixels, labels, generator=generator)
        tried.append(_sent(defence, name, kind, sent, labels, epsilon, seed))
    classes = defence.predict(to_images(pixels[:1]), generator=generator, budget=Budget()).scores.shape[1]
    oracle = InProcessOracle(defence, classes=classes, seed=seed)
    asked = Square(epsilon=epsilon, random=random).run(oracle, pixels, labels, seed=seed, budget=queries)
    found = tuple((asked.broken_at > 0).tolist())
    tried.append(replace(_sent(defence, "square", "black-box", asked.pixels, labels, epsilon, seed), found=found))
    return tried


def _sent(
    defence: Defence, attack: str, kind: AttackKind, pixels: Pixels, labels: Labels, epsilon: Epsilon, seed: int
) -> Tried:
    right = score(defence, pixels, labels, repeats=1, seed=seed, random=False).right
    name = {"transfer": f"{attack} from the base", "adaptive": f"{attack} on {DRAWS} draws"}.get(kind, attack)
    return Tried(attack=name, kind=kind, pixels=pixels, right=right, epsilon=epsilon)
