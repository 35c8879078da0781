"""What an attack over HTTP may say of a defence: harm where it is seen, never a gain, and what it rests on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_helpers import DIGITS, FakeService, listening

from attack_client import Client
from attack_client.answers import BundleDescription
from attack_client.black_box import BlackBoxPlan
from attack_client.campaign import run_campaign
from attack_client.cases import AttackedImage, Case, NullControl
from attack_client.junit import judge, write_junit
from attack_client.load import Outcome
from attack_client.own_card import OwnCard, read_own_card
from attack_client.plan import CampaignPlan
from attack_client.report import write_html
from attack_client.results import CampaignResult, count, write_results
from attack_client.verdict import in_a_line
from attack_client.workspace import Workspace
from mithridate.datasets import LabelledImages, load_dataset
from mithridate.evaluation.card import make_card
from mithridate.evaluation.findings import DefenceFindings, Gate
from mithridate.evaluation.paired import compare, is_gain
from mithridate.types import Epsilon
from tests.evaluation_helpers import synthetic

N = 40
BUDGET = 100
SERVICE = BundleDescription(name="fake", digest="sha256:0", classes=DIGITS, image_shape=(1, 8, 8), arch="fake")
ALL = [True] * N
NONE = [False] * N

Flags = Sequence[bool]


@pytest.fixture(scope="module")
def data() -> LabelledImages:
    return load_dataset(f"digits[test,:{N}]")


def sent(data: LabelledImages, defense: str, right: Flags, *, ms: float = 10.0, lost: int = 0) -> list[Outcome]:
    """The clean images, once each; the first so many have no answer."""
    return [
        Outcome(
            image=number,
            kind="clean",
            defense=defense,
            class_index=None if number < lost else int(label) if right[number] else (int(label) + 1) % 10,
            label=None,
            error="http 500" if number < lost else None,
            latency_ms=ms,
            service_ms=ms,
        )
        for number, label in enumerate(data.labels)
    ]


def case(
    data: LabelledImages, defense: str, stands: Flags, *, at: int = 7, change: int = 5, luck: Flags | None = None
) -> Case:
    """Square, which broke what does not stand at its query number ``at``; ``luck``: of a random defence, clean images
    that were misread when they were asked as often."""
    pixels = data.images.copy()
    pixels[:, 0, 0, 0] = np.where(pixels[:, 0, 0, 0] > 127, pixels[:, 0, 0, 0] - change, pixels[:, 0, 0, 0] + change)
    images = tuple(
        AttackedImage(
            image=number,
            truth=int(label),
            queries=BUDGET if stands[number] else at,
            broken_at=0 if stands[number] else at,
            linf=change,
            l2=0.1,
            seconds=0.1,
            retried=0,
            abstentions=0,
            answers=(int(label) if stands[number] else (int(label) + 1) % 10,),
            abstained=(False,),
        )
        for number, label in enumerate(data.labels)
    )
    null = None if luck is None else NullControl(broken_at=tuple(int(missed) for missed in luck), queries=N)
    return Case(
        defense=defense,
        attack="square",
        images=images,
        pixels=pixels,
        random=luck is not None,
        null=null,
        config="Square",
    )


def campaign(data: LabelledImages, outcomes: Sequence[Outcome], *cases: Case, **more: Any) -> CampaignResult:
    names = dict.fromkeys(case.attack for case in cases)
    box = BlackBoxPlan(attacks=tuple(names), epsilon=Epsilon(8), queries=BUDGET)
    plan = CampaignPlan(url="http://service", data=data, epsilon=Epsilon(8), rate=50, black_box=box)
    defenses = tuple(dict.fromkeys(outcome.defense for outcome in outcomes))
    return CampaignResult(
        plan=plan,
        service=SERVICE,
        defenses=defenses,
        rows=tuple(count(data, outcomes, defense, "clean") for defense in defenses),
        outcomes=tuple(outcomes),
        crafted=(),
        cases=cases,
        **more,
    )


def beside(data: LabelledImages, base: Flags, rmc: Flags, **options: Any) -> CampaignResult:
    """Both read everything rightly when clean; ``rmc`` takes three times as long."""
    outcomes = [*sent(data, "none", ALL), *sent(data, "rmc", ALL, ms=30)]
    return campaign(data, outcomes, case(data, "none", base, **options), case(data, "rmc", rmc, **options))


def judged(result: CampaignResult) -> DefenceFindings:
    return result.verdict.defences[1]


def gate(result: CampaignResult, name: str) -> Gate:
    return next(gate for gate in judged(result).gates if gate.id == name)


def test_whatever_stands_against_who_only_asks_is_no_gain(data: LabelledImages) -> None:
    result = beside(data, NONE, ALL)
    found = judged(result)
    assert found.gain == compare(ALL, NONE, seed=0)
    assert is_gain(found.gain), "evaluate would call that a gain"
    assert found.ruling == "no evidence of gain"
    assert "Black box only: the attacks that know the defence are those of mithridate evaluate" in found.reasons[1]
    line = in_a_line(result, found)
    assert line.startswith("rmc: no evidence of gain: black box only; the attacks that know the defence are those of ")
    for part in ("worst case +100.0 points", "McNemar p = ", "clean 0.0 points", "time 3.0 ", "its own card: "):
        assert part in line
    assert "\n" not in line


def test_harm_is_said(data: LabelledImages) -> None:
    found = judged(beside(data, ALL, [number >= 15 for number in range(N)]))
    assert found.ruling == "harmful"
    assert found.gain is not None
    assert found.gain.interval[1] < 0
    assert "below zero" in found.reasons[0]


def test_costs_are_of_this_run_in_whatever_way_it_was_attacked(data: LabelledImages) -> None:
    right = [number >= 4 for number in range(N)]
    outcomes = [*sent(data, "none", ALL), *sent(data, "rmc", right, ms=25)]
    found = judged(campaign(data, outcomes, case(data, "none", NONE), case(data, "rmc", NONE)))
    assert found.latency_factor == 2.5
    assert found.clean_cost == compare(right, ALL, seed=1)
    assert not any(found.worst)


def test_what_one_side_was_spared_does_not_count_for_it(data: LabelledImages) -> None:
    """An image that only one of them answered, an attack that was measured on one of them."""
    outcomes = [*sent(data, "none", ALL, lost=10), *sent(data, "rmc", ALL)]
    failed = Case(defense="rmc", attack="rays", error="12 of 12 queries have no answer")
    spared = dataclasses.replace(case(data, "none", NONE), attack="rays")
    result = campaign(data, outcomes, case(data, "none", ALL), spared, case(data, "rmc", ALL), failed)
    found = judged(result)
    assert found.gain is not None
    assert (found.gain.n, found.gain.gained, found.gain.lost) == (30, 0, 0)
    assert "rays, not measured on both; 10 of 40 images, not answered by both" in found.reasons[-1]
    nothing = campaign(data, outcomes, spared, failed)
    assert judged(nothing).gain is None
    assert judged(nothing).ruling == "no evidence of gain"
    assert "not compared with its base" in in_a_line(nothing, judged(nothing))


def test_an_image_outside_its_radius_is_no_evidence(data: LabelledImages) -> None:
    assert gate(beside(data, NONE, ALL), "G10").passed
    result = beside(data, NONE, ALL, change=9)
    assert "G10 failed" in judged(result).reasons[2]
    assert "checks 1 of 2 passed, failed G10" in in_a_line(result, judged(result))
    assert "a pixel changes by 9 levels, allowed 8" in gate(result, "G10").evidence


def test_a_search_that_was_still_finding_is_told(data: LabelledImages) -> None:
    half = [number % 2 == 0 for number in range(N)]
    assert gate(beside(data, NONE, half, at=BUDGET // 2), "G2").passed
    result = beside(data, NONE, half, at=BUDGET // 2 + 1)
    assert gate(result, "G2").passed is False
    assert judged(result).ruling == "no evidence of gain", "as it would be if it had passed"
    assert "The base failed G2" in judged(result).reasons[-1]


def test_what_luck_does_as_well_was_no_attack(data: LabelledImages) -> None:
    half = [number % 2 == 0 for number in range(N)]
    assert gate(beside(data, half, half), "G11").passed is None
    assert gate(beside(data, half, half, luck=NONE), "G11").passed
    result = beside(data, half, half, luck=half)
    assert gate(result, "G11").passed is False
    assert gate(result, "G2").passed is None, "whoever asks longer is misread by luck"


def test_checks_that_need_more_than_http_say_why(data: LabelledImages) -> None:
    found = judged(beside(data, NONE, ALL))
    assert [gate.id for gate in found.gates] == [f"G{n}" for n in (1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13)]
    assert all(gate.evidence for gate in found.gates)
    assert {gate.id for gate in found.gates if gate.passed is not None} == {"G2", "G10"}


def card_of(bundle: str) -> dict[str, Any]:
    evaluation = synthetic()
    return make_card(dataclasses.replace(evaluation, bundle={**evaluation.bundle, "digest": bundle})).model_dump(
        mode="json"
    )


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ((404, {"detail": "no card", "request_id": ""}), "none, its bundle was not evaluated"),
        ((403, {"detail": "needs predict", "request_id": ""}), "not for this key to read"),
        ((200, {"ruling": "gain"}), "not to be read: "),
        ((200, card_of("sha256:1")), "of another bundle, sha256:1"),
        ((200, card_of("sha256:0")), "no evidence of gain, "),
    ],
)
def test_what_the_deployment_says_of_itself_stands_beside(card: tuple[int, dict[str, Any]], says: str) -> None:
    with listening(FakeService(card=card)) as url, Client(url) as client:
        found = read_own_card(client, "sha256:0")
    assert found.said_of("rmc").startswith(says)
    if found.card is not None:
        assert found.to_json("rmc")["ruling"] == "no evidence of gain"
        assert found.to_json("rmc:scope=tail")["ruling"] == "harmful"
        assert found.said_of("webnn").startswith("does not list webnn")


def test_a_card_cannot_write_on_a_terminal() -> None:
    hostile = OwnCard(why="\x1b[2J\nrmc: gain \ud800" + "!" * 1000)
    assert hostile.said_of("rmc").isprintable()
    assert len(hostile.said_of("rmc")) <= 200


def test_the_page_and_the_summary_say_it_too(data: LabelledImages, tmp_path: Path) -> None:
    """Of a real run against a service that reads every image as a zero."""
    box = BlackBoxPlan(attacks=("square",), epsilon=Epsilon(8), queries=4)
    workspace = Workspace(tmp_path / "out")
    with listening(FakeService(card=(200, card_of("sha256:0")))) as url:
        plan = CampaignPlan(url=url, data=data, epsilon=Epsilon(8), rate=1000, black_box=box)
        result = run_campaign(plan, progress=lambda *_: None, workspace=workspace)
    workspace.close()
    write_results(result, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=pytest.fail)
    (verdict,) = summary["verdict"]
    assert verdict["defense"] == "rmc"
    assert verdict["ruling"] == "no evidence of gain"
    assert verdict["worst_case"]["n"] == N
    assert verdict["latency_factor"] > 0
    assert verdict["clean_cost"]["difference"] == 0
    assert verdict["own_card"]["ruling"] == "no evidence of gain"
    assert {"AML.T0040", "AML.T0043.001", "AML.T0063"} <= {entry["id"] for entry in summary["atlas"]}
    write_junit(judge(result, fail_under=None, judged=()), tmp_path / "junit.xml")
    assert (tmp_path / "junit.xml").read_text().count("rmc: no evidence of gain: black box only") == 1
    write_html(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for said in (
        "No evidence of gain: rmc is not shown to keep more than the base model.",
        "Black box only: an attack over HTTP cannot show a gain",
        "paired difference",
        "time of an answer",
        "its own card",
        "AML.T0063",
        "no gradients are seen over HTTP",
    ):
        assert said in page
