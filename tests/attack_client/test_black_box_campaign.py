"""Black-box attacks on a service: the very result of the same attack in process, judged without flattery."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from client_helpers import FakeService, closed_port, listening

from attack_client.black_box import BlackBoxPlan
from attack_client.campaign import run_campaign
from attack_client.junit import judge, write_junit
from attack_client.plan import CampaignPlan
from attack_client.report import write_html
from attack_client.results import CampaignResult, image_lines, write_results
from attack_client.strips import draw_strips
from attack_client.workspace import Workspace
from mithridate.attacks.black_box import parse_black_box
from mithridate.attacks.in_process import InProcessOracle
from mithridate.datasets import LabelledImages, load_dataset
from mithridate.defenses import Resources, build_defence
from mithridate.errors import InputError, OptionError
from mithridate.images import decode_image
from mithridate.types import Epsilon

EPSILON = Epsilon(48)
BUDGET = 16


@pytest.fixture(scope="module")
def data() -> LabelledImages:
    return load_dataset("digits[test,:12]")


def quiet(*_: Any) -> None:
    """Progress that nobody watches."""


def attack(data: LabelledImages, url: str, out: Path, *, resume: bool = False, **options: Any) -> CampaignResult:
    campaign = {"defenses": ("rmc",), **{key: options.pop(key) for key in ("defenses", "seed") if key in options}}
    box = BlackBoxPlan(**{"attacks": ("square",), "epsilon": EPSILON, "queries": BUDGET, **options})
    plan = CampaignPlan(url=url, data=data, black_box=box, epsilon=EPSILON, rate=2000, **campaign)
    workspace = Workspace(out, resume=resume)
    try:
        return run_campaign(plan, progress=quiet, workspace=workspace)
    finally:
        workspace.close()


@pytest.fixture(scope="module")
def result(served: str, data: LabelledImages, tmp_path_factory: pytest.TempPathFactory) -> CampaignResult:
    out = tmp_path_factory.mktemp("attack") / "out"
    return attack(data, served, out, attacks=("square", "hopskipjump"), defenses=("rmc", "webnn"), images_a_request=8)


def test_it_is_the_attack_in_this_process_query_for_query(
    result: CampaignResult, resources: Resources, data: LabelledImages
) -> None:
    """On defences that are not random, asked in batches of the same images."""
    pixels, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    assert [(case.defense, case.attack) for case in result.cases] == [
        (defense, name) for defense in ("none", "rmc", "webnn") for name in ("square", "hopskipjump")
    ]
    for case in result.cases:
        method = parse_black_box(case.attack, epsilon=EPSILON)
        inside = InProcessOracle(
            build_defence(case.defense, resources), classes=10, track=method.track, images_a_call=8
        )
        found = method.run(inside, pixels, labels, seed=0, budget=BUDGET)
        assert [image.queries for image in case.images] == found.queries.tolist()
        assert [image.broken_at for image in case.images] == found.broken_at.tolist()
        assert np.array_equal(case.pixels, found.pixels.numpy())
        assert not case.random
        assert case.traffic.merged == 0
        assert case.track == method.track


def test_the_base_model_falls_and_what_fell_in_the_search_falls_when_sent_again(result: CampaignResult) -> None:
    square = next(case for case in result.cases if (case.defense, case.attack) == ("none", "square"))
    assert square.accuracy <= 0.7
    for case in result.cases:
        assert case.error is None
        for image in case.images:
            assert image.success == (image.broken_at > 0) == (not image.stands)
            assert image.linf <= EPSILON.levels
            assert 1 <= image.queries <= BUDGET
            assert len(image.answers) == 1


def test_the_files(result: CampaignResult, data: LabelledImages, tmp_path: Path) -> None:
    write_results(result, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    assert len(lines) == 6 * 12
    keys = {"id", "attack", "defense", "truth", "success", "queries", "broken_at", "linf", "l2", "seconds", "seed"}
    assert all(keys <= set(line) for line in lines)
    for case in summary["black_box"]["cases"]:
        mine = [line for line in lines if (line["defense"], line["attack"]) == (case["defense"], case["attack"])]
        assert case["right"] == sum(line["stands"] for line in mine)
        assert case["wrong"] == sum(line["success"] for line in mine)
        assert case["right"] + case["wrong"] + case["abstained"] == case["images"] == 12
        assert case["queries_total"] == sum(line["queries"] for line in mine)
        assert case["accuracy_at"][str(BUDGET)] == case["accuracy"]
        assert case["null_control"] is None
    for worst in summary["worst_case"]:
        standing = {line["id"] for line in lines} - {
            line["id"] for line in lines if line["defense"] == worst["defense"] and not line["stands"]
        }
        assert worst["right"] == len(standing), "image by image, and every digit here is read right as it is"


def test_examples_are_files_that_say_what_was_sent(result: CampaignResult, served: str, data: LabelledImages) -> None:
    del served
    case = result.cases[0]
    assert case.pixels is not None
    assert not np.array_equal(case.pixels, data.images)
    for number in range(12):
        distance = np.abs(case.pixels[number].astype(int) - data.images[number].astype(int)).max()
        assert distance == case.images[number].linf


def test_examples_survive_the_file(data: LabelledImages, tmp_path: Path) -> None:
    with listening(FakeService()) as url:
        found = attack(data, url, tmp_path / "out", queries=5)
    case = found.cases[1]
    assert case.pixels is not None
    files = sorted((tmp_path / "out" / "examples" / "rmc.square").iterdir())
    assert [path.name for path in files] == [f"{number:05d}.png" for number in range(12)]
    read = np.stack([decode_image(path.read_bytes(), channels=1) for path in files])
    assert np.array_equal(read, case.pixels)


def test_luck_is_told_from_an_attack(data: LabelledImages, tmp_path: Path) -> None:
    """A service that answers at random breaks every image in the search, and clean ones just as well."""
    ones = np.flatnonzero(data.labels == 1)
    assert len(ones) > 0
    with listening(FakeService(says=1, random=0.2)) as url:
        found = attack(data, url, tmp_path / "out", attacks=("random-noise",), scorings=20)
    for case in found.cases:
        assert case.random
        assert case.null is not None
        assert case.null.queries == sum(image.queries for image in case.images)
        for number in ones:
            assert case.images[number].broken_at > 0
            assert case.null.broken_at[number] > 0
            assert case.images[number].stands, "it is right in four of five answers"
            assert 0.4 <= case.images[number].right < 1
            assert len(case.images[number].answers) == 20
    write_html(found, tmp_path / "report.html")
    assert "clean images" in (tmp_path / "report.html").read_text()


def test_an_abstention_is_not_right_and_not_an_error(data: LabelledImages, tmp_path: Path) -> None:
    with listening(FakeService(says=1, abstains=True)) as url:
        found = attack(data, url, tmp_path / "out", queries=5)
    assert (data.labels == 1).any(), "some are called rightly, and do not count as right"
    for row in found.rows:
        assert (row.correct, row.abstained, row.errors) == (0, 12, {})
    for case in found.cases:
        assert (case.right, case.abstained) == (0, 12)
        assert not any(image.success or image.stands for image in case.images)
        assert all(image.abstentions == image.queries for image in case.images)
    write_html(found, tmp_path / "report.html")
    assert not any(line["success"] or line["stands"] for line in image_lines(found))


def test_what_fails_is_told_and_the_rest_goes_on(data: LabelledImages, tmp_path: Path) -> None:
    with listening(FakeService(fails_together=True)) as url:
        found = attack(data, url, tmp_path / "out")
    assert [row.errors for row in found.rows] == [{}, {}]
    for case in found.cases:
        assert case.error is not None
        assert re.match(r"12 of 12 queries have no answer: HTTP 500: a bad day", case.error)
    assert found.worst("rmc").missing == ("square",)
    verdicts = judge(found, fail_under=None, judged=("rmc",))
    assert all(verdict.error for verdict in verdicts)
    write_junit(verdicts, tmp_path / "junit.xml")
    assert (tmp_path / "junit.xml").read_text().count("<error ") == 4
    write_html(found, tmp_path / "report.html")
    assert "not measured" in (tmp_path / "report.html").read_text()
    write_results(found, tmp_path)


def test_a_refused_query_is_asked_again_until_it_is_let_in(data: LabelledImages, tmp_path: Path) -> None:
    with listening(FakeService(refuses=7)) as url:
        found = attack(data, url, tmp_path / "out", queries=5)
    assert [case.error for case in found.cases] == [None, None]


def test_nobody_there_ends_it(data: LabelledImages, tmp_path: Path) -> None:
    plan = BlackBoxPlan(attacks=("square",), epsilon=EPSILON, queries=5)
    gone = CampaignPlan(
        url=f"http://127.0.0.1:{closed_port()}",
        data=data,
        black_box=plan,
        epsilon=EPSILON,
        rate=100,
        timeout_seconds=0.2,
    )
    workspace = Workspace(tmp_path / "out")
    with pytest.raises(InputError, match="not ready"):
        run_campaign(gone, progress=quiet, workspace=workspace)
    assert workspace.discard_if_empty()
    assert not (tmp_path / "out").exists()


def test_a_threshold_is_for_the_defences_that_are_named(result: CampaignResult, tmp_path: Path) -> None:
    verdicts = judge(result, fail_under=100, judged=("rmc",))
    failed = {(verdict.defense, verdict.attack) for verdict in verdicts if verdict.failure}
    assert failed
    assert {defense for defense, _ in failed} == {"rmc"}
    assert all(not verdict.failure for verdict in judge(result, fail_under=0, judged=("none", "rmc")))
    write_junit(verdicts, tmp_path / "junit.xml")
    text = (tmp_path / "junit.xml").read_text()
    assert f'tests="{len(verdicts)}" failures="{len(failed)}" errors="0"' in text
    assert len(verdicts) == 3 * 3, "two attacks and the worst case of each defence"


def test_only_images_that_were_attacked_are_shown_as_fallen(result: CampaignResult, data: LabelledImages) -> None:
    """By queries, those that were misread when clean would come first: they "fall" at the very first one."""
    shown = draw_strips(result)
    assert shown
    assert {said.defense for strip in shown for said in strip.said} <= {"rmc", "webnn"}
    wrong = dataclasses.replace(data, labels=(data.labels + 1) % 10)  # as if all of them were misread when clean
    relabelled = dataclasses.replace(result, plan=dataclasses.replace(result.plan, data=wrong))
    assert draw_strips(relabelled) == []
    cases = tuple(dataclasses.replace(case, pixels=data.images) for case in result.cases)
    assert draw_strips(dataclasses.replace(result, cases=cases)) == [], "what is as it was has not been attacked"


def test_where_only_the_base_model_was_attacked_its_failures_are_shown(result: CampaignResult) -> None:
    alone = dataclasses.replace(result, defenses=("none",), cases=tuple(c for c in result.cases if c.defense == "none"))
    assert {said.defense for strip in draw_strips(alone) for said in strip.said} == {"none"}


def test_the_page_draws_accuracy_against_queries(result: CampaignResult, tmp_path: Path) -> None:
    write_html(result, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert html.count('<figure class="asked">') == 2
    for case in result.cases:
        assert f"{100 * case.accuracy:.1f} %" in html
    assert not re.findall(r"<script|<link|@import|(?:src|href)=\"(?!data:|#)|url\(", html)
    assert "static attack" not in html, "none was made"


def test_what_cannot_be_asked_for(data: LabelledImages, tmp_path: Path) -> None:
    for options, told in (
        ({"queries": 0}, "queries 0 is out of range; allowed: 1 to"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"attacks": ("sqare",)}, "unknown black-box attack 'sqare'"),
        ({"track": "labels"}, "square needs scores"),
        ({"epsilon": Epsilon(0)}, "epsilon 0/255 leaves an attack nothing to change"),
        ({"attacks": ("square", "square")}, "named twice"),
    ):
        with pytest.raises(OptionError, match=told):
            attack(data, "http://127.0.0.1:1", tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
