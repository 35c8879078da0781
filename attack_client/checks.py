"""The checks of ``mithridate evaluate`` that can be made over HTTP, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from attack_client.cases import Case
from attack_client.load import CLEAN
from mithridate.evaluation import gates, percentile
from mithridate.evaluation.findings import Gate
from mithridate.evaluation.paired import worst_case
from mithridate.types import Epsilon

if TYPE_CHECKING:
    from attack_client.results import CampaignResult

_NOT_OVER_HTTP = (
    ("G1", "accuracy falls with epsilon, to nothing without a bound", "one radius was attacked"),
    ("G3", "many steps beat one", "no gradients are seen over HTTP"),
    ("G4", "what sees answers alone finds nothing that gradients miss", "no gradients are seen over HTTP"),
    ("G5", "transfer and noise do not beat the adaptive attacks", "no attack over HTTP knows the defence"),
    ("G6", "there are gradients", "no gradients are seen over HTTP"),
    ("G7", "the loss has converged, and the best point is returned", "no loss is seen over HTTP"),
    ("G12", "same image, same seed: same answer", "the service draws a secret seed for every request"),
    ("G13", "the surrogate speaks for the defence", "no surrogate of the defence is attacked over HTTP"),
)


def checks(result: CampaignResult, defense: str) -> tuple[Gate, ...]:
    """All, in the order of their numbers; ``passed`` is None where one does not apply, and ``evidence`` says why."""
    cases = [case for case in result.cases if case.defense == defense and case.error is None]
    made = [_half_the_queries(result, defense, cases), _ball(result, cases), _null_control(cases)]
    made += [Gate(id=id_, name=name, passed=None, evidence=why) for id_, name, why in _NOT_OVER_HTTP]
    return tuple(sorted(made, key=lambda gate: int(gate.id.removeprefix("G"))))


def _half_the_queries(result: CampaignResult, defense: str, cases: list[Case]) -> Gate:
    """G2. What the second half of the queries broke and nothing in the first did: without it, more would break more."""
    none = gates.doubling({}, 0)
    asked = result.plan.black_box
    if asked is None or not cases:
        return replace(none, passed=None, evidence="nothing was searched for")
    if any(case.random for case in cases):
        return replace(none, passed=None, evidence="whoever asks a defence longer that answers at random is misread")
    half = asked.queries // 2
    before = worst_case(result.right(defense, kind) for kind in (CLEAN, *result.plan.attacks))
    late = 0
    for row, stood in enumerate(before):
        broken = [case.images[row].broken_at for case in cases if case.images[row].broken_at]
        late += stood and bool(broken) and min(broken) > half
    return gates.doubling({f"queries ({asked.queries} in place of {half})": late}, len(before))


def _ball(result: CampaignResult, cases: list[Case]) -> Gate:
    """G10, of what was sent: of black-box attacks that is what was read back from the PNG files."""
    sent: list[tuple[str, Epsilon, object]] = [(made.attack, made.epsilon, made.pixels) for made in result.crafted]
    asked = result.plan.black_box
    sent += [(case.attack, asked.epsilon, case.pixels) for case in cases if asked is not None]
    outside = {attack: what for attack, epsilon, pixels in sent for what in _wrong(result, epsilon, pixels)}
    return gates.ball(outside, len(sent))


def _wrong(result: CampaignResult, epsilon: Epsilon, pixels: object) -> Iterator[str]:
    clean = result.plan.data.images
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != clean.shape:
        yield "not uint8 images of the shape of the clean ones"
        return
    change = int(np.abs(pixels.astype(np.int16) - clean.astype(np.int16)).max())
    if change > epsilon.levels:
        yield f"a pixel changes by {change} levels, allowed {epsilon.levels}"


def _null_control(cases: list[Case]) -> Gate:
    """G11: each clean image was sent as often as the attack asked for it. All attacks together, and all controls."""
    if not cases:
        fixed = gates.null_control(random=False, tries=1, lucky=0, attacked=0, n=1)
        return replace(fixed, evidence="only black-box attacks look whether a defence answers at random")
    drawn = [(case, case.null) for case in cases if case.null is not None]
    n = len(cases[0].images)
    lucky = sum(any(null.broken_at[row] for _, null in drawn) for row in range(n))
    attacked = sum(any(case.images[row].broken_at for case, _ in drawn) for row in range(n))
    asked = [float(sum(case.images[row].queries for case, _ in drawn)) for row in range(n)]
    tries = round(percentile(asked, 0.5))
    return gates.null_control(random=bool(drawn), tries=tries, lucky=lucky, attacked=attacked, n=n)
