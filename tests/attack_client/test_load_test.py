"""Statistics, the search for the knee, and a whole load test of a real service."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from load_servers import one_at_a_time, serving

from attack_client.generator import Sample
from attack_client.load_plan import Files, LoadPlan, from_dataset, from_files
from attack_client.load_report import write_load_html
from attack_client.load_statistics import adversarial_to_clean, quantiles, summarise
from attack_client.load_test import run_load_test, sample_line
from attack_client.ramp import ATTEMPTS, PRECISION, find_knee
from mithridate.datasets import LabelledImages
from mithridate.errors import InputError, OptionError
from mithridate.evaluation import percentile
from mithridate.evaluation.service_load import LoadStep


def steady(rate: float, latency: float, *, count: int = 1000, late: float = 0.0, cpu_share: float = 0.1) -> LoadStep:
    """A step in which every request took ``latency`` seconds."""
    samples = [
        Sample("clean", 0, n / rate, n / rate + late, n / rate + late, n / rate + latency, 200, None)
        for n in range(count)
    ]
    return summarise(
        samples,
        set_rate=rate,
        clients=None,
        seconds=count / rate,
        objective_ms=100,
        cpu_share=cpu_share,
        seed=0,
    )


@given(st.lists(st.floats(0.001, 1e5), max_size=300))
def test_percentiles_are_nearest_rank_where_enough_lies_beyond(values: list[float]) -> None:
    found = quantiles(np.array(values))
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        beyond = len(values) - math.ceil(share * len(values)) if values else 0
        assert getattr(found, name) == (percentile(values, share) if beyond >= 5 else None)
    assert found.p999 is None


def test_p999_needs_five_samples_beyond_it_and_says_how_many_there_are() -> None:
    assert quantiles(np.arange(4999.0)).p999 is None
    found = quantiles(np.arange(5000.0))
    assert (found.p999, found.beyond_p999) == (4994.0, 5)


def test_a_ratio_s_interval_holds_the_truth_though_neighbours_in_time_are_alike() -> None:
    """Latencies that drift (AR(1), 0.95), kinds in runs of ten, the attacked ones 1.5 times as slow: of 40 intervals
    of 95 %, at least 34 hold 1.5. Drawn one request at a time, 20 do."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(40):
        drift = np.zeros(1000)
        for n in range(1, 1000):
            drift[n] = 0.95 * drift[n - 1] + rng.normal(0, 0.1)
        attacked = np.repeat(rng.random(100) < 0.5, 10)
        ratio = adversarial_to_clean(np.exp(drift) * np.where(attacked, 1.5, 1), attacked, seed=1)["p50"]
        held += ratio.low <= 1.5 <= ratio.high
    assert held >= 34
    assert adversarial_to_clean(np.exp(drift), np.zeros(1000, bool), seed=0) == {}


def test_errors_and_slow_answers_are_no_goodput() -> None:
    samples = [
        Sample("clean", 0, n / 10, n / 10, n / 10, n / 10 + (0.05 if n % 2 else 0.3), 200, None) for n in range(80)
    ]
    samples += [Sample("clean", 0, n / 10, n / 10, n / 10, n / 10 + 0.001, 429, "http 429") for n in range(80, 100)]
    found = summarise(samples, set_rate=10, clients=None, seconds=10, objective_ms=100, cpu_share=0.1, seed=0)
    assert found.goodput_share == 0.4
    assert found.goodput_rate == pytest.approx(4)
    assert found.errors == {"http 429": 20}
    assert found.latency.count == 80  # to be turned away quickly is not to be answered quickly
    assert found.sustained is False


def test_the_generator_says_when_it_is_the_bottleneck() -> None:
    assert not steady(100, 0.05).generator.limited
    assert "lateness" in steady(100, 0.05, late=0.02).generator.why
    assert "97 % of a core" in steady(100, 0.05, cpu_share=0.97).generator.why


@pytest.mark.parametrize("capacity", [13.0, 100.0, 1234.5])
def test_the_knee_is_found_within_its_precision(capacity: float) -> None:
    measured: list[float] = []

    def measure(rate: float) -> LoadStep:
        measured.append(rate)
        return steady(rate, 0.01 if rate <= capacity else 5.0)

    steps, knee = find_knee(measure, [10], doubling=True, ceiling=100_000)
    assert knee.sustained is not None
    assert knee.saturated is not None
    assert knee.sustained <= capacity < knee.saturated <= PRECISION * knee.sustained
    assert [step.set_rate for step in steps] == measured
    assert max(measured) <= 2 * capacity  # it does not go on once the service is saturated


