"""The attacker's own copy of a defence: asked in private, with the attacker's randomness, as often as it takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from mithridate.attacks.judging import BestPoints
from mithridate.defenses.base import Budget, Defence, Resources
from mithridate.types import Epsilon, Images, Labels, Logits, Pixels, to_images

_ROWS = 256
"""Images of one private call."""


@runtime_checkable
class Holds(Protocol):
    """A defence whose weights depend on the image, and which lets an attacker have them (``RMC``)."""

    @property
    def resources(self) -> Resources: ...

    @property
    def answers_as_base(self) -> bool:
        """Whether a guard may let the base model answer."""
        ...

    def hold(self, images: Images, *, generator: torch.Generator) -> Any:
        """What the defence would adapt to ``images``, as constants; has ``rows(start, stop)``."""
        ...

    def held_logits(self, images: Images, held: Sequence[Any], *, generator: torch.Generator) -> Logits:
        """``[N, 1 + M, C]``: the base model and ``M`` held ones, differentiable."""
        ...


@runtime_checkable
class Embeds(Protocol):
    """A defence that searches with an embedding of its own."""

    def embed(self, images: Images, *, generator: torch.Generator) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Found:
    """What an adaptive attack made of ``N`` images: ``pixels`` uint8 ``[N, C, H, W]``, the best that the simulated
    defence was asked for; ``stood`` bool ``[rounds + 1, N]``, which images still stood at each look, the start first.
    """

    pixels: Pixels
    stood: torch.Tensor


class AdaptiveAttack(Protocol):
    """Makes images that a defence misreads, knowing it."""

    @property
    def name(self) -> str: ...

    @property
    def gradient_steps(self) -> int:
        """The most it takes for an image."""
        ...

    def run(
        self,
        simulation: Simulation,
        pixels: Pixels,
        labels: Labels,
        *,
        generator: torch.Generator,
        candidates: Sequence[Pixels] = (),
    ) -> Found:
        """For uint8 ``pixels`` ``[N, C, H, W]`` with true classes ``labels`` ``[N]``. ``candidates``, as many images
        each, are what other attacks made: they are asked for first, and count as found."""
        ...


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """``defence`` as an attacker runs it. ``checks``: how many private draws a point must fool to count as broken (1
    for a deterministic defence); ``queries`` counts images asked for. With a ``memory``, which only a deterministic
    defence may have, no point is asked for twice, in whichever simulation that shares it."""

    defence: Defence
    checks: int = 1
    memory: dict[bytes, float] | None = None
    queries: list[int] = field(default_factory=lambda: [0])

    @property
    def holds(self) -> bool:
        """Whether weights adapt, and can be held."""
        return isinstance(self.defence, Holds)

    @property
    def answers_as_base(self) -> bool:
        """Whether the base model may answer, instead of the adapted one."""
        return isinstance(self.defence, Holds) and self.defence.answers_as_base

    def hold(self, pixels: Pixels, *, generator: torch.Generator) -> Any:
        """What the defence becomes for these images; None where it never changes."""
        if not isinstance(self.defence, Holds):
            return None
        return self.defence.hold(to_images(pixels), generator=generator)

    def logits(self, images: Images, held: Sequence[Any], *, generator: torch.Generator) -> Logits:
        """``[N, 1 + M, C]``, base model first, or ``[N, 1, C]``: the defence's surrogate, where nothing is held."""
        if isinstance(self.defence, Holds):
            device = self.defence.resources.classifier.device
            return self.defence.held_logits(images.to(device), held, generator=generator).to(images.device)
        return shown(self.defence, images, generator=generator)[:, None]

    def margins(self, pixels: Pixels, labels: Labels, *, generator: torch.Generator) -> torch.Tensor:
        """float64 ``[N]``: by how much the log score of the true class leads, in the answers a client would get: the
        smallest lead of no more than ``checks`` draws for those that every draw misreads, the largest for the others.
        """
        if self.memory is None:
            return self._asked(pixels, labels, generator)
        pairs = zip(pixels.cpu().flatten(1).numpy(), labels.tolist(), strict=True)
        keys = [hashlib.sha256(row.tobytes() + str(label).encode()).digest() for row, label in pairs]
        unknown = torch.tensor([place for place, key in enumerate(keys) if key not in self.memory], dtype=torch.long)
        if len(unknown):
            fresh = self._asked(pixels[unknown], labels[unknown], generator)
            self.memory.update({keys[place]: value for place, value in zip(unknown, fresh.tolist(), strict=True)})
        return torch.tensor([self.memory[key] for key in keys], dtype=torch.float64)

    def _asked(self, pixels: Pixels, labels: Labels, generator: torch.Generator) -> torch.Tensor:
        found: list[torch.Tensor] = [torch.zeros(0, dtype=torch.float64)]
        for start in range(0, len(pixels), _ROWS):
            images, truth = to_images(pixels[start : start + _ROWS]), labels[start : start + _ROWS]
            worst = self._margins(images, truth, generator)
            for _ in range(self.checks - 1):
                rows = (worst < 0).nonzero()[:, 0]
                if not len(rows):
                    break
                worst[rows] = torch.maximum(worst[rows], self._margins(images[rows], truth[rows], generator))
            found.append(worst)
        return torch.cat(found)

    def _margins(self, images: Images, labels: Labels, generator: torch.Generator) -> torch.Tensor:
        self.queries[0] += len(images)
        answer = self.defence.predict(images, generator=generator, budget=Budget())
        scores = answer.scores.double()
        right = scores.argmax(1) == labels
        if answer.abstained is not None:
            right &= ~answer.abstained.cpu()  # an image that is turned away is not answered rightly
        logs = scores.clamp_min(1e-30).log()
        true = logs.gather(1, labels[:, None])[:, 0]
        lead = true - logs.scatter(1, labels[:, None], -torch.inf).amax(1)
        # Equal scores are answered with the class of the lower index: what the answer says decides.
        tiny = torch.finfo(torch.float64).tiny
        return torch.where(right, lead.clamp_min(tiny), lead.clamp_max(-tiny))


