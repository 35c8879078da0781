"""What a campaign found, and the files it is kept in."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from attack_client import verdict
from attack_client.answers import BundleDescription
from attack_client.cases import Case
from attack_client.load import CLEAN, Outcome
from attack_client.own_card import OwnCard
from attack_client.plan import CampaignPlan
from attack_client.transfer import Crafted
from attack_client.workspace import OUTCOMES
from mithridate.datasets import LabelledImages
from mithridate.evaluation import Interval, percentile, wilson_interval
from mithridate.evaluation.findings import Evaluation
from mithridate.evaluation.paired import worst_case
from mithridate.evaluation.report import threats

WORST = "worst case"
SUMMARY = "summary.json"
IMAGES = "images.jsonl"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One defence against one kind of image. Only what is right, and stood by, counts in ``accuracy``: an image without
    an answer does not (``errors``), nor does one that the defence abstains from (``abstained``). ``refused`` requests
    were sent again later; latencies are of the last time."""

    defense: str
    kind: str
    images: int
    correct: int
    abstained: int
    accuracy: float
    interval: Interval
    errors: dict[str, int]
    p50_ms: float
    p95_ms: float
    p99_ms: float
    refused: int = 0


@dataclass(frozen=True, kw_only=True)
class Worst:
    """Images that a defence read right as they were and under every attack. ``missing``: what failed, wholly or
    for some images, and says nothing about those."""

    defense: str
    right: int
    images: int
    missing: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        return self.right / self.images

    @property
    def interval(self) -> Interval:
        return wilson_interval(self.right, self.images)


@dataclass(frozen=True, kw_only=True)
class CampaignResult:
    """Everything the report shows."""

    plan: CampaignPlan
    service: BundleDescription
    defenses: tuple[str, ...]
    rows: tuple[Row, ...]
    outcomes: tuple[Outcome, ...]
    crafted: tuple[Crafted, ...]
    cases: tuple[Case, ...] = ()
    descriptions: Mapping[str, str] = field(default_factory=dict)
    """Of its defences, by the service."""
    own_card: OwnCard = field(default_factory=OwnCard)

    def row(self, defense: str, kind: str) -> Row:
        """The row of that defence and kind."""
        return next(row for row in self.rows if (row.defense, row.kind) == (defense, kind))

    def right(self, defense: str, kind: str) -> list[bool]:
        """For each image whether that defence read it right and stood by it."""
        truth = self.plan.data.labels
        found = [False] * len(truth)
        for outcome in self.outcomes:
            if (outcome.defense, outcome.kind) == (defense, kind):
                found[outcome.image] = outcome.class_index == int(truth[outcome.image]) and not outcome.abstained
        return found

    def standing(self, defense: str) -> tuple[bool, ...]:
        """For each image whether that defence read it right as it was and under everything that was sent."""
        rows = [self.right(defense, kind) for kind in (CLEAN, *self.plan.attacks)]
        cases = [case for case in self.cases if case.defense == defense and case.error is None]
        return worst_case([*rows, *([image.stands for image in case.images] for case in cases)])

    @cached_property
    def verdict(self) -> Evaluation:
        """What may be said of the defences, beside the base model."""
        return verdict.find(self)

    def worst(self, defense: str) -> Worst:
        """The per-image worst case over everything that was sent."""
        cases = [case for case in self.cases if case.defense == defense]
        lost = {row.kind: sum(row.errors.values()) for row in self.rows if row.defense == defense}
        return Worst(
            defense=defense,
            right=sum(self.standing(defense)),
            images=len(self.plan.data),
            missing=(
                *(f"{count} images ({kind})" for kind, count in lost.items() if count),
                *(case.attack for case in cases if case.error is not None),
            ),
        )

    def summary(self) -> dict[str, object]:
        """As JSON: what was asked, of whom, and what came out."""
        plan, asked = self.plan, self.plan.black_box
        clean = {defense: self.right(defense, CLEAN) for defense in self.defenses}
        worst = [self.worst(defense) for defense in self.defenses]
        return {
            "url": plan.url,
            "service": self.service.model_dump(mode="json"),
            "dataset": plan.data.spec,
            "dataset_fingerprint": plan.data.fingerprint(),
            "surrogate": None if plan.surrogate is None else plan.surrogate.source,
            "attacks": [
                {"name": c.attack, "epsilon": str(c.epsilon), "fooled_surrogate": int(c.fooled.sum())}
                for c in self.crafted
            ],
            "verdict": verdict.to_json(self),
            "threat_model": threat_model(plan),
            "atlas": [asdict(entry) for entry in techniques(self)],
            "rate_per_second": plan.rate,
            "seed": plan.seed,
            "command": plan.command,
            "rows": [_plain(asdict(row)) for row in self.rows],
            "black_box": None
            if asked is None
            else {
                "epsilon": str(asked.epsilon),
                "queries": asked.queries,
                "track": asked.track,
                "concurrency": asked.concurrency,
                "images_a_request": asked.images_a_request,
                "cases": [_plain(case.to_json(clean[case.defense], asked.queries)) for case in self.cases],
            },
            "worst_case": [{**asdict(w), "accuracy": w.accuracy, "interval": list(w.interval)} for w in worst],
        }