def test_one_bad_second_is_no_saturation_but_two_are() -> None:
    tries: dict[float, int] = {}

    def measure(rate: float) -> LoadStep:
        tries[rate] = tries.get(rate, 0) + 1
        return steady(rate, 5.0 if tries[rate] == 1 or rate > 25 else 0.01)

    _, knee = find_knee(measure, [20, 10, 30, 1000], doubling=False, ceiling=100_000)
    assert knee.sustained is not None
    assert 25 / PRECISION <= knee.sustained <= 25
    assert tries[30] == ATTEMPTS
    assert 1000 not in tries
    assert "Not measured: 1000" in knee.words


def test_what_was_never_saturated_has_its_knee_above() -> None:
    _, knee = find_knee(lambda rate: steady(rate, 0.01), [10], doubling=True, ceiling=50)
    assert (knee.sustained, knee.saturated) == (50, None)
    assert "the knee is above" in knee.words
    _, none = find_knee(lambda rate: steady(rate, 5.0), [10, 20], doubling=False, ceiling=50)
    assert none.sustained is None
    assert "Saturated at the lowest rate" in none.words


FILES = Files(clean=(b"image",), described={"source": "one", "images": 1})


def test_a_ramp_finds_the_capacity_of_a_real_server() -> None:
    """A server that takes 8 ms each, by its own clock, does 125 a second, and no noise makes it faster. The objective
    leaves it a tenth of a step in arrears, which is what the knee may lie above; noise of the machine only lowers it.
    """
    plan = LoadPlan(url="http://x", rates=(100.0, 150.0), seconds=1.5, warmup_seconds=0.1, objective_ms=150)
    with serving(lambda: one_at_a_time(0.008)) as url:
        summary = run_load_test(LoadPlan(**{**vars(plan), "url": url}), FILES)
    assert summary.knee is not None
    assert summary.knee.sustained is not None
    assert 0.85 * 125 <= summary.knee.sustained <= 1.15 * 125


def test_a_whole_test_of_a_real_service(served: str, digits_test: LabelledImages, tmp_path: Path) -> None:
    images = digits_test.images[:8]
    data = LabelledImages(**{**vars(digits_test), "images": images, "labels": digits_test.labels[:8]})
    lines: list[str] = []
    plan = LoadPlan(url=served, rates=(20.0,), seconds=1, warmup_seconds=0.5, defense="none", objective_ms=5000)
    summary = run_load_test(
        plan, from_dataset(data), record=lambda step, found: lines.extend(sample_line(step, s) for s in found)
    )
    assert summary.service["defense"] == "none"
    assert summary.steps[0].answered == 20
    assert summary.knee is None
    kept = [json.loads(line) for line in lines]
    assert len(kept) == 30
    assert sum(line["due_ms"] < 0 for line in kept) == 10
    assert json.loads(json.dumps(summary.to_json(), allow_nan=False))["schema"] == 1
    write_load_html(summary, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    assert "src=" not in page
    assert "http-equiv" in page


def test_a_trial_that_is_refused_ends_it_before_the_load(
    served: str, tmp_path: Path, digits_test: LabelledImages
) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(Exception, match="415"):
        run_load_test(LoadPlan(url=served, rates=(10.0,)), from_files([tmp_path / "x.png"]))
    with pytest.raises(OptionError, match="does not offer 'wall'"):
        run_load_test(LoadPlan(url=served, rates=(10.0,), defense="wall"), from_dataset(digits_test))
    wide = LabelledImages(**{**vars(digits_test), "images": np.zeros((len(digits_test), 1, 9, 9), np.uint8)})
    with pytest.raises(InputError, match="serves"):
        run_load_test(LoadPlan(url=served, rates=(10.0,)), from_dataset(wide))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rates": (0.0,)}, "rate 0"),
        ({"rates": (float("nan"),)}, "rate nan"),
        ({"rates": (10.0,), "clients": 3}, "either"),
        ({"rates": ()}, "either"),
        ({"rates": (), "clients": 0}, "clients 0"),
        ({"rates": (), "clients": 2, "poisson": True}, "need rates"),
        ({"seconds": 0.0}, "duration 0"),
        ({"seconds": 0.01}, "are 0"),
        ({"rates": (100_000.0,), "seconds": 3600}, "360100000"),
        ({"rates": (10_000.0,), "seconds": 1, "warmup_seconds": 3600.0}, "36010000"),
        ({"connections": 0}, "connections 0"),
        ({"warmup_seconds": -1.0}, "warm-up -1"),
        ({"objective_ms": 20_000.0}, "longer timeout"),
        ({"adversarial_share": 1.5}, "share 1.5"),
        ({"url": "nonsense"}, "http://host:port"),
    ],
)
def test_plans_that_make_no_sense_are_refused(change: dict, says: str) -> None:
    build: Callable[..., LoadPlan] = LoadPlan
    with pytest.raises(OptionError, match=says):
        build(**{"url": "http://127.0.0.1:1", "rates": (10.0,), **change})
