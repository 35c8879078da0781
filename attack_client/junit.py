"""The results as JUnit XML, which every build server reads.

A case for each attack on each defence, and one for a defence's worst case. It is an *error* where an image has no
answer, or an attack was broken off: then nothing is known. It is a *failure* where a threshold was given and the
accuracy is below it. The base model is there to compare with and is judged only where it was named itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from attack_client.results import WORST, CampaignResult, write_whole
from attack_client.verdict import in_a_line
from mithridate.evaluation import Interval

JUNIT = "junit.xml"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One case: what it found in words, and whether that is an error or a failure."""

    defense: str
    attack: str
    seconds: float
    text: str
    error: str | None
    failure: str | None


def judge(result: CampaignResult, *, fail_under: float | None, judged: Collection[str]) -> list[Verdict]:
    """All cases. ``fail_under``: the least accuracy in percent, for the defences ``judged``."""
    return [
        Verdict(
            defense=found.defense,
            attack=found.attack,
            seconds=found.seconds,
            text=found.text,
            error=found.error,
            failure=f"{100 * found.accuracy:.1f} % is below {fail_under:g} %"
            if fail_under is not None
            and found.defense in judged
            and found.error is None
            and 100 * found.accuracy < fail_under
            else None,
        )
        for found in _found(result)
    ]


def write_junit(verdicts: Collection[Verdict], path: Path) -> None:
    """Writes them."""
    suite = ElementTree.Element(
        "testsuite",
        name="mithridate attack",
        tests=str(len(verdicts)),
        failures=str(sum(verdict.failure is not None for verdict in verdicts)),
        errors=str(sum(verdict.error is not None for verdict in verdicts)),
        time=f"{sum(verdict.seconds for verdict in verdicts):.3f}",
    )
    for verdict in verdicts:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=_clean(verdict.defense),
            name=_clean(verdict.attack),
            time=f"{verdict.seconds:.3f}",
        )
        for kind, message in (("error", verdict.error), ("failure", verdict.failure)):
            if message is not None:
                ElementTree.SubElement(case, kind, message=_clean(message)).text = _clean(verdict.text)
        ElementTree.SubElement(case, "system-out").text = _clean(verdict.text)
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    write_whole(path, ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n")


@dataclass(frozen=True, kw_only=True)
class _Found:
    defense: str
    attack: str
    seconds: float
    accuracy: float
    text: str
    error: str | None


def _found(result: CampaignResult) -> Iterator[_Found]:
    for row in result.rows:
        if row.kind in result.plan.attacks:
            yield _Found(
                defense=row.defense,
                attack=row.kind,
                seconds=sum(
                    o.latency_ms / 1000 for o in result.outcomes if (o.defense, o.kind) == (row.defense, row.kind)
                ),
                accuracy=row.accuracy,
                text=_say(row.accuracy, row.interval, row.images),
                error="; ".join(f"{count} images: {what}" for what, count in row.errors.items()) or None,
            )
    for case in result.cases:
        yield _Found(
            defense=case.defense,
            attack=case.attack,
            seconds=sum(case.traffic.seconds),
            accuracy=case.accuracy if case.images else 0.0,
            text=_say(case.accuracy, case.interval, len(case.images)) if case.images else "not measured",
            error=case.error,
        )
    for found in result.verdict.defences:
        defense, worst = found.name, result.worst(found.name)
        verdict = "" if found.ruling == "base" else f"\n{in_a_line(result, found)}"
        yield _Found(
            defense=defense,
            attack=WORST,
            seconds=0.0,
            accuracy=worst.accuracy,
            text=_say(worst.accuracy, worst.interval, worst.images) + verdict,
            error=f"without {', '.join(worst.missing)}" if worst.missing else None,
        )


def _say(accuracy: float, interval: Interval, images: int) -> str:
    return f"{100 * accuracy:.1f} % of {images} images ({100 * interval.low:.1f} to {100 * interval.high:.1f}, 95 %)"


def _clean(text: str) -> str:
    """Without characters that XML does not have, whoever wrote them."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
