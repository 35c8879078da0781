"""JSMA: two features at a time, those that raise the target class most and lower the others most.

Papernot et al. 2016 (arXiv:1511.07528), algorithm 3, on logits. Other than published code, it needs no table of all
pairs: see ``best_pairs``. The network is only ever shown points rounded to 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mithridate.attacks.judging import BestPoints, Forward, confirmed, margins
from mithridate.types import Images, Labels, Logits, Pixels, to_images, to_pixels

_PAIRS_AT_A_TIME = 2**22


@dataclass(frozen=True, kw_only=True)
class JSMA:
    """A feature is one colour of one pixel. Each step moves two by ``theta`` (of the [0, 1] range; negative: darker),
    until ``gamma`` of all have been moved. ``target``: the class gone for; by default the least likely one.

    The target has to be reached in ``checks`` calls in a row: 1 is right for a network that is not random.
    """

    theta: float = 1.0
    gamma: float = 0.1
    target: int | None = None
    checks: int = 1

    def run(self, forward: Forward, pixels: Pixels, labels: Labels, *, generator: torch.Generator) -> Pixels:
        """The point where the target was reached, or else that with the smallest margin of the true class.

        Draws nothing from ``generator``.
        """
        current, best = to_images(pixels), BestPoints(pixels)
        rows = torch.arange(len(pixels), device=pixels.device)
        targets: Labels | None = None
        steps = int(self.gamma * pixels[0].numel()) // 2 if len(pixels) else 0
        for step in range(steps + 1):
            sent = to_pixels(current[rows])
            point = to_images(sent).requires_grad_()
            logits, true = forward(point), labels[rows]
            if targets is None:
                targets = self._targets(logits.detach(), true)
            margin = margins(logits.detach(), true)
            best.offer(rows, sent, margin)
            there = (margin < 0) & (logits.detach().argmax(1) == targets[rows])
            there = confirmed(forward, sent, true, there, checks=self.checks)
            best.offer(rows[there], sent[there], torch.full_like(margin[there], -torch.inf))
            if step == steps or bool(there.all()):
                break
            moved, possible = self._moved(point, logits, targets[rows], current[rows])
            current[rows] = moved
            rows = rows[possible & ~there]
            if not len(rows):
                break
        return best.pixels

    def _targets(self, logits: Logits, labels: Labels) -> Labels:
        if self.target is not None:
            return torch.full_like(labels, self.target)
        return logits.scatter(1, labels[:, None], torch.inf).argmin(1)

    def _moved(self, point: Images, logits: Logits, targets: Labels, current: Images) -> tuple[Images, torch.Tensor]:
        """``current`` with its best pair of features moved, and where there was one."""
        towards = logits.gather(1, targets[:, None]).sum()
        (gain,) = torch.autograd.grad(towards, point, retain_graph=True)
        (total,) = torch.autograd.grad(logits.sum(), point)
        sign = 1.0 if self.theta > 0 else -1.0
        flat = current.flatten(1)
        free = flat < 1 if self.theta > 0 else flat > 0
        pairs, possible = best_pairs(sign * gain.flatten(1), sign * (total - gain).flatten(1), free)
        shifted = (flat.gather(1, pairs) + self.theta).clamp(0, 1)
        moved = flat.scatter(1, pairs, torch.where(possible[:, None], shifted, flat.gather(1, pairs)))
        return moved.view_as(current), possible


def best_pairs(gain: torch.Tensor, loss: torch.Tensor, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[N, 2]``: the two ``free`` features (of ``[N, F]``) with the largest -(gain + gain)(loss + loss) where the
    first sum is positive and the second negative; bool ``[N]``: whether there are such.

    Exact, without all F^2 pairs: a partner with more gain and less loss is never worse, so both are among those that at
    most one other feature outdoes in both. These are in the first two fronts of a sort, a few dozen of 3,072.
    """
    gain, loss = gain.masked_fill(~free, -torch.inf), loss.masked_fill(~free, torch.inf)
    order = gain.argsort(dim=1, descending=True, stable=True)
    ranked = loss.gather(1, order)
    first = _below_all_before(ranked)
    kept = first | _below_all_before(ranked.masked_fill(first, torch.inf))
    count = max(2, int(kept.sum(1).max()))
    chosen = order.gather(1, kept.int().argsort(dim=1, descending=True, stable=True)[:, :count])  # [N, K]
    gain, loss = gain.gather(1, chosen), loss.gather(1, chosen)
    places, scores = [], []
    for start in range(0, len(gain), size := max(1, _PAIRS_AT_A_TIME // count**2)):
        here = slice(start, start + size)
        more, less = (part[here, :, None] + part[here, None, :] for part in (gain, loss))  # [R, K, K]
        score = torch.where((more > 0) & (less < 0), -more * less, 0.0)
        score.diagonal(dim1=1, dim2=2).zero_()
        highest = score.flatten(1).max(1)
        places.append(highest.indices)
        scores.append(highest.values)
    place = torch.cat(places)
    pairs = chosen.gather(1, torch.stack([place // count, place % count], 1))
    return pairs, torch.cat(scores) > 0


def _below_all_before(values: torch.Tensor) -> torch.Tensor:
    """Bool ``[N, F]``: smaller than everything to its left."""
    lowest = values.cummin(1).values[:, :-1]
    return values < torch.cat([torch.full_like(values[:, :1], torch.inf), lowest], 1)
