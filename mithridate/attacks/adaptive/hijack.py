"""Neighbour hijack: the embedding is steered until the index answers with exemplars of another class, so that the
defence itself teaches the wrong thing.

The loss is that of the ASK attack (Wang et al., soft k-nearest neighbours by class, NeurIPS 2021 workshop), with guides
as in Sitawarin and Wagner's second attack on DkNN (2020): the nearest exemplars of every class, looked up again on the
way. It knows nothing of gradients through the adaptation, and needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mithridate.attacks.adaptive.rounds import CONFIDENCE, ascend, in_parts, losses
from mithridate.attacks.adaptive.simulation import Embeds, Found, Simulation, begin, random_start
from mithridate.defenses.base import Resources
from mithridate.neighbors import NeighborIndex
from mithridate.types import Epsilon, Images, Labels, Pixels, to_images, to_pixels


@dataclass(frozen=True, kw_only=True)
class Hijack:
    """``steps`` of ``step_size``; ``guides`` of every class, looked up again every ``every`` steps. ``temperature`` of
    the soft vote, relative to the mean distance of the nearest guides. ``base``: the share of the base model's own
    margin in the loss: a guard falls only where base model and neighbours are both wrong.
    """

    epsilon: Epsilon
    steps: int = 100
    step_size: float = 1 / 255
    guides: int = 64
    every: int = 10
    temperature: float = 0.1
    base: float = 0.1
    rows: int = 64

    @property
    def name(self) -> str:
        return "hijack"

    @property
    def gradient_steps(self) -> int:
        return self.steps

    def run(
        self,
        simulation: Simulation,
        pixels: Pixels,
        labels: Labels,
        *,
        generator: torch.Generator,
        candidates: Sequence[Pixels] = (),
    ) -> Found:
        searched = Searched.of(simulation, self.guides)
        judge = begin(simulation, pixels, labels, generator, candidates)
        points = random_start(pixels, self.epsilon, generator)
        for steps in in_parts(self.steps, self.every):
            for rows in judge.groups(self.rows):
                points[rows], best = self._some_steps(
                    searched, steps, pixels[rows], labels[rows], points[rows], generator
                )
                judge.look(rows, best)
            judge.look(judge.rows, to_pixels(points[judge.rows]))
            judge.remember()
        return judge.found()

    def _some_steps(
        self,
        searched: Searched,
        steps: int,
        pixels: Pixels,
        labels: Labels,
        start: Images,
        generator: torch.Generator,
    ) -> tuple[Images, Pixels]:
        with torch.no_grad():
            guides = searched.guides(searched.embed(to_images(to_pixels(start)), generator))  # [R, C, m]

        def objective(images: Images) -> torch.Tensor:
            embedding = searched.embed(images, generator)
            votes = searched.votes(embedding, guides, self.temperature).to(images.device)  # [R, C]
            margin = losses(votes[:, None], labels, "margin")[:, 0]
            if not self.base:
                return margin
            classifier = searched.resources.classifier
            logits = classifier(images.to(classifier.device)).to(images.device)
            return margin + self.base * losses(logits[:, None], labels, "margin", confidence=CONFIDENCE)[:, 0]

        return ascend(objective, pixels, start, epsilon=self.epsilon, steps=steps, step_size=self.step_size)


@dataclass(frozen=True, kw_only=True)
class Searched:
    """The exemplars of a bundle by class: ``count`` of each of ``present``, as ``searches``."""

    resources: Resources
    embeds: Embeds | None
    present: tuple[int, ...]
    searches: tuple[NeighborIndex, ...]
    count: int

    @classmethod
    def of(cls, simulation: Simulation, guides: int) -> Searched:
        defence = simulation.defence
        resources = defence.resources
        labels = resources.exemplars.labels.cpu()
        present = tuple(labels.unique().tolist())
        return cls(
            resources=resources,
            embeds=defence if isinstance(defence, Embeds) else None,
            present=present,
            searches=tuple(resources.index.only(labels == number) for number in present),
            count=min(guides, min(int((labels == number).sum()) for number in present)),
        )

    def embed(self, images: Images, generator: torch.Generator) -> torch.Tensor:
        """``[R, D]``, as the defence embeds, differentiable."""
        images = images.to(self.resources.classifier.device)
        if self.embeds is not None:
            return self.embeds.embed(images, generator=generator)
        return self.resources.classifier.embed(images)

    def guides(self, embedding: torch.Tensor) -> torch.Tensor:
        """int64 ``[R, classes, count]``: the nearest exemplars of each class."""
        return torch.stack([index.search(embedding, self.count).ids for index in self.searches], 1)

    def votes(self, embedding: torch.Tensor, guides: torch.Tensor, temperature: float) -> torch.Tensor:
        """``[R, C]``: the log of each class's soft vote, up to a constant; very low where a class has no exemplar."""
        distances = self.resources.index.distances(embedding, guides.flatten(1))  # [R, classes * count]
        known = distances.detach()
        nearest = known.amin(1, keepdim=True)
        scale = (known.topk(self.count, largest=False).values - nearest).mean(1, keepdim=True) + nearest.clamp_min(0)
        heights = -(distances - nearest) / (temperature * scale + 1e-12)
        votes = heights.view(guides.shape).logsumexp(2)
        classes = self.resources.classifier.spec.num_classes
        everywhere = votes.new_full((len(votes), classes), -1e9)
        return everywhere.index_copy(1, torch.tensor(self.present, device=votes.device), votes)
