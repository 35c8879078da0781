"""Near-duplicate queries: counted, told of once, and without effect on any answer."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from service_helpers import Serving, Wrapped, install, post, post_json, predictions
from starlette.testclient import TestClient
from test_service_describe import read_metrics

from mithridate.attacks.black_box import Square
from mithridate.attacks.in_process import InProcessOracle
from mithridate.attacks.oracle import Answers
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources, build_defence
from mithridate.images import encode_png
from mithridate.types import Epsilon, Pixels
from service.query_telemetry import Asker


class Listening(InProcessOracle):
    """Keeps what it is asked."""

    asked: list[Pixels]

    def ask(self, rows: torch.Tensor, pixels: Pixels) -> Answers:
        self.asked.append(pixels.clone())
        return super().ask(rows, pixels)


@pytest.fixture(scope="module")
def square(resources: Resources, digits_test: LabelledImages) -> list[bytes]:
    """The queries of a Square attack on one digit, as PNG."""
    oracle = Listening(build_defence("none", resources), classes=10, seed=0)
    oracle.asked = []
    pixels, labels = torch.from_numpy(digits_test.images[:1]), torch.from_numpy(digits_test.labels[:1])
    Square(epsilon=Epsilon(8)).run(oracle, pixels, labels, seed=0, budget=120)
    return [encode_png(image) for image in torch.cat(oracle.asked).numpy()]


def telemetry(client: TestClient) -> Any:
    app: Any = client.app
    return app.state.service.watching.telemetry


def test_an_attack_stands_out_and_clean_images_do_not(
    serving: Serving, square: list[bytes], digits_test: LabelledImages, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mithridate.telemetry")
    clean = [encode_png(image) for image in digits_test.images[100:220]]
    with serving(offer=["none"], max_images=200) as client:
        plain = predictions(post_json(client, clean, defense="none"))
        telemetry(client).flush()
        quiet = read_metrics(client)
        assert [record for record in caplog.records if record.name == "mithridate.telemetry"] != []
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        for query in square:
            assert post(client, query, defense="none").status_code == 200
        telemetry(client).flush()
        attacked = read_metrics(client)
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert predictions(post_json(client, clean, defense="none")) == plain
    assert quiet["compared_queries_total",] == 120
    assert quiet["near_duplicate_queries_total", "near"] <= 2
    assert quiet["near_duplicate_rate",] <= 0.02
    assert attacked["near_duplicate_queries_total", "near"] >= 0.8 * len(square)
    assert attacked["near_duplicate_rate",] > 0.5
    (warning,) = warnings  # 120 requests, one line
    assert warning.getMessage().startswith("near-duplicate queries")
    assert 0.5 <= warning.__dict__["fields"]["rate"] <= 1
    assert "testclient" not in warning.getMessage(), "an address, and nobody allowed that"
    assert attacked["not_compared_queries_total",] == 0


def test_a_defence_without_embeddings_and_telemetry_that_fails(
    serving: Serving, clean: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(Wrapped):
        def predict_together(self, requests: Any) -> Any:
            from dataclasses import replace

            return [replace(outcome, embeddings=None) for outcome in super().predict_together(requests)]

    with serving(offer=["none"]) as client:
        app: Any = client.app
        install(client, Plain(app.state.service.engine.loaded.defences["none"], "plain"))
        assert post(client, clean[0], defense="plain").status_code == 200
        assert read_metrics(client)["not_compared_queries_total",] == 1
        monkeypatch.setattr("service.query_telemetry.Yardstick.of", lambda *rest, **named: 1 / 0)
        assert post(client, clean[0], defense="none").status_code == 200
        telemetry(client).flush()
        assert read_metrics(client)["not_compared_queries_total",] == 2
        monkeypatch.undo()
        assert post(client, clean[0], defense="none").status_code == 200
        telemetry(client).flush()
        assert read_metrics(client)["compared_queries_total",] == 1, "it goes on"


def test_telemetry_that_is_behind_leaves_out_and_says_so(serving: Serving, clean: list[bytes]) -> None:
    with serving(offer=["none"]) as client:
        watch = telemetry(client)
        app: Any = client.app
        bundle = app.state.service.engine.loaded.bundle
        wide = torch.zeros(1000, bundle.embeddings.shape[1])
        with watch._lock:  # it cannot go on
            for _ in range(40):
                watch.saw(bundle, Asker(key_id="a", address=""), len(wide), wide)
            assert watch._pending_bytes <= 2**24
            assert post(client, clean[0], defense="none").status_code == 200, "no answer waits for it"
        watch.flush()
        metrics = read_metrics(client)
    assert metrics["not_compared_queries_total",] + metrics["compared_queries_total",] == 40_001
    assert min(metrics["not_compared_queries_total",], metrics["compared_queries_total",]) > 1000


def test_what_waits_is_compared_in_the_order_of_the_bundles(serving: Serving) -> None:
    """Of another bundle and back again, within one turn of the thread: the last one's queries are what is kept."""
    with serving(offer=["none"]) as client:
        watch = telemetry(client)
        app: Any = client.app
        bundle = app.state.service.engine.loaded.bundle
        other = copy.copy(bundle)
        object.__setattr__(other, "digest", "sha256:other")
        image = torch.zeros(1, bundle.embeddings.shape[1])
        with watch._lock:  # none is taken before all are there
            for one in (bundle, other, bundle):
                watch.saw(one, Asker(key_id="a", address=""), 1, image)
        watch.flush()
        kept = watch._recent
        watch.saw(bundle, Asker(key_id="a", address=""), 1, image)
        watch.flush()
        assert watch._recent is kept
        assert read_metrics(client)["compared_queries_total",] == 4


def test_it_can_be_turned_off(serving: Serving, clean: list[bytes]) -> None:
    with serving(offer=["none"], query_telemetry=False) as client:
        post(client, clean[0], defense="none")
        assert telemetry(client) is None
        assert read_metrics(client)["compared_queries_total",] == 0
