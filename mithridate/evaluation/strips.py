"""A few attacked images, drawn: what was sent, what was said of it, and which neighbours it had before and after."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import torch

from mithridate.defenses.base import Budget, Defence, Neighborhood
from mithridate.evaluation.findings import DefenceFindings, Exemplar, Strip
from mithridate.evaluation.front import Front
from mithridate.images import encode_png
from mithridate.types import Pixels, to_images

_STRIPS = 4
"""Of each defence."""

_NEIGHBORS = 6
_AMPLIFIED = 8


def draw_strips(fronts: Sequence[Front], found: Sequence[DefenceFindings], classes: Sequence[str]) -> tuple[Strip, ...]:
    """For each defence but the base model, the first images that it reads rightly and that an attack made it misread;
    the last attack of its row that did, which is the one that knew most."""
    strips: list[Strip] = []
    for front, findings in zip(fronts[1:], found[1:], strict=True):
        drawn = 0
        for image, clean in enumerate(findings.clean):
            made = [
                (sent, cell)
                for sent, cell in zip(front.sent, findings.cells, strict=True)
                if not cell.right[image] and cell.kind in ("white-box", "adaptive")
            ]
            if clean and made and drawn < _STRIPS:
                strips.append(_strip(front, image, made[-1][0].attack, made[-1][0].pixels[image], classes))
                drawn += 1
    return tuple(strips)


def _strip(front: Front, image: int, attack: str, attacked: Pixels, classes: Sequence[str]) -> Strip:
    target = front.target
    clean = target.pixels[image]
    difference = (128 + _AMPLIFIED * (attacked.int() - clean.int())).clamp(0, 255).to(torch.uint8)
    before, near_before = _ask(target.defence, clean, target.seed, classes)
    after, near_after = _ask(target.defence, attacked, target.seed, classes)
    return Strip(
        index=image,
        truth=classes[int(target.labels[image])],
        defense=front.name,
        attack=attack,
        clean=_png(clean),
        attacked=_png(attacked),
        difference=_png(difference),
        amplified=_AMPLIFIED,
        said_clean=before,
        said_attacked=after,
        neighbors_clean=near_before,
        neighbors_attacked=near_after,
    )


def _ask(
    defence: Defence, pixels: Pixels, seed: int, classes: Sequence[str]
) -> tuple[dict[str, str], tuple[Exemplar, ...]]:
    generator = torch.Generator().manual_seed(seed)
    answer = defence.predict(to_images(pixels[None]), generator=generator, budget=Budget())
    said = {
        "none": classes[int(answer.base_scores[0].argmax())],
        defence.name: classes[int(answer.scores[0].argmax())],
    }
    return said, _drawn(defence, answer.neighborhoods[0], classes)


def _drawn(defence: Defence, neighborhood: Neighborhood | None, classes: Sequence[str]) -> tuple[Exemplar, ...]:
    if neighborhood is None:
        return ()
    exemplars, ids = defence.resources.exemplars, neighborhood.ids[:_NEIGHBORS].cpu()
    labels = exemplars.gather_labels(ids, torch.device("cpu")).tolist()
    return tuple(
        Exemplar(
            image=_png(pixels),
            label=classes[label],
            adversarial=identity >= exemplars.clean_count,
            distance=float(distance),
        )
        for identity, pixels, label, distance in zip(
            ids.tolist(), exemplars.pixels(ids).cpu(), labels, neighborhood.distances[:_NEIGHBORS].tolist(), strict=True
        )
    )


def _png(pixels: Pixels) -> str:
    return base64.b64encode(encode_png(pixels.cpu().numpy())).decode()
