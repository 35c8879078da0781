"""Carlini and Wagner's L2 attack: the smallest change that is misread, by Adam and a search for its price.

Carlini and Wagner 2017 (arXiv:1608.04644), sections V and VI, with the step size, first c and kappa of their code;
steps and searches are those of Hwang et al. 2019 (theirs: 10,000 and 9). Other than theirs, the network is only ever
shown points rounded to 8 bits, and among these it is that the smallest is looked for (Adam moves real numbers; the
gradient is that at the rounded point). And the change of variables is a sine, in a box that reaches half a level beyond
black and white, up to where 8 bits still round to them: tanh is flat at 0 and 1, and pixels that start there stay
there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mithridate.attacks.judging import BestPoints, Forward, confirmed, margins
from mithridate.types import Images, Labels, Pixels, to_images, to_pixels

_HALF_WIDTH = 0.5 + 0.5 / 255
_NOT_MISREAD = 1e6
"""Added to the cost of points that are not: more than any distance."""


@dataclass(frozen=True, kw_only=True)
class CarliniWagner:
    """Untargeted, without a radius.

    Minimises |change|^2 + c * max(margin + kappa, 0), ``steps`` of Adam for each of ``searches`` values of c an image:
    ten times as much until something is found, then by halves. ``kappa`` is by how much another class has to win.
    A point counts when ``checks`` calls in a row misread it: 1 is right for a network that is not random.
    """

    steps: int = 100
    searches: int = 10
    step_size: float = 0.01
    initial_c: float = 1e-3
    kappa: float = 0.0
    checks: int = 1

    def run(self, forward: Forward, pixels: Pixels, labels: Labels, *, generator: torch.Generator) -> Pixels:
        """The nearest point misread, or else that with the smallest margin. Draws nothing from ``generator``."""
        clean, best = to_images(pixels), BestPoints(pixels)
        c = torch.full((len(pixels),), self.initial_c, device=pixels.device)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for _ in range(self.searches):
            found = self._descend(forward, clean, labels, c, best)
            low, high = torch.where(found, low, c), torch.where(found, c, high)
            c = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
        return best.pixels

    def _descend(
        self, forward: Forward, clean: Images, labels: Labels, c: torch.Tensor, best: BestPoints
    ) -> torch.Tensor:
        """Bool ``[N]``: whether this ``c`` ``[N]`` was enough. Offers every point on the way to ``best``."""
        variable = torch.asin((clean - 0.5) / _HALF_WIDTH).requires_grad_()
        adam = torch.optim.Adam([variable], lr=self.step_size)
        found = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        for _ in range(self.steps):
            image = 0.5 + _HALF_WIDTH * torch.sin(variable)
            sent = to_pixels(image.detach())
            point = to_images(sent).requires_grad_()
            margin = margins(forward(point), labels)
            found |= self._offer(forward, clean, sent, labels, margin.detach(), best)
            hinge = (margin + self.kappa).clamp_min(0)
            (uphill,) = torch.autograd.grad(hinge.sum(), point)
            slope = 2 * (image.detach() - clean) + c.view(-1, 1, 1, 1) * uphill
            (variable.grad,) = torch.autograd.grad(image, variable, slope)
            adam.step()
        return found

    def _offer(
        self, forward: Forward, clean: Images, sent: Pixels, labels: Labels, margin: torch.Tensor, best: BestPoints
    ) -> torch.Tensor:
        """Bool ``[N]``: which are misread. Only those nearer than the best are asked about again."""
        everyone = torch.arange(len(sent), device=sent.device)
        distance = (to_images(sent) - clean).flatten(1).norm(dim=1).double()
        misread = (margin < 0) & (margin <= -self.kappa)
        nearer = misread & (distance < best.cost)
        sure = confirmed(forward, sent, labels, nearer, checks=self.checks)
        best.offer(everyone, sent, torch.where(sure, distance, _NOT_MISREAD + margin.double()))
        enough: torch.Tensor = misread & (sure | ~nearer)
        return enough
