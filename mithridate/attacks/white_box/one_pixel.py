"""One Pixel: a single pixel's place and colour, found by differential evolution from scores alone.

Su, Vargas, Sakurai 2017 (arXiv:1710.08864): rand/1/bin, population 400, 100 generations, factor 0.5, no crossover.
Values that leave their range are drawn anew, as in SciPy, which most implementations use. Other than these, all images
evolve together, and an image is left alone as soon as one of its candidates is misread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mithridate.attacks.judging import BestPoints, Forward, confirmed, margins
from mithridate.types import Labels, Pixels, to_images


@dataclass(frozen=True, kw_only=True)
class OnePixel:
    """Untargeted; black-box: no gradient is taken.

    A trial is one of at least four candidates plus ``mutation`` times the difference of two others; each of its values
    is taken over with probability ``recombination``. ``rows_a_call``: candidates shown to the network in one call. A
    point counts when ``checks`` calls in a row misread it: 1 is right for a network that is not random.
    """

    population: int = 400
    generations: int = 100
    mutation: float = 0.5
    recombination: float = 1.0
    checks: int = 1
    rows_a_call: int = 512

    @torch.no_grad()
    def run(self, forward: Forward, pixels: Pixels, labels: Labels, *, generator: torch.Generator) -> Pixels:
        """The first pixel changed that is misread, or else that with the lowest score of the true class.

        ``generator`` (on the CPU) draws the evolution. Images that are misread as they are stay so.
        """
        best = BestPoints(pixels)
        misread = margins(forward(to_images(pixels)), labels) < 0
        rows = (~confirmed(forward, pixels, labels, misread, checks=self.checks)).nonzero()[:, 0]
        genes = torch.rand(len(rows), self.population, 2 + pixels.shape[1], generator=generator)  # y, x, colours
        fitness = torch.full(genes.shape[:2], torch.inf, dtype=torch.float64)
        trials = genes
        for generation in range(self.generations + 1 if len(rows) else 0):
            scores, misread = self._judge(forward, pixels[rows], labels[rows], trials)
            better = scores < fitness
            genes = torch.where(better[:, :, None], trials, genes)
            fitness = torch.where(better, scores, fitness)
            leading = torch.arange(len(scores)), (scores - 1e6 * misread).argmin(1)  # misread before all others
            sent, lowest = painted(pixels[rows], trials[leading]), scores[leading].to(pixels.device)
            best.offer(rows, sent, lowest)
            seen = misread[leading].to(pixels.device)
            fooled = confirmed(forward, sent, labels[rows], seen, checks=self.checks)
            best.offer(rows[fooled], sent[fooled], torch.full_like(lowest[fooled], -torch.inf))
            rows, genes, fitness = (part[~fooled.to(part.device)] for part in (rows, genes, fitness))
            if generation == self.generations or not len(rows):
                break
            trials = self._trials(genes, generator)
        return best.pixels

    def _judge(
        self, forward: Forward, pixels: Pixels, labels: Labels, genes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of candidates ``[R, P, genes]``: the log score of the true class, float64 ``[R, P]``; what is misread."""
        scores, misread = [], []
        for images, of in self._calls(pixels, genes):
            logits, true = forward(to_images(images)).double(), labels[of]
            scores.append(logits.log_softmax(1).gather(1, true[:, None])[:, 0].cpu())
            misread.append((margins(logits, true) < 0).cpu())
        return torch.cat(scores).view(genes.shape[:2]), torch.cat(misread).view(genes.shape[:2])

    def _calls(self, pixels: Pixels, genes: torch.Tensor) -> Iterator[tuple[Pixels, torch.Tensor]]:
        everyone = torch.arange(len(pixels)).repeat_interleave(genes.shape[1])
        for of, candidates in zip(
            everyone.split(self.rows_a_call), genes.flatten(0, 1).split(self.rows_a_call), strict=True
        ):
            yield painted(pixels[of.to(pixels.device)], candidates), of.to(pixels.device)

    def _trials(self, genes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One for each candidate, from three others."""
        rows, population, values = genes.shape
        order = torch.rand(rows, population, population, generator=generator)
        order.diagonal(dim1=1, dim2=2).fill_(-1)
        start, plus, minus = (
            genes.gather(1, number[:, :, None].expand(-1, -1, values))
            for number in order.topk(3, dim=2).indices.unbind(2)
        )
        mutants = start + self.mutation * (plus - minus)
        fresh = torch.rand(genes.shape, generator=generator)
        mutants = torch.where((mutants < 0) | (mutants >= 1), fresh, mutants)
        taken = torch.rand(genes.shape, generator=generator) < self.recombination
        certain = torch.randint(values, (rows, population, 1), generator=generator)  # at least one is taken over
        return torch.where(taken.scatter(2, certain, True), mutants, genes)


def painted(pixels: Pixels, genes: torch.Tensor) -> Pixels:
    """``pixels`` ``[R, C, H, W]`` with one pixel each set as ``genes`` ``[R, 2 + C]`` in [0, 1) say: y, x, colours."""
    height, width = pixels.shape[2:]
    y, x = (genes[:, 0] * height).long(), (genes[:, 1] * width).long()
    place = (y * width + x).clamp_max(height * width - 1).to(pixels.device)
    colours = (genes[:, 2:] * 255).round().to(pixels)
    flat = pixels.flatten(2)
    return flat.scatter(2, place.view(-1, 1, 1).expand(-1, flat.shape[1], 1), colours[:, :, None]).view_as(pixels)
