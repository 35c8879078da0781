"""The summary of a load test, read back: whatever else lies there is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mithridate.errors import InputError
from mithridate.evaluation.service_load import (
    GeneratorLag,
    Histogram,
    LoadStep,
    LoadSummary,
    Quantiles,
    Ratio,
    read_load_summary,
)

_TIMES = Quantiles(count=9, mean=2.0, p50=2.0, p95=None, p99=None, p999=None, beyond_p999=0, max=3.0)
_STEP = LoadStep(
    set_rate=9.0,
    clients=None,
    seconds=1.0,
    requests=9,
    answered=8,
    errors={"http 429": 1},
    sent_rate=9.0,
    rate_deviation=0.0,
    answered_rate=8.0,
    goodput_rate=8.0,
    goodput_share=8 / 9,
    latency=_TIMES,
    service_time=_TIMES,
    kinds={"clean": _TIMES},
    adversarial_to_clean={"p50": Ratio(value=1.1, low=1.0, high=1.2)},
    waited_share=0.0,
    generator=GeneratorLag(p50=0.1, p99=None, max=0.2, cpu_share=0.1, limited=False, why=""),
    sustained=False,
    histogram=Histogram(edges=(1.0, 2.0), counts={"clean": (8,)}),
)
_SUMMARY = LoadSummary(
    command="mithridate load",
    created="2026-01-01",
    url="http://127.0.0.1:8000",
    service={"name": "x", "digest": "sha256:0", "arch": "small-cnn", "defense": "rmc"},
    traffic={"source": "digits", "images": 9},
    model="open",
    arrivals="constant",
    objective_ms=250.0,
    connections=64,
    timeout_seconds=10.0,
    warmup_seconds=1.0,
    seed=0,
    environment={"python": "3.11"},
    steps=(_STEP,),
    knee=None,
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(_SUMMARY.to_json()))
    assert read_load_summary(path) == _SUMMARY


def _with(**changes: Any) -> str:
    return json.dumps({**_SUMMARY.to_json(), **changes})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        _with(schema=2),
        _with(steps=5),
        _with(steps=[{"sent_rate": 1}]),
        _with(objective_ms=float("nan")),
        _with(objective_ms=float("inf")).replace("Infinity", "1e999"),
        _with(service=None),
        json.dumps({"rows": [], "black_box": None, "service": {"digest": "sha256:0"}}),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(content)
    with pytest.raises(InputError, match="no summary of a load test"):
        read_load_summary(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_load_summary(tmp_path / "summary.json")
