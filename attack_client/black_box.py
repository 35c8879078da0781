"""Black-box attacks on a running service: each on each defence, and what is left of it when its results are sent again.

What an attack saw while it searched says little of a defence that answers at random: an image that is sent a thousand
times is misread once by luck. So every final example is written to a PNG file, read back and sent again, to a random
defence several times in requests of their own; and the clean images are sent as often as the attack asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from attack_client.answers import BundleDescription
from attack_client.cases import AttackedImage, Case, NullControl
from attack_client.client import LostAnswerError, ServiceError
from attack_client.oracle import IMAGES_A_REQUEST, MAX_SCORES, HttpOracle, Session, UnansweredError
from attack_client.query_log import QueryLog
from attack_client.transfer import check_radius
from attack_client.workspace import Workspace
from mithridate.attacks.black_box import null_control, parse_black_box
from mithridate.attacks.oracle import Answers, BlackBoxAttack, Track
from mithridate.datasets import LabelledImages
from mithridate.errors import InputError, OptionError
from mithridate.images import decode_image, encode_png
from mithridate.types import Epsilon, Pixels

_PROBED = 16
_PROBES = 3
_ROUNDING = 1e-4
"""How far scores of a defence without randomness may lie apart: what another batch size brings (docs/api.md)."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class BlackBoxPlan:
    """Which ``attacks``, as ``parse_black_box`` reads them, with how many ``queries`` an image.

    ``track``: what the service is taken to show; None: each attack the least it needs. ``scorings``: how often a final
    example is sent to a random defence (to another one: once).
    """

    attacks: Sequence[str] = ()
    epsilon: Epsilon
    queries: int = 1000
    track: Track | None = None
    concurrency: int = 1
    images_a_request: int = IMAGES_A_REQUEST
    scorings: int = 10

    def __post_init__(self) -> None:
        check_radius(self.epsilon)
        limits = (
            ("queries", self.queries, 1_000_000),
            ("concurrency", self.concurrency, 256),
            ("images a request", self.images_a_request, 4096),
            ("scorings", self.scorings, 1000),
        )
        for name, value, most in limits:
            if not 1 <= value <= most:
                raise OptionError(f"{name} {value} is out of range; allowed: 1 to {most}")
        for name in self.attacks:
            self.attack(name, random=False)

    def attack(self, name: str, *, random: bool) -> BlackBoxAttack:
        """The attack of that name. Raises OptionError for an unknown one, or one that needs what ``track`` hides."""
        attack = parse_black_box(name, epsilon=self.epsilon, random=random)
        if self.track == "labels" and attack.track == "scores":
            raise OptionError(f"{name} needs scores: choose --track scores, or an attack that does with labels")
        return attack


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is attacked: images behind a service; and where what comes of it is kept."""

    session: Session
    service: BundleDescription
    data: LabelledImages
    seed: int
    workspace: Workspace


def attack_all(plan: BlackBoxPlan, target: Target, defenses: Sequence[str], progress: Progress) -> list[Case]:
    """Every attack on every defence. What the service could not answer is in the case's ``error``.

    Raises InputError where the service is gone, or answers as another one: then nothing else can be measured either.
    """
    cases: list[Case] = []
    total = len(plan.attacks) * len(defenses)
    for defense in defenses:
        random = None
        for name in plan.attacks:
            progress("black box", len(cases), total)
            try:
                random = _is_random(plan, target, defense) if random is None else random
                cases.append(_attack(plan, target, defense, name, random=random, progress=progress))
            except UnansweredError as error:
                if not isinstance(error.cause, (ServiceError, LostAnswerError)):
                    raise InputError(str(error.cause)) from error
                cases.append(Case(defense=defense, attack=name, error=str(error)))
    progress("black box", total, total)
    return cases


def _oracle(plan: BlackBoxPlan, target: Target, defense: str, track: Track, log: QueryLog) -> HttpOracle:
    return HttpOracle(
        target.session,
        defense=defense,
        track=track,
        classes=len(target.service.classes),
        images=len(target.data),
        images_a_request=plan.images_a_request,
        concurrency=plan.concurrency,
        log=log,
        bundle=target.service.digest,
    )


def _is_random(plan: BlackBoxPlan, target: Target, defense: str) -> bool:
    """Whether some clean images are scored otherwise when they are sent again, in requests of the same images."""
    count = min(_PROBED, plan.images_a_request, len(target.data))
    rows, pixels = torch.arange(count), torch.from_numpy(target.data.images[:count])
    scored = len(target.service.classes) <= MAX_SCORES
    with target.workspace.log(defense, "probe") as log:
        oracle = _oracle(plan, target, defense, "scores" if scored else "labels", log)
        seen = [oracle.ask(rows, pixels) for _ in range(_PROBES)]
    return any(_apart(seen[0], other) for other in seen[1:])


def _apart(one: Answers, other: Answers) -> bool:
    """Whether two answers to the same images differ by more than rounding."""
    if not torch.equal(one.labels, other.labels):
        return True
    if one.scores is None or other.scores is None:
        return False
    return bool((one.scores - other.scores).abs().max() > _ROUNDING)


def _attack(plan: BlackBoxPlan, target: Target, defense: str, name: str, *, random: bool, progress: Progress) -> Case:
    attack = plan.attack(name, random=random)
    data = target.data
    pixels, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    with target.workspace.log(defense, name) as log:
        oracle = _Reporting(
            _oracle(plan, target, defense, plan.track or attack.track, log), f"{name} on {defense}", progress, plan
        )
        result = attack.run(oracle, pixels, labels, seed=target.seed, budget=plan.queries)
    asked = oracle.inner
    if int(asked.asked.max()) < plan.queries:
        progress(oracle.phase, plan.queries, plan.queries)
    final = _round_trip(result.pixels.numpy(), target.workspace.examples(defense, name))
    scorings = plan.scorings if random else 1
    with target.workspace.log(defense, name, "final") as log:
        scorer = _oracle(plan, target, defense, "labels", log)
        answers, abstained = _score(scorer, final, scorings)
    null = None
    if random:
        with target.workspace.log(defense, name, "null") as log:
            control = _oracle(plan, target, defense, "labels", log)
            found = null_control(control, pixels, labels, queries=asked.asked)
        null = NullControl(broken_at=tuple(found.broken_at.tolist()), queries=int(control.asked.sum()))
    difference = final.astype(np.float64) - data.images
    return Case(
        defense=defense,
        attack=name,
        config=repr(attack),
        track=asked.track,
        random=random,
        images=tuple(
            AttackedImage(
                image=row,
                truth=int(data.labels[row]),
                queries=int(asked.asked[row]),
                broken_at=int(result.broken_at[row]),
                linf=int(np.abs(difference[row]).max()),
                l2=float(np.sqrt((difference[row] ** 2).sum()) / 255),
                seconds=float(asked.image_seconds[row]),
                retried=int(asked.retried[row]),
                abstentions=int(asked.abstained[row]),
                answers=tuple(answers[:, row].tolist()),
                abstained=tuple(abstained[:, row].tolist()),
            )
            for row in range(len(data))
        ),
        pixels=final,
        traffic=asked.traffic,
        sent=int(asked.sent.sum()),
        null=null,
    )


def _round_trip(pixels: NDArray[np.uint8], directory: Path) -> NDArray[np.uint8]:
    """``pixels`` as they come back from PNG files in ``directory``, named by their number."""
    back = []
    for number, image in enumerate(pixels):
        path = directory / f"{number:05d}.png"
        path.write_bytes(encode_png(image))
        back.append(decode_image(path.read_bytes(), channels=len(image)))
    return np.stack(back)


def _score(oracle: HttpOracle, pixels: NDArray[np.uint8], times: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the defence says of the final examples, ``times`` times: labels and abstained, both ``[times, N]``.

    Each time in requests of their own: within one request, a random defence draws once for the same image.
    """
    rows, sent = torch.arange(len(pixels)), torch.from_numpy(pixels)
    labels = torch.zeros(times, len(pixels), dtype=torch.int64)
    abstained = torch.zeros(times, len(pixels), dtype=torch.bool)
    for number in range(times):
        for places, reply in oracle.replies(rows, sent):
            labels[number, places], abstained[number, places] = reply.labels, reply.abstained
    return labels, abstained


class _Reporting:
    """An oracle that tells how far the image that was asked about most is."""

    def __init__(self, inner: HttpOracle, phase: str, progress: Progress, plan: BlackBoxPlan) -> None:
        self.inner, self.phase = inner, phase
        self._progress, self._budget, self._told = progress, plan.queries, 0

    @property
    def track(self) -> Track:
        return self.inner.track

    @property
    def classes(self) -> int:
        return self.inner.classes

    def ask(self, rows: torch.Tensor, pixels: Pixels) -> Answers:
        answers = self.inner.ask(rows, pixels)
        most = int(self.inner.asked.max())
        if most > self._told:
            self._told = most
            self._progress(self.phase, min(most, self._budget), self._budget)
        return answers
