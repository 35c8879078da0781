"""DeepFool: the shortest way, in L2, over the nearest linearised border between classes.

Moosavi-Dezfooli, Fawzi, Frossard 2016 (arXiv:1511.04599), algorithm 2, with the authors' constants. Other than theirs,
the iterate stays in [0, 1], and the network is only ever shown it rounded to 8 bits: where rounding undoes a step, the
next one goes further. It ends only where what can be sent is misread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mithridate.attacks.judging import BestPoints, Forward, confirmed, margins
from mithridate.types import Images, Labels, Logits, Pixels, to_images, to_pixels

_BEYOND = 1e-4
"""Added to each distance, as in the authors' code: the border itself is not crossed."""


@dataclass(frozen=True, kw_only=True)
class DeepFool:
    """Untargeted, without a radius.

    ``overshoot`` lengthens what is sent; ``candidates`` are the classes gone for, by their scores for the image.
    A point counts when ``checks`` calls in a row misread it: 1 is right for a network that is not random.
    """

    steps: int = 50
    overshoot: float = 0.02
    candidates: int = 9
    checks: int = 1

    def run(self, forward: Forward, pixels: Pixels, labels: Labels, *, generator: torch.Generator) -> Pixels:
        """The first point misread, or else that with the smallest margin. Draws nothing from ``generator``."""
        clean, best = to_images(pixels), BestPoints(pixels)
        moved = torch.zeros_like(clean)
        rows = torch.arange(len(pixels), device=pixels.device)
        others: torch.Tensor | None = None  # [N, candidates]
        for step in range(self.steps + 1):
            sent = to_pixels(clean[rows] + (1 + self.overshoot) * moved[rows])
            point = to_images(sent).requires_grad_()
            logits, true = forward(point), labels[rows]
            if others is None:
                others = _strongest(logits.detach(), true, self.candidates)
            margin = margins(logits.detach(), true)
            best.offer(rows, sent, margin)
            fooled = confirmed(forward, sent, true, margin < 0, checks=self.checks)
            best.offer(rows[fooled], sent[fooled], torch.full_like(margin[fooled], -torch.inf))
            if step == self.steps or bool(fooled.all()):
                break
            ahead = _to_the_nearest_border(point, logits, true, others[rows])[~fooled]
            rows = rows[~fooled]
            moved[rows] = (clean[rows] + moved[rows] + ahead).clamp(0, 1) - clean[rows]
        return best.pixels


def _strongest(logits: Logits, labels: Labels, count: int) -> torch.Tensor:
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def _to_the_nearest_border(point: Images, logits: Logits, labels: Labels, others: torch.Tensor) -> torch.Tensor:
    """The shortest step ``[N, C, H, W]`` to where one of ``others`` ``[N, K]`` draws level, were the network linear."""
    leads = logits.gather(1, labels[:, None]) - logits.gather(1, others)  # [N, K]
    nearest = torch.full((len(point),), torch.inf, device=point.device)
    step = torch.zeros_like(point)
    for number in range(others.shape[1]):
        (uphill,) = torch.autograd.grad(leads[:, number].sum(), point, retain_graph=number + 1 < others.shape[1])
        norm = uphill.flatten(1).norm(dim=1)
        distance = leads[:, number].detach().abs().to(norm) / norm  # infinite or NaN where there is no slope
        closer = distance < nearest
        nearest = torch.where(closer, distance, nearest)
        length = (distance + _BEYOND) / norm
        step[closer] = -(length.view(-1, 1, 1, 1) * uphill)[closer]
    return step.detach()
