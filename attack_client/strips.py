"""A few attacked images, drawn. Only what was read rightly before: an image that was misread anyway shows no attack."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attack_client.cases import AttackedImage, Case
from attack_client.load import CLEAN, Outcome
from attack_client.results import CampaignResult
from attack_client.transfer import Crafted
from mithridate.images import encode_png

_TRANSFERRED = 12
"""Of each attack that was made on a model."""

_ASKED = 4
"""Of each black-box attack on each defence."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a defence said of the attacked image, and after how many queries, where it was asked any."""

    defense: str
    label: str
    right: bool
    queries: int | None = None


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One image: PNGs as data URIs of it clean, as it was sent, and their difference, amplified."""

    attack: str
    number: int
    truth: str
    clean: str
    adversarial: str
    difference: str
    said: tuple[Said, ...]


def draw_strips(result: CampaignResult) -> list[Strip]:
    """Those that the defences got wrong first, so that the page does not flatter."""
    return [
        *(strip for crafted in result.crafted for strip in _transferred(result, crafted)),
        *(strip for case in result.cases for strip in _asked(result, case)),
    ]


def _judged(result: CampaignResult) -> tuple[str, ...]:
    """Whose failures are shown: the base model's only where nothing else was attacked."""
    return result.defenses[1:] or result.defenses


def _transferred(result: CampaignResult, crafted: Crafted) -> list[Strip]:
    answers = {(o.image, o.defense): o for o in result.outcomes if o.kind == crafted.attack}
    clean = {defense: result.right(defense, CLEAN) for defense in result.defenses}
    stood = {defense: result.right(defense, crafted.attack) for defense in result.defenses}

    def fell(number: int, defense: str) -> bool:
        return clean[defense][number] and not stood[defense][number] and answers[number, defense].error is None

    def said(number: int, defense: str) -> Said:
        outcome = answers[number, defense]
        label = _label(outcome)
        if not clean[defense][number]:
            label += " (not read rightly when clean)"
        return Said(defense=defense, label=label, right=stood[defense][number])

    numbers, judged = range(len(result.plan.data)), _judged(result)
    fallen = [number for number in numbers if any(fell(number, defense) for defense in judged)]
    standing = [number for number in numbers if all(clean[d][number] and stood[d][number] for d in judged)]
    fallen = fallen[: max(_TRANSFERRED // 2, _TRANSFERRED - len(standing))]
    return [
        _strip(result, crafted.attack, number, crafted.pixels[number], *(said(number, d) for d in result.defenses))
        for number in [*fallen, *standing[: _TRANSFERRED - len(fallen)]]
    ]


def _label(outcome: Outcome) -> str:
    label = outcome.label or outcome.error or "(unnamed)"
    return f"{label} (abstained)" if outcome.abstained else label


def _asked(result: CampaignResult, case: Case) -> list[Strip]:
    """Images that fell after the fewest queries."""
    if case.pixels is None or case.defense not in _judged(result):
        return []
    clean, data = result.right(case.defense, CLEAN), result.plan.data
    fallen = [
        image
        for image in case.images
        if clean[image.image]
        and not image.stands
        and not np.array_equal(case.pixels[image.image], data.images[image.image])
    ]
    strips = []
    for image in sorted(fallen, key=lambda image: image.queries)[:_ASKED]:
        said = Said(defense=case.defense, label=_mostly(image, data.classes), right=False, queries=image.queries)
        strips.append(_strip(result, case.attack, image.image, case.pixels[image.image], said))
    return strips


def _mostly(image: AttackedImage, classes: Sequence[str]) -> str:
    """The wrong class that it is called most often: a random defence may well be right in a few of its answers."""
    pairs = zip(image.answers, image.abstained, strict=True)
    wrong = Counter(answer for answer, abstained in pairs if answer != image.truth and not abstained)
    return classes[wrong.most_common(1)[0][0]] if wrong else "abstained"


def _strip(result: CampaignResult, attack: str, number: int, adversarial: NDArray[np.uint8], *said: Said) -> Strip:
    data = result.plan.data
    clean = data.images[number]
    return Strip(
        attack=attack,
        number=number,
        truth=data.classes[int(data.labels[number])],
        clean=_inline(clean),
        adversarial=_inline(adversarial),
        difference=_inline(_amplified(clean, adversarial, result.plan.epsilon.levels)),
        said=said,
    )


def _amplified(clean: NDArray[np.uint8], adversarial: NDArray[np.uint8], levels: int) -> NDArray[np.uint8]:
    """The difference around mid-grey, stretched so that the whole radius fills the range."""
    difference = adversarial.astype(np.float64) - clean.astype(np.float64)
    stretched: NDArray[np.uint8] = (127.5 + 127.5 * difference / max(1, levels)).round().clip(0, 255).astype(np.uint8)
    return stretched


def _inline(image: NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
