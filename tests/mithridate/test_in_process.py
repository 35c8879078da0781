"""An oracle in this process shows what a client of the service would see, and counts what it is asked."""

from __future__ import annotations

import torch

from mithridate.attacks.black_box import null_control, parse_black_box
from mithridate.attacks.in_process import InProcessOracle
from mithridate.attacks.oracle import answers_from_scores
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Resources, build_defence
from mithridate.evaluation.query_curves import accuracy_after, median_queries, query_curve
from mithridate.types import Epsilon, to_images
from service.reports import report_images
from service.schemas import ImagePrediction, PredictOptions
from tests.mithridate.attack_helpers import answers, linear, noisy, random_pixels
from tests.mithridate.black_box_helpers import Books


def test_it_shows_what_the_json_of_the_service_shows(
    resources: Resources,
    digits_bundle,
    digits_test: LabelledImages,  # type: ignore[no-untyped-def]
) -> None:
    pixels = torch.from_numpy(digits_test.images[:30])
    for name in ("none", "rmc", "deepnn"):
        defence = build_defence(name, resources)
        prediction = defence.predict(to_images(pixels), generator=torch.Generator().manual_seed(3), budget=Budget())
        manifest = Bundle.open(digits_bundle).manifest
        reports = report_images(manifest, resources.exemplars, prediction, PredictOptions(top_k=10))
        read = [ImagePrediction.model_validate_json(report.model_dump_json(by_alias=True)) for report in reports]
        scores = torch.zeros(30, 10, dtype=torch.float64)
        for row, image in enumerate(read):
            for entry in image.top:
                scores[row, entry.class_index] = entry.confidence
        seen = answers_from_scores(prediction.scores, "scores")
        assert torch.equal(seen.scores, scores)
        assert seen.labels.tolist() == [image.class_index for image in read]


def test_ties_go_to_the_first_class_and_labels_are_all_that_is_seen() -> None:
    scores = torch.tensor([[0.2, 0.4, 0.4], [1 / 3, 1 / 3, 1 / 3]])
    seen = answers_from_scores(scores, "labels")
    assert seen.labels.tolist() == [1, 0]
    assert seen.scores is None


def test_calls_are_of_a_set_size_and_every_query_counts_for_its_image(resources: Resources) -> None:
    pixels = torch.randint(0, 256, (25, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    sizes = []
    defence = build_defence("none", resources)

    class Watched:
        name = "watched"

        def predict(self, images: torch.Tensor, **given):  # type: ignore[no-untyped-def]
            sizes.append(len(images))
            return defence.predict(images, **given)

    oracle = InProcessOracle(Watched(), classes=10, images_a_call=8)  # type: ignore[arg-type]
    rows = torch.arange(25) % 7
    told = oracle.ask(rows, pixels)
    assert sizes == [8, 8, 8, 1]
    assert oracle.queries.tolist() == [4, 4, 4, 4, 3, 3, 3]
    for place in (0, 9, 24):
        alone = InProcessOracle(defence, classes=10).ask(rows[:1], pixels[place : place + 1])
        assert torch.allclose(alone.scores[0], told.scores[place], atol=1e-4)
    assert len(oracle.ask(rows[:0], pixels[:0]).labels) == 0


def test_a_random_defence_draws_anew_at_every_call_and_from_the_seed(resources: Resources) -> None:
    pixels = torch.randint(60, 196, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    rows, defence = torch.arange(20), build_defence("randomization", resources)
    first, again, secret = (InProcessOracle(defence, classes=10, seed=seed) for seed in (1, 1, None))
    told = first.ask(rows, pixels).scores
    assert torch.equal(told, again.ask(rows, pixels).scores)
    assert not torch.equal(told, first.ask(rows, pixels).scores)
    assert not torch.equal(told, secret.ask(rows, pixels).scores)


def test_the_null_control_finds_the_luck_of_asking_often() -> None:
    forward, _, _ = linear(6)
    pixels = random_pixels(6, 40)
    labels = answers(forward, pixels)
    queries = torch.arange(40) * 10
    lucky = Books(noisy(forward, 0, 2.0), track="labels")
    control = null_control(lucky, pixels, labels, queries=queries)
    assert lucky.counts(40) == queries.tolist()
    assert {point for _, point in lucky.queries} == {pixels[row].numpy().tobytes() for row in range(1, 40)}
    assert 10 < int((control.broken_at > 0).sum()) < 40
    sure = null_control(Books(forward, track="labels"), pixels, labels, queries=queries)
    assert not sure.broken_at.any()


def test_accuracy_falls_from_the_clean_one_as_queries_are_spent() -> None:
    forward, _, _ = linear(6)
    pixels = random_pixels(6, 60)
    labels = answers(forward, pixels)
    labels[:6] = (labels[:6] + 1) % 4
    square = parse_black_box("square", epsilon=Epsilon(10))
    result = square.run(Books(forward, track="scores"), pixels, labels, seed=0, budget=300)
    curve = query_curve({"square": result}, budget=300)
    points = curve.series["square"]
    assert [point.x for point in points] == [1, 100, 300]
    assert points[0].y == 0.9
    assert points[0].y > points[1].y >= points[2].y == accuracy_after(result, 300).value
    assert all(point.low <= point.y <= point.high for point in points)
    assert 1 < median_queries(result) < 300
