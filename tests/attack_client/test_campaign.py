"""A whole campaign against a served bundle: what it counts, and that its clock does not flatter anybody."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from client_helpers import FakeService, closed_port, listening

from attack_client.campaign import run_campaign
from attack_client.client import AsyncClient
from attack_client.load import Outcome, Shot, fire
from attack_client.plan import CampaignPlan
from attack_client.report import write_html
from attack_client.results import CampaignResult, write_results
from attack_client.strips import draw_strips
from attack_client.transfer import Surrogate, load_surrogate
from mithridate.datasets import LabelledImages, load_dataset
from mithridate.errors import InputError, OptionError
from mithridate.evaluation import percentile, wilson_interval
from mithridate.images import encode_png
from mithridate.types import Epsilon

DATA = "digits[test,:60]"


@pytest.fixture(scope="module")
def data() -> LabelledImages:
    return load_dataset(DATA)


@pytest.fixture(scope="module")
def surrogate(digits_bundle: Path, data: LabelledImages) -> Surrogate:
    return load_surrogate(digits_bundle, data)


@pytest.fixture(scope="module")
def plan(served: str, data: LabelledImages, surrogate: Surrogate) -> CampaignPlan:
    return CampaignPlan(
        url=served,
        data=data,
        surrogate=surrogate,
        attacks=("pgd20",),
        epsilon=Epsilon(32),
        rate=300,
        command="mithridate attack",
    )


Reports = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def run(plan: CampaignPlan) -> tuple[CampaignResult, Reports]:
    reports: Reports = []
    return run_campaign(plan, progress=lambda *report: reports.append(report)), reports


def quiet(*_: Any) -> None:
    """Progress that nobody watches."""


def test_the_base_model_collapses_and_the_defence_recovers(run: tuple[CampaignResult, Reports]) -> None:
    result, _ = run
    assert result.row("none", "clean").accuracy >= 0.9
    assert result.row("rmc", "clean").accuracy >= 0.85
    fallen, recovered = result.row("none", "pgd20"), result.row("rmc", "pgd20")
    assert fallen.accuracy <= 0.3
    assert recovered.interval.low > fallen.interval.high


def test_every_image_is_sent_once_to_every_defence(run: tuple[CampaignResult, Reports]) -> None:
    result, reports = run
    sent = {(outcome.image, outcome.kind, outcome.defense) for outcome in result.outcomes}
    assert len(sent) == len(result.outcomes) == 60 * 2 * 2
    assert [(row.kind, row.defense) for row in result.rows] == [
        (kind, defense) for kind in ("clean", "pgd20") for defense in ("none", "rmc")
    ]
    assert [done for phase, done, _ in reports if phase == "send"] == list(range(1, 241))
    assert [report for report in reports if report[0] == "attack"] == [("attack", 0, 1), ("attack", 1, 1)]


def test_rows_say_what_the_outcomes_say(run: tuple[CampaignResult, Reports], data: LabelledImages) -> None:
    result, _ = run
    for row in result.rows:
        mine = [o for o in result.outcomes if (o.defense, o.kind) == (row.defense, row.kind)]
        correct = sum(outcome.class_index == data.labels[outcome.image] for outcome in mine)
        assert (row.images, row.correct, row.accuracy) == (60, correct, correct / 60)
        assert row.interval == wilson_interval(correct, 60)
        assert row.interval.low <= row.accuracy <= row.interval.high
        assert row.errors == {}
        latencies = [outcome.latency_ms for outcome in mine]
        assert row.p50_ms == percentile(latencies, 0.5) <= row.p95_ms <= row.p99_ms <= max(latencies)
    for outcome in result.outcomes:
        assert outcome.label == data.classes[outcome.class_index or 0]
        assert outcome.service_ms is not None
        assert 0 < outcome.service_ms <= outcome.latency_ms


def test_what_was_sent_is_what_was_made(run: tuple[CampaignResult, Reports], data: LabelledImages) -> None:
    """Made on the very network that is served, so what fools the one must fool the other, image for image."""
    result, _ = run
    (crafted,) = result.crafted
    difference = np.abs(crafted.pixels.astype(int) - data.images.astype(int))
    assert 24 <= difference.max() <= 32
    answers = {o.image: o.class_index for o in result.outcomes if (o.defense, o.kind) == ("none", "pgd20")}
    fooled = [answers[number] != label for number, label in enumerate(data.labels)]
    assert fooled == crafted.fooled.tolist()


def test_the_same_campaign_gives_the_same_answers(run: tuple[CampaignResult, Reports], plan: CampaignPlan) -> None:
    def answers(result: CampaignResult) -> dict[Any, Any]:
        return {(o.image, o.kind, o.defense): o.class_index for o in result.outcomes}

    again = run_campaign(plan, progress=quiet)
    assert answers(again) == answers(run[0])
    assert [o.image for o in again.outcomes] == [o.image for o in run[0].outcomes], "sent in the same order"


def test_results_on_disk(run: tuple[CampaignResult, Reports], data: LabelledImages, tmp_path: Path) -> None:
    result, _ = run
    write_results(result, tmp_path)
    summary = read_strictly((tmp_path / "summary.json").read_text())
    assert summary["dataset"] == DATA
    assert summary["dataset_fingerprint"] == data.fingerprint()
    assert summary["attacks"] == [{"name": "pgd20", "epsilon": "32/255", "fooled_surrogate": fooled(result)}]
    assert summary["service"]["digest"] == result.service.digest
    assert summary["rate_per_second"] == 300
    assert [row["correct"] for row in summary["rows"]] == [row.correct for row in result.rows]
    lines = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text().splitlines()]
    assert len(lines) == 240
    assert all(line["truth"] == data.labels[line["image"]] for line in lines)
    assert lines == sorted(lines, key=lambda line: (line["image"], line["kind"], line["defense"]))


def read_strictly(text: str) -> Any:
    """Python reads NaN; nobody else does."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def fooled(result: CampaignResult) -> int:
    return int(result.crafted[0].fooled.sum())