def threat_model(plan: CampaignPlan) -> str:
    """In words, what the attacker knows."""
    parts = []
    if plan.attacks:
        parts.append("static transfer: made on the attacker's own model, without knowledge of the defence")
    if plan.black_box and plan.black_box.attacks:
        parts.append(
            f"black box: up to {plan.black_box.queries} queries an image to the service, nothing else known of it"
        )
    return "; ".join(parts)


def techniques(result: CampaignResult) -> list[threats.Entry]:
    """Of MITRE ATLAS: what this campaign exercised."""
    found = [entry for entry in threats.techniques(result.verdict) if entry.id != "AML.T0040"]
    if asking := dict.fromkeys(case.attack for case in result.cases):  # random noise asks as well
        found.insert(0, threats.Entry(id="AML.T0040", name="AI model inference API access", by=", ".join(asking)))
    scored = dict.fromkeys(case.attack for case in result.cases if case.error is None and case.track == "scores")
    if scored:
        found.append(threats.Entry(id="AML.T0063", name="Discover AI model outputs", by=", ".join(scored)))
    return found


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON, which has no NaN: percentiles of nothing are null."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else list(value) if key == "interval" else value
        for key, value in values.items()
    }


def count(data: LabelledImages, outcomes: Sequence[Outcome], defense: str, kind: str) -> Row:
    """The row of what came of the images of ``kind``."""
    mine = [o for o in outcomes if (o.defense, o.kind) == (defense, kind)]
    correct = sum(o.class_index == int(data.labels[o.image]) and not o.abstained for o in mine)
    latencies = [o.latency_ms for o in mine if o.error is None]
    return Row(
        defense=defense,
        kind=kind,
        images=len(mine),
        correct=correct,
        abstained=sum(o.abstained for o in mine),
        accuracy=correct / len(mine),
        interval=wilson_interval(correct, len(mine)),
        errors=dict(Counter(o.error for o in mine if o.error is not None)),
        p50_ms=percentile(latencies, 0.50),
        p95_ms=percentile(latencies, 0.95),
        p99_ms=percentile(latencies, 0.99),
        refused=sum(o.refused for o in mine),
    )


def write_results(result: CampaignResult, out: Path) -> None:
    """``summary.json``, ``outcomes.jsonl`` (one line a single image that was sent) and ``images.jsonl`` in ``out``."""
    write_whole(out / SUMMARY, json.dumps(result.summary(), indent=1) + "\n")
    truth = result.plan.data.labels
    ordered = sorted(result.outcomes, key=lambda o: (o.image, o.kind, o.defense))
    lines = [json.dumps({**asdict(outcome), "truth": int(truth[outcome.image])}) for outcome in ordered]
    write_whole(out / OUTCOMES, "".join(f"{line}\n" for line in lines))
    write_whole(out / IMAGES, "".join(json.dumps(line) + "\n" for line in image_lines(result)))


def image_lines(result: CampaignResult) -> Iterator[dict[str, Any]]:
    """One for each image, attack and defence: what the attack needed, and whether it had success."""
    seed, data = result.plan.seed, result.plan.data
    for crafted in result.crafted:
        difference = crafted.pixels.astype(np.float64) - data.images
        for o in result.outcomes:
            if o.kind != crafted.attack:
                continue
            wrong = o.error is None and not o.abstained and o.class_index != int(data.labels[o.image])
            yield {
                "id": o.image,
                "attack": o.kind,
                "defense": o.defense,
                "truth": int(data.labels[o.image]),
                "success": wrong,
                "stands": o.error is None and not o.abstained and not wrong,
                "answers": [o.class_index],
                "abstained": [o.abstained],
                "queries": 1,
                "broken_at": int(wrong),
                "linf": int(np.abs(difference[o.image]).max()),
                "l2": float(np.sqrt((difference[o.image] ** 2).sum()) / 255),
                "seconds": o.latency_ms / 1000,
                "seed": seed,
                "error": o.error,
            }
    for case in result.cases:
        for image in case.images:
            values = asdict(image)
            yield {
                "id": values.pop("image"),
                "attack": case.attack,
                "defense": case.defense,
                "success": image.success,
                "stands": image.stands,
                **values,
                "seed": seed,
                "error": None,
            }


def write_whole(path: Path, content: str) -> None:
    """All of it or nothing: whoever is killed meanwhile leaves what was there."""
    part = path.with_name(path.name + ".part")
    part.write_text(content, encoding="utf-8")
    part.rename(path)
