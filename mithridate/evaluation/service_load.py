"""What a load test of a service found, as plain data: what ``load`` writes and the report shows.

``LoadSummary.to_json`` is what ``Evaluation.service`` holds. Times are milliseconds, rates are requests a second,
shares lie in [0, 1]. None stands for what could not be said: too few samples, or a question that does not apply.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from mithridate.errors import InputError

SCHEMA = 1

CLEAN = "clean"
"""The kind of traffic that nobody attacked; every other kind is named after its attack."""


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Percentiles of ``count`` times, nearest rank. One with fewer than five samples beyond it is None.

    ``beyond_p999``: how many samples lie beyond the 99.9th percentile, that is, what it rests on.
    """

    count: int
    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None
    p999: float | None
    beyond_p999: int
    max: float | None


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Adversarial over clean, of one percentile, with a 95 % interval (block bootstrap over time)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class GeneratorLag:
    """How late the generator itself was: from when a request was due to when it was taken up, and the share of one
    core that it used. ``limited``: it was the bottleneck, so the step says little about the service; ``why`` says how
    that was seen, and is empty otherwise."""

    p50: float | None
    p99: float | None
    max: float | None
    cpu_share: float
    limited: bool
    why: str


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many answers of each kind took from ``edges[i]`` to ``edges[i + 1]`` milliseconds; edges grow in equal
    proportion."""

    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class LoadStep:
    """One rate (open model) or one number of clients (closed model), measured for ``seconds`` after the warm-up.

    ``latency`` counts from when a request was due, ``service_time`` from when it was sent; in the closed model that
    is the same moment. Latency is of answered requests and of those that ran out of time, sent or not, at the age they
    had reached: what they would have taken is longer. Service time is of those among them that were sent. Refused and
    failed ones are in ``errors`` only.
    """

    set_rate: float | None
    clients: int | None
    seconds: float
    requests: int
    """Due in that time."""
    answered: int
    """With a status below 400."""
    errors: dict[str, int]
    """By kind: ``http 429``, ``timeout``, ``not sent in time``, ``refused``, ``reset``, ``unreachable``,
    ``malformed answer``."""
    sent_rate: float
    """What the generator held."""
    rate_deviation: float | None
    """``sent_rate / set_rate - 1``; None in the closed model."""
    answered_rate: float
    """Answers that arrived in that time, a second."""
    goodput_rate: float
    """Requests answered within the objective, a second."""
    goodput_share: float
    """The same as a share of all requests due."""
    latency: Quantiles
    service_time: Quantiles
    kinds: dict[str, Quantiles]
    """``latency`` for each kind of traffic."""
    adversarial_to_clean: dict[str, Ratio]
    """By percentile (``p50``, ``p99``); empty where there is one kind only, or too few samples."""
    waited_share: float
    """Requests that had to wait for one of the generator's connections."""
    generator: GeneratorLag
    sustained: bool | None
    """At least 99 % of the requests due were answered within the objective, and answers kept up with them. None in the
    closed model, which asks no more than it gets."""
    histogram: Histogram


@dataclass(frozen=True, kw_only=True)
class Knee:
    """The highest rate that was sustained, and the lowest that was not; None where there was none. ``words`` says the
    same, and why the search ended."""

    sustained: float | None
    saturated: float | None
    words: str


@dataclass(frozen=True, kw_only=True)
class LoadSummary:
    """A whole load test."""

    command: str
    created: str
    url: str
    service: dict[str, str]
    """``name``, ``digest``, ``arch``, ``defense``."""
    traffic: dict[str, Any]
    """``source``, ``images``; with adversarial traffic also ``attack``, ``epsilon``, ``surrogate``,
    ``fooled_surrogate`` and ``adversarial_share``."""
    model: Literal["open", "closed"]
    arrivals: Literal["constant", "poisson"] | None
    objective_ms: float
    connections: int
    timeout_seconds: float
    warmup_seconds: float
    seed: int
    environment: dict[str, str]
    steps: tuple[LoadStep, ...]
    """In the order in which they were run; a ramp's search goes up and down."""
    knee: Knee | None
    """None where one rate was asked for, and in the closed model."""
    notes: tuple[str, ...] = ()
    """What the reader must know before believing the numbers, in words."""

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        return {"schema": SCHEMA, **asdict(self)}


def read_load_summary(path: Path) -> LoadSummary:
    """Of the ``summary.json`` that ``load`` has written. Raises InputError, in one line, for anything else."""
    try:
        content = json.loads(path.read_bytes())
        json.dumps(content, allow_nan=False)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no summary of a load test: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise InputError(f"{path} is no summary of a load test; give the summary.json that mithridate load wrote")
    try:
        summary: LoadSummary = TypeAdapter(LoadSummary).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path} is no summary of a load test: {where}: {first['msg']}") from error
    return summary