def test_the_report_is_one_page_with_the_numbers(run: tuple[CampaignResult, Reports], tmp_path: Path) -> None:
    result, _ = run
    page = tmp_path / "report.html"
    write_html(result, page)
    html = page.read_text(encoding="utf-8")
    for row in result.rows:
        assert f"{100 * row.accuracy:.1f} %" in html
    assert "static attack" in html
    assert not re.findall(r"<script|<link|@import|(?:src|href)=\"(?!data:|#)", html)


def test_errors_count_as_wrong_and_are_told(plan: CampaignPlan, data: LabelledImages) -> None:
    with listening(FakeService(fails_every=3)) as url:
        result = run_campaign(dataclasses.replace(plan, url=url, rate=1000), progress=quiet)
    zeros = {number for number, label in enumerate(data.labels) if label == 0}
    failed = [outcome for outcome in result.outcomes if outcome.error is not None]
    assert len(failed) == 80
    assert all(outcome.class_index is outcome.label is outcome.service_ms is None for outcome in failed)
    for row in result.rows:
        mine = [o for o in result.outcomes if (o.defense, o.kind) == (row.defense, row.kind)]
        answered = {outcome.image for outcome in mine if outcome.error is None}
        assert row.images == 60 == len(answered) + row.errors["http 500"]
        assert row.correct == len(zeros & answered)
        assert row.accuracy == len(zeros & answered) / 60
    # A worst case over answers that never came is no accuracy of the defence, however low: it must say so.
    for defense in result.defenses:
        missing = result.worst(defense).missing
        for kind in ("clean", *plan.attacks):
            assert f"{result.row(defense, kind).errors['http 500']} images ({kind})" in missing


def test_images_show_what_an_attack_did(run: tuple[CampaignResult, Reports], data: LabelledImages) -> None:
    result, _ = run
    strips = draw_strips(result)
    clean, attacked = result.right("rmc", "clean"), result.right("rmc", "pgd20")
    assert 1 <= len(strips) <= 12
    assert all(clean[strip.number] for strip in strips), "an image that was misread anyway shows no attack"
    rights = [attacked[strip.number] for strip in strips]
    assert rights == sorted(rights), "failures first"
    assert rights[0] == all(right for right, before in zip(attacked, clean, strict=True) if before)
    base = dataclasses.replace(result, defenses=("none",))
    assert all(result.right("none", "clean")[strip.number] for strip in draw_strips(base))
    assert not draw_strips(base)[0].said[0].right


def test_a_refusal_is_no_wrong_answer(plan: CampaignPlan, data: LabelledImages) -> None:
    """A key with a small allowance slows the attack down; it makes no defence look worse than it is."""
    service = FakeService(refuses=150)
    with listening(service) as url:
        result = run_campaign(dataclasses.replace(plan, url=url, rate=1000), progress=quiet)
    zeros = sum(label == 0 for label in data.labels)
    assert [row.errors for row in result.rows] == [{}] * 4
    assert [row.correct for row in result.rows] == [zeros] * 4
    assert sum(row.refused for row in result.rows) == sum(outcome.refused for outcome in result.outcomes) == 150


def test_answers_of_a_bundle_that_was_put_there_meanwhile_do_not_count(plan: CampaignPlan) -> None:
    shots = [Shot(image=0, kind="clean", defense="none", content=encode_png(plan.data.images[0]))]

    async def send(url: str, bundle: str) -> list[Outcome]:
        async with AsyncClient(url) as client:
            return await fire(client, shots, rate=100, seed=0, bundle=bundle)

    with listening(FakeService()) as url:
        (same,) = asyncio.run(send(url, "sha256:0"))
        (other,) = asyncio.run(send(url, "sha256:1"))
    assert same.error is None
    assert other.class_index is None
    assert "another bundle" in (other.error or "")


