"""One attack on one service, from data set to report."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from attack_client.answers import BundleDescription
from attack_client.client import AsyncClient, Client
from attack_client.load import Outcome, Shot, fire
from attack_client.transfer import Crafted, Surrogate, craft
from mithridate.datasets import LabelledImages
from mithridate.errors import InputError, OptionError
from mithridate.evaluation import Interval, percentile, wilson_interval
from mithridate.images import encode_png
from mithridate.types import Epsilon

CLEAN = "clean"
UNDEFENDED = "none"
OUTCOMES = "outcomes.jsonl"


@dataclass(frozen=True, kw_only=True)
class CampaignPlan:
    """What to send where. ``defenses`` empty: the one the service answers with by default."""

    url: str
    data: LabelledImages
    surrogate: Surrogate
    attacks: Sequence[str]
    epsilon: Epsilon
    rate: float
    defenses: Sequence[str] = ()
    seed: int = 0
    timeout_seconds: float = 60.0
    command: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_seconds <= 86_400:
            raise OptionError(
                f"timeout {self.timeout_seconds:g} is out of range; allowed: above 0, up to 86400 seconds"
            )
        if not 0 < self.rate <= 100_000:
            raise OptionError(f"rate {self.rate:g} is out of range; allowed: above 0, up to 100000 requests a second")
        if len(set(self.attacks)) != len(self.attacks):
            raise OptionError(f"an attack is named twice in {', '.join(self.attacks)}; name each once")
        if not self.attacks:
            raise OptionError("no attack was named; give at least one --attack, as in pgd20")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One defence against one kind of image. Unanswered images count as wrong in ``accuracy``."""

    defense: str
    kind: str
    images: int
    correct: int
    accuracy: float
    interval: Interval
    errors: dict[str, int]
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True, kw_only=True)
class CampaignResult:
    """Everything the report shows."""

    plan: CampaignPlan
    service: BundleDescription
    rows: tuple[Row, ...]
    outcomes: tuple[Outcome, ...]
    crafted: tuple[Crafted, ...]

    def row(self, defense: str, kind: str) -> Row:
        """The row of that defence and kind."""
        return next(row for row in self.rows if (row.defense, row.kind) == (defense, kind))

    def summary(self) -> dict[str, object]:
        """As JSON: what was asked, of whom, and what came out."""
        plan = self.plan
        return {
            "url": plan.url,
            "service": self.service.model_dump(mode="json"),
            "dataset": plan.data.spec,
            "dataset_fingerprint": plan.data.fingerprint(),
            "surrogate": plan.surrogate.source,
            "attacks": [
                {"name": c.attack, "epsilon": str(c.epsilon), "fooled_surrogate": int(c.fooled.sum())}
                for c in self.crafted
            ],
            "threat_model": "static transfer: made on the attacker's own model, without knowledge of the defence",
            "rate_per_second": plan.rate,
            "seed": plan.seed,
            "command": plan.command,
            "rows": [_plain(row) for row in self.rows],
        }


def _plain(row: Row) -> dict[str, object]:
    """As JSON, which has no NaN: percentiles of nothing are null."""
    values = asdict(row)
    missing = {key: None for key, value in values.items() if isinstance(value, float) and math.isnan(value)}
    return {**values, "interval": list(row.interval), **missing}


def run_campaign(
    plan: CampaignPlan,
    *,
    progress: Callable[[str, int, int], None],
    record: Callable[[Outcome], None] = lambda outcome: None,
) -> CampaignResult:
    """Asks the service who it is, makes the examples, sends all of them, and counts.

    ``record`` is given each outcome as it comes, so that an interruption loses nothing that was measured.
    Raises InputError where the service does not answer or serves other images than ``plan.data``.
    """
    with Client(plan.url, timeout_seconds=plan.timeout_seconds) as client:
        client.wait_until_ready(plan.timeout_seconds)
        service, offered = client.bundle(), client.defenses()
    _check_service(service, plan)
    defenses = _choose(plan.defenses or (offered.default,), offered.names)
    crafted = []
    for number, attack in enumerate(plan.attacks):
        progress("attack", number, len(plan.attacks))
        crafted.append(craft(plan.surrogate, plan.data, attack=attack, epsilon=plan.epsilon, seed=plan.seed))
    progress("attack", len(plan.attacks), len(plan.attacks))
    shots = _shots(plan, defenses, crafted)
    outcomes = asyncio.run(_fire(plan, shots, progress, record))
    kinds = (CLEAN, *plan.attacks)
    rows = tuple(_count(plan.data, outcomes, defense, kind) for kind in kinds for defense in defenses)
    return CampaignResult(plan=plan, service=service, rows=rows, outcomes=tuple(outcomes), crafted=tuple(crafted))


