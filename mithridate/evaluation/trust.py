"""Whether an evaluation is to be trusted: probes one defence, looks at what attacked it, and asks every gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from mithridate.defenses.base import Budget, Defence
from mithridate.evaluation import gates
from mithridate.evaluation.findings import AttackKind, Gate
from mithridate.evaluation.probes import Climb, Prober, ProbeSettings
from mithridate.evaluation.repeated import is_random, score
from mithridate.types import Epsilon, Labels, Pixels, to_images

_ASKED_ALONE = 5
_ROUNDING = 1e-4
"""What another batch may change in a score; the very same request less."""

_CLEARLY = 0.5
"""Of a random defence one point must be misread more often than another by this much to count as better: three
standard errors with 20 answers each."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What one attack left for one defence, over all images of the run.

    ``pixels`` uint8 ``[N, C, H, W]``: what was sent. ``right``: whether the defence stood. ``epsilon``: the L-infinity
    radius it had to keep to, None where it was another norm. ``found``: whether the attack itself saw a point of its
    ball misread, where it says so (``BlackBoxResult.broken_at > 0``).
    """

    attack: str
    kind: AttackKind
    pixels: Pixels
    right: Sequence[bool]
    epsilon: Epsilon | None
    found: Sequence[bool] | None = None


def run_gates(
    defence: Defence,
    base: Defence,
    pixels: Pixels,
    labels: Labels,
    tried: Sequence[Tried],
    *,
    epsilon: Epsilon,
    seed: int,
    settings: ProbeSettings | None = None,
    random: bool | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Gate, ...]:
    """All gates of ``defence``, in order.

    ``pixels`` uint8 ``[N, C, H, W]`` and ``labels`` ``[N]`` are the clean images of the run, ``tried`` everything that
    was sent to this defence (transfer and noise too). The first ``settings.images`` are probed; G10 looks at all.
    ``base``: the undefended model. ``random`` as ``is_random`` finds unless given. Only attacks within ``epsilon``
    count for or against each other.
    """
    settings, n = settings or ProbeSettings(), len(labels)
    few = slice(0, min(settings.images, n))
    random = is_random(defence, pixels, seed=seed) if random is None else random
    prober = Prober(
        defence=defence, pixels=pixels[few], labels=labels[few], random=random, seed=seed, settings=settings
    )
    within = [t for t in tried if t.epsilon is not None and t.epsilon.levels <= epsilon.levels]
    within = [replace(t, pixels=t.pixels[few], right=tuple(t.right[few])) for t in within]
    return _Trial(prober, base, within, epsilon, progress).gates(
        _outside(tried, pixels), len(tried), _silent(tried, random)
    )


class _Trial:
    """The probes of one defence, and what the evaluation had found on the same images."""

    def __init__(
        self,
        prober: Prober,
        base: Defence,
        tried: Sequence[Tried],
        epsilon: Epsilon,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.prober, self.base, self.epsilon, self.progress = prober, base, epsilon, progress
        self.steps, self.draws = prober.settings.steps, prober.settings.draws
        self.done, self.total = 0, 8 + int(prober.random)
        self.n = len(prober.labels)
        self.clean = prober.right(prober.pixels, salt=10)
        self.plain = self._climb(epsilon, self.steps, salt=11)
        self.plain_right = prober.right(self.plain.pixels, salt=12)
        self.tried = tried
        own = [(self.plain.pixels, self.plain_right)]
        gradient = [(t.pixels, torch.tensor(t.right)) for t in tried if t.kind in ("white-box", "adaptive")]
        self.white = [*own, *gradient]

    def gates(self, outside: dict[str, str], checked: int, silent: dict[str, int]) -> tuple[Gate, ...]:
        return (
            self._monotone(),
            self._doubling(),
            self._iterative(),
            self._black_box(),
            self._weaker(),
            self._gradients(),
            gates.converged(self._rises(), silent),
            gates.ball(outside, checked),
            self._null(),
            self._repeatable(),
            self._surrogate(),
        )

    def _climb(
        self, epsilon: Epsilon, steps: int, *, salt: int, draws: int = 0, single: bool = False, whole: bool = True
    ) -> Climb:
        climb = self.prober.climb(epsilon, steps, salt=salt, draws=draws or self.draws, single=single, whole=whole)
        self.done += 1
        self.progress("gates", self.done, self.total)
        return climb

    def _monotone(self) -> Gate:
        level, right = self.epsilon.levels, {self.epsilon.levels: self.plain_right.tolist()}
        for radius in sorted({max(1, level // 2), min(254, 4 * level), 255} - {level}):
            steps = self.prober.settings.unbounded_steps if radius == 255 else self.steps
            climb = self._climb(Epsilon(radius), steps, salt=20 + radius, whole=False)
            right[radius] = self.prober.right(climb.pixels, salt=300 + radius).tolist()
        return gates.monotone(right, len(self._scores(self.prober.pixels[:1])[0]))

    def _doubling(self) -> Gate:
        doubled = {
            "steps": self._climb(self.epsilon, 2 * self.steps, salt=600),
            "restarts": self._climb(self.epsilon, self.steps, salt=601),
        }
        if self.prober.random:
            doubled["draws"] = self._climb(self.epsilon, self.steps, salt=602, draws=2 * self.draws)
        found = {
            what: self._only(climb.pixels, self.prober.right(climb.pixels, salt=603), self.white)
            for what, climb in doubled.items()
        }
        return gates.doubling({what: len(images) for what, images in found.items()}, self.n)

    def _iterative(self) -> Gate:
        single = self._climb(self.epsilon, 1, salt=610, single=True)
        right = self.prober.right(single.pixels, salt=611)
        return gates.iterative(self._only(single.pixels, right, self.white), self.n)

    def _black_box(self) -> Gate:
        found = {
            t.attack: self._only(t.pixels, torch.tensor(t.right), self.white)
            for t in self.tried
            if t.kind == "black-box"
        }
        return gates.black_box(found, self.n)

    def _weaker(self) -> Gate:
        """Pairs: what each of these alone breaks, and what the gradient attacks alone break."""
        sent = self.prober.climb(self.epsilon, self.steps, salt=620, of=self.base)
        others = [("transfer of the probe", sent.pixels, self.prober.right(sent.pixels, salt=621))]
        others += [(t.attack, t.pixels, torch.tensor(t.right)) for t in self.tried if t.kind in ("transfer", "noise")]
        broken = ~torch.stack([right for _, right in self.white]).all(0)
        pairs = {
            name: (len(self._only(pixels, right, self.white)), int((broken & right).sum()))
            for name, pixels, right in others
        }
        noise = self.prober.noise(self.epsilon, salt=1000)
        pairs[f"noise ({self.prober.settings.noise} draws)"] = (
            int((~noise & ~broken).sum()),
            int((broken & noise).sum()),
        )
        return gates.weaker(pairs, self.n)

    def _gradients(self) -> Gate:
        generator = self.prober.generator(630)
        clean = self.prober.pixels
        shift = torch.randint(
            -self.epsilon.levels, self.epsilon.levels + 1, clean.shape, generator=generator, dtype=torch.int32
        )
        nearby = (clean.int() + shift.to(clean.device)).clamp(0, 255).to(torch.uint8)
        both = [self.prober.slopes(points) for points in (clean, nearby)]
        slopes = torch.cat(both)
        finite = slopes.isfinite().all(1)
        zero = int((slopes[finite].abs().amax(1) == 0).sum())
        here, there = (slope.nan_to_num(0, 0, 0).double() for slope in both)
        cosine = F.cosine_similarity(here, there)
        return gates.gradients(zero, int((~finite).sum()), len(slopes), float(cosine.mean()))

    def _rises(self) -> list[tuple[float, float]]:
        losses = self.plain.losses.double()
        late = int(0.9 * self.steps)
        standing = (~self.plain.broken).nonzero()[:, 0].tolist()
        return [(float(losses[-1, i] - losses[0, i]), float(losses[-1, i] - losses[late, i])) for i in standing]

    def _null(self) -> Gate:
        random, tries = self.prober.random, max(1, len(self.tried))
        attacked = int((~torch.stack([self.plain_right, *(torch.tensor(t.right) for t in self.tried)]).all(0)).sum())
        if not random:
            return gates.null_control(random=False, tries=tries, lucky=0, attacked=attacked, n=self.n)
        asked = score(
            self.prober.defence,
            self.prober.pixels,
            self.prober.labels,
            repeats=self.prober.settings.asks,
            seed=self.prober.seed + 1,
            batch=self.prober.settings.batch,
            random=True,
        )
        lucky = round(self.n * (1 - asked.unbroken_after(tries)))
        return gates.null_control(random=True, tries=tries, lucky=lucky, attacked=attacked, n=self.n)

    def _repeatable(self) -> Gate:
        """Each image as a request of its own seed would draw otherwise: the same seed for the batch and alone."""
        few = self.prober.pixels[: self.prober.settings.batch]
        first, second = self._scores(few), self._scores(few)
        alone = [self._scores(few[row : row + 1])[0] for row in range(min(_ASKED_ALONE, len(few)))]
        return gates.repeatable(
            again=int(((first - second).abs().amax(1) > _ROUNDING).sum()),
            alone=sum(int(score.argmax() != first[row].argmax()) for row, score in enumerate(alone)),
            n=len(few),
            asked_alone=len(alone),
        )

    def _surrogate(self) -> Gate:
        return gates.surrogate(self._surrogate_only(), self.n)

    def _surrogate_only(self) -> list[int]:
        rows = (self.plain.broken & self.plain_right).nonzero()[:, 0].tolist()
        fooled = self.prober.wrong_share(self.plain.pixels, rows, by_surrogate=True)
        wrong = self.prober.wrong_share(self.plain.pixels, rows)
        return [row for row, said, seen in zip(rows, fooled, wrong, strict=True) if said - seen >= _CLEARLY]

    def _scores(self, pixels: Pixels) -> torch.Tensor:
        answer = self.prober.defence.predict(to_images(pixels), generator=self.prober.generator(640), budget=Budget())
        return answer.scores.cpu()

    def _only(self, pixels: Pixels, right: torch.Tensor, others: Iterable[tuple[Pixels, torch.Tensor]]) -> list[int]:
        """Images that ``pixels`` break and none of ``others`` does; of a random defence by many answers, since one may
        be luck on either side."""
        others = list(others)
        alone = ~right & torch.stack([stood for _, stood in others]).all(0)
        rows: list[int] = alone.nonzero()[:, 0].tolist()
        if not self.prober.random or not rows:
            return rows
        own = self.prober.wrong_share(pixels, rows)
        best = torch.stack([self.prober.wrong_share(sent, rows) for sent, _ in others]).amax(0)
        return [row for row, mine, theirs in zip(rows, own, best, strict=True) if mine - theirs >= _CLEARLY]


def _outside(tried: Sequence[Tried], pixels: Pixels) -> dict[str, str]:
    found = {}
    for t in tried:
        if t.pixels.dtype != torch.uint8 or t.pixels.shape != pixels.shape:
            found[t.attack] = f"{t.pixels.dtype} {list(t.pixels.shape)} in place of uint8 {list(pixels.shape)}"
        elif t.epsilon is not None:
            change = int((t.pixels.int() - pixels.int()).abs().max())
            if change > t.epsilon.levels:
                found[t.attack] = f"a pixel changes by {change} levels, allowed {t.epsilon.levels}"
    return found


def _silent(tried: Sequence[Tried], random: bool) -> dict[str, int]:
    """Of a random defence a point that was misread once may well be read another time."""
    lost = {
        t.attack: sum(found and stood for found, stood in zip(t.found, t.right, strict=True))
        for t in tried
        if t.found is not None and not random
    }
    return {attack: count for attack, count in lost.items() if count}