def test_a_service_that_answers_nothing(plan: CampaignPlan, tmp_path: Path) -> None:
    with listening(FakeService(fails_every=1)) as url:
        result = run_campaign(dataclasses.replace(plan, url=url, rate=1000), progress=quiet)
    assert {row.accuracy for row in result.rows} == {0}
    assert {tuple(row.errors.items()) for row in result.rows} == {(("http 500", 60),)}
    write_results(result, tmp_path)
    summary = read_strictly((tmp_path / "summary.json").read_text())
    assert summary["rows"][0]["p50_ms"] is None
    write_html(result, tmp_path / "report.html")


def test_a_hostile_service_cannot_write_into_the_report(plan: CampaignPlan, tmp_path: Path) -> None:
    hostile = '<img src="http://evil/"><script>alert(1)</script>'
    with listening(FakeService(label=hostile, arch=hostile)) as url:
        result = run_campaign(dataclasses.replace(plan, url=url, rate=1000), progress=quiet)
    write_html(result, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert '<img src="http:' not in html


def test_another_service_than_the_data_is_for(plan: CampaignPlan, data: LabelledImages) -> None:
    names = dataclasses.replace(data, classes=tuple("abcdefghij"))
    with pytest.raises(InputError, match=r"10 classes \(0, 1, 2 .*10 \(a, b, c"):
        run_campaign(dataclasses.replace(plan, data=names), progress=quiet)
    larger = dataclasses.replace(data, images=data.images.repeat(2, axis=2).repeat(2, axis=3))
    with pytest.raises(InputError, match=r"serves \(1, 8, 8\) images .* has \(1, 16, 16\)"):
        run_campaign(dataclasses.replace(plan, data=larger), progress=quiet)


def test_what_cannot_be_asked_for(plan: CampaignPlan) -> None:
    with pytest.raises(OptionError, match="does not offer 'rmcc'; allowed: rmc, none"):
        run_campaign(dataclasses.replace(plan, defenses=("none", "rmcc")), progress=quiet)
    with listening(FakeService(defenses=("rmc",))) as url, pytest.raises(OptionError, match="nothing to compare with"):
        run_campaign(dataclasses.replace(plan, url=url), progress=quiet)
    with pytest.raises(OptionError, match="unknown attack"):
        run_campaign(dataclasses.replace(plan, attacks=("pgdx",)), progress=quiet)
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="rate"):
            dataclasses.replace(plan, rate=rate)
    with pytest.raises(OptionError, match="no attack was named"):
        dataclasses.replace(plan, attacks=())
    with pytest.raises(OptionError, match="epsilon 0/255 leaves an attack nothing to change; allowed: 1/255 to"):
        dataclasses.replace(plan, epsilon=Epsilon(0))


def test_a_model_for_other_data(digits_bundle: Path, data: LabelledImages) -> None:
    with pytest.raises(OptionError, match=r"images of 10 classes; .* of 3"):
        load_surrogate(digits_bundle, dataclasses.replace(data, classes=("a", "b", "c"), labels=data.labels % 3))


def test_nobody_there(plan: CampaignPlan) -> None:
    absent = dataclasses.replace(plan, url=f"http://127.0.0.1:{closed_port()}", timeout_seconds=0.3)
    with pytest.raises(InputError, match="was not ready within 0"):
        run_campaign(absent, progress=quiet)


def fire_at(seconds: float, *, shots: int, rate: float, concurrency: int) -> list[Outcome]:
    """What comes of ``shots`` at ``rate`` a second against a service that can do one in ``seconds``."""

    async def main() -> list[Outcome]:
        transport = httpx2.ASGITransport(FakeService(seconds=seconds))
        ammunition = [Shot(image=n, kind="clean", defense="none", content=b"image") for n in range(shots)]
        async with AsyncClient("http://service", transport=transport) as client:
            return await fire(client, ammunition, rate=rate, seed=5, concurrency=concurrency)

    return asyncio.run(main())


@pytest.mark.parametrize("concurrency", [1, 4, 100])
def test_latency_counts_from_when_a_request_was_due(concurrency: int) -> None:
    """At four times what the service can do, each request waits longer than the one before, however few are sent at
    once. Counted from when it was really sent, with concurrency 1, every one would seem to take the service's 20 ms."""
    outcomes = fire_at(0.02, shots=40, rate=200, concurrency=concurrency)
    latencies = [outcome.latency_ms for outcome in outcomes]
    for number, latency in enumerate(sorted(latencies)):
        assert latency >= 20 * (number + 1) - 5 * number - 5
    first, last = np.mean(latencies[:10]), np.mean(latencies[-10:])
    assert last > 3 * first
    assert sorted(outcome.image for outcome in outcomes) == list(range(40))
    assert [outcome.image for outcome in outcomes] != list(range(40)), "in random order"


def test_below_capacity_latency_is_the_services() -> None:
    latencies = [outcome.latency_ms for outcome in fire_at(0.01, shots=20, rate=40, concurrency=32)]
    assert min(latencies) >= 10
    assert percentile(latencies, 0.5) < 60