def write_results(result: CampaignResult, out: Path) -> None:
    """``summary.json`` and ``outcomes.jsonl`` (one line a request) in ``out``."""
    (out / "summary.json").write_text(json.dumps(result.summary(), indent=1) + "\n")
    lines = [outcome_line(result.plan, outcome) for outcome in _sorted(result.outcomes)]
    (out / OUTCOMES).write_text("".join(lines))


def outcome_line(plan: CampaignPlan, outcome: Outcome) -> str:
    """One line of ``outcomes.jsonl``: what came of a request, and what would have been right."""
    return json.dumps({**asdict(outcome), "truth": int(plan.data.labels[outcome.image])}) + "\n"


def _sorted(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return sorted(outcomes, key=lambda o: (o.image, o.kind, o.defense))


async def _fire(
    plan: CampaignPlan,
    shots: Sequence[Shot],
    progress: Callable[[str, int, int], None],
    record: Callable[[Outcome], None],
) -> list[Outcome]:
    async with AsyncClient(plan.url, timeout_seconds=plan.timeout_seconds) as client:
        return await fire(
            client,
            shots,
            rate=plan.rate,
            seed=plan.seed,
            progress=lambda done, total: progress("send", done, total),
            record=record,
        )


def _shots(plan: CampaignPlan, defenses: Sequence[str], crafted: Sequence[Crafted]) -> list[Shot]:
    sets = [(CLEAN, plan.data.images), *((c.attack, c.pixels) for c in crafted)]
    return [
        Shot(image=number, kind=kind, defense=defense, content=content)
        for kind, images in sets
        for number, content in enumerate(map(encode_png, images))
        for defense in defenses
    ]


def _count(data: LabelledImages, outcomes: Sequence[Outcome], defense: str, kind: str) -> Row:
    mine = [o for o in outcomes if (o.defense, o.kind) == (defense, kind)]
    correct = sum(o.class_index == int(data.labels[o.image]) for o in mine)
    latencies = [o.latency_ms for o in mine if o.error is None]
    return Row(
        defense=defense,
        kind=kind,
        images=len(mine),
        correct=correct,
        accuracy=correct / len(mine),
        interval=wilson_interval(correct, len(mine)),
        errors=dict(Counter(o.error for o in mine if o.error is not None)),
        p50_ms=percentile(latencies, 0.50),
        p95_ms=percentile(latencies, 0.95),
        p99_ms=percentile(latencies, 0.99),
    )


def _check_service(service: BundleDescription, plan: CampaignPlan) -> None:
    if service.image_shape != plan.data.image_shape or service.classes != plan.data.classes:
        raise InputError(
            f"{plan.url} serves {service.image_shape} images of {len(service.classes)} classes "
            f"({', '.join(service.classes[:3])} ...); {plan.data.spec} has {plan.data.image_shape} of "
            f"{len(plan.data.classes)} ({', '.join(plan.data.classes[:3])} ...)"
        )


def _choose(wanted: Sequence[str], offered: Sequence[str]) -> tuple[str, ...]:
    """The base model first, always; then what is asked for."""
    unknown = [name for name in wanted if name not in offered]
    if unknown:
        raise OptionError(f"the service does not offer {unknown[0]!r}; allowed: {', '.join(offered)}")
    if UNDEFENDED not in offered:
        raise OptionError(f"the service does not offer {UNDEFENDED!r}, so there is nothing to compare with")
    return tuple(dict.fromkeys((UNDEFENDED, *wanted)))