class Judge:
    """Keeps, for each image, the best point that the simulated defence was asked for, and who still stands."""

    def __init__(self, simulation: Simulation, pixels: Pixels, labels: Labels, generator: torch.Generator) -> None:
        self._simulation, self._labels, self._generator = simulation, labels, generator
        self._best = BestPoints(pixels)
        self._stood: list[torch.Tensor] = []
        self.standing = torch.ones(len(pixels), dtype=torch.bool)

    def look(self, rows: torch.Tensor, points: Pixels) -> None:
        """Asks for ``points`` ``[R, C, H, W]`` in the place of the images ``rows`` ``[R]``."""
        if len(rows):
            margins = self._simulation.margins(points, self._labels[rows], generator=self._generator)
            self._best.offer(rows, points, margins)
            self.standing[rows] &= margins >= 0

    def remember(self, stood: torch.Tensor | None = None) -> None:
        """Files who stands now, or who ``stood``."""
        self._stood.append(self.standing.clone() if stood is None else stood)

    @property
    def rows(self) -> torch.Tensor:
        """int64: the images that still stand."""
        return self.standing.nonzero()[:, 0]

    def groups(self, size: int) -> list[torch.Tensor]:
        """The same, ``size`` at a time; none where nobody stands."""
        rows = self.rows
        return list(rows.split(size)) if len(rows) else []

    def found(self) -> Found:
        return Found(pixels=self._best.pixels, stood=torch.stack(self._stood))


def begin(
    simulation: Simulation,
    pixels: Pixels,
    labels: Labels,
    generator: torch.Generator,
    candidates: Sequence[Pixels],
) -> Judge:
    """A judge that has seen the images themselves and the candidates. An image that is misread as it is stays so."""
    judge = Judge(simulation, pixels, labels, generator)
    for points in (pixels, *candidates):
        judge.look(judge.rows, points[judge.rows])
    judge.remember()
    return judge


def shown(defence: Defence, images: Images, *, generator: torch.Generator) -> Logits:
    """What ``defence`` shows attackers of ``images``, which stay where they are: on the CPU, wherever it runs."""
    device = defence.resources.classifier.device
    return defence.surrogate(images.to(device), generator=generator, budget=Budget()).to(images.device)


def random_start(pixels: Pixels, epsilon: Epsilon, generator: torch.Generator) -> Images:
    """A point of the ball, uniform, in real numbers."""
    clean = to_images(pixels)
    noise = torch.rand(clean.shape, generator=generator).to(clean.device)
    return (clean + (2 * noise - 1) * epsilon.value).clamp(0, 1)
