"""From samples to what a step of a load test says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from attack_client.generator import Sample
from attack_client.pool import NOT_SENT, TIMEOUT
from mithridate.evaluation.service_load import CLEAN, GeneratorLag, Histogram, LoadStep, Quantiles, Ratio

ENOUGH_BEYOND = 5
"""A percentile with fewer samples beyond it is little more than the largest of them."""
KEPT_UP = 0.99
"""Of the requests due: this share must be answered within the objective."""
_RESAMPLES = 400
_BINS = 40
_SHARES = {"p50": "0.5", "p95": "0.95", "p99": "0.99", "p999": "0.999"}
_Times = NDArray[np.float64]


def quantiles(times: _Times) -> Quantiles:
    """Of milliseconds ``[N]``, nearest rank."""
    count, ordered = len(times), np.sort(times)
    found: dict[str, float | None] = {}
    for name, share in _SHARES.items():
        rank = math.ceil(Fraction(share) * count)
        found[name] = float(ordered[rank - 1]) if count - rank >= ENOUGH_BEYOND else None
    return Quantiles(
        count=count,
        mean=float(times.mean()) if count else None,
        max=float(ordered[-1]) if count else None,
        beyond_p999=count - math.ceil(Fraction(_SHARES["p999"]) * count),
        **found,
    )


def seconds_needed(step: LoadStep) -> dict[str, int]:
    """By percentile that had too few samples beyond it: for how long the step would have to be measured to have them.
    Empty where nothing was answered: then no duration helps."""
    count = step.latency.count
    return {
        name: math.ceil(Fraction(ENOUGH_BEYOND) / (1 - Fraction(share)) * Fraction(step.seconds) / count)
        for name, share in _SHARES.items()
        if count and getattr(step.latency, name) is None
    }


def adversarial_to_clean(latency: _Times, attacked: NDArray[np.bool_], *, seed: int) -> dict[str, Ratio]:
    """Percentiles of the attacked over those of the others, of ``latency`` in the order in which requests were due.

    Neighbours in time share a queue, so that they are not independent: whole stretches of about sqrt(N) requests of
    both kinds are drawn (moving blocks, Künsch 1989, closed to a circle; percentile interval).
    """
    sides = (quantiles(latency[attacked]), quantiles(latency[~attacked]))
    count = len(latency)
    block = max(1, math.isqrt(count))
    rng = np.random.default_rng(seed)
    names = [name for name in ("p50", "p99") if all(getattr(side, name) is not None for side in sides)]
    drawn: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(_RESAMPLES if names else 0):
        starts = rng.integers(0, count, size=math.ceil(count / block))
        chosen = ((starts[:, None] + np.arange(block)) % count).ravel()[:count]
        times, side = latency[chosen], attacked[chosen]
        if side.all() or not side.any():
            continue
        for name in names:
            share = float(_SHARES[name])
            above, below = (np.quantile(part, share, method="inverted_cdf") for part in (times[side], times[~side]))
            drawn[name].append(float(above / below))
    return {
        name: Ratio(
            value=getattr(sides[0], name) / getattr(sides[1], name),
            low=float(np.quantile(values, 0.025)),
            high=float(np.quantile(values, 0.975)),
        )
        for name, values in drawn.items()
        if values
    }


def summarise(
    samples: Sequence[Sample],
    *,
    set_rate: float | None,
    clients: int | None,
    seconds: float,
    objective_ms: float,
    cpu_share: float,
    seed: int,
) -> LoadStep:
    """One step. ``samples`` may contain those of the warm-up, which only count where their answers came later."""
    due = [sample for sample in samples if sample.due >= 0]
    # Those that found no connection in time waited longest of all: without them a queue would hide its own end.
    timed = [sample for sample in due if sample.error in (None, TIMEOUT, NOT_SENT)]
    latency = _milliseconds([s.done - s.due for s in timed])
    service_time = _milliseconds([s.done - s.sent for s in timed if s.sent is not None])
    kinds = np.array([s.kind for s in timed])
    attacked = kinds != CLEAN
    good = sum(s.error is None and 1000 * (s.done - s.due) <= objective_ms for s in due)
    arrived = sum(s.error is None and 0 <= s.done < seconds for s in samples)
    found = quantiles(latency)
    sent_rate = _held(due, seconds)
    deviation = None if set_rate is None else sent_rate * seconds / max(1, len(due)) - 1
    in_flight = objective_ms / 1000 * len(due) / seconds  # may still be under way, in time, when the step ends
    kept_up = arrived >= KEPT_UP * len(due) - in_flight
    return LoadStep(
        set_rate=set_rate,
        clients=clients,
        seconds=seconds,
        requests=len(due),
        answered=sum(s.error is None for s in due),
        errors=dict(sorted(Counter(s.error for s in due if s.error is not None).items())),
        sent_rate=sent_rate,
        rate_deviation=deviation,
        answered_rate=arrived / seconds,
        goodput_rate=good / seconds,
        goodput_share=good / max(1, len(due)),
        latency=found,
        service_time=quantiles(service_time),
        kinds={kind: quantiles(latency[kinds == kind]) for kind in sorted({s.kind for s in due}, key=_clean_first)},
        adversarial_to_clean=adversarial_to_clean(latency, attacked, seed=seed),
        waited_share=sum(s.sent is None or s.sent - s.taken > 0.001 for s in due) / max(1, len(due)),
        generator=_lag(due, found, cpu_share, deviation),
        sustained=None if set_rate is None else kept_up and good >= KEPT_UP * len(due),
        histogram=_histogram(latency, kinds),
    )


def _clean_first(kind: str) -> tuple[bool, str]:
    return kind != CLEAN, kind


def _milliseconds(seconds: Sequence[float]) -> _Times:
    return 1000 * np.array(seconds, dtype=np.float64)


def _held(due: Sequence[Sample], seconds: float) -> float:
    """Requests a second, as they were taken up: the schedule's own, stretched as the generator did (the slope of a
    least-squares line, which one late request at the end does not turn)."""
    if len(due) < 3:
        return len(due) / seconds
    planned, took = np.array([(sample.due, sample.taken) for sample in due]).T
    planned, took = planned - planned.mean(), took - took.mean()
    return len(due) / seconds * float(planned @ planned) / float(planned @ took)


def _lag(due: Sequence[Sample], latency: Quantiles, cpu_share: float, deviation: float | None) -> GeneratorLag:
    lag = quantiles(_milliseconds([s.taken - s.due for s in due]))
    why = ""
    if cpu_share > 0.9:
        why = f"it used {100 * cpu_share:.0f} % of a core"
    elif deviation is not None and abs(deviation) > 0.01:
        why = f"it missed the set rate by {100 * deviation:+.1f} %"
    else:
        for name, most in (("p50", 0.1), ("p99", 0.25)):
            late, whole = getattr(lag, name), getattr(latency, name)
            if not why and late is not None and whole and late > most * whole:
                why = f"its own lateness is {late:.2f} of {whole:.2f} ms of latency at {name}"
    return GeneratorLag(p50=lag.p50, p99=lag.p99, max=lag.max, cpu_share=cpu_share, limited=bool(why), why=why)


def _histogram(latency: _Times, kinds: NDArray[np.str_]) -> Histogram:
    if not len(latency):
        return Histogram(edges=(), counts={})
    low = max(1e-3, float(latency.min()) * 0.999)
    edges = np.geomspace(low, max(low * 1.01, float(latency.max()) * 1.001), _BINS + 1)
    names = sorted(set(kinds.tolist()), key=_clean_first)
    counts = {name: tuple(int(n) for n in np.histogram(latency[kinds == name], edges)[0]) for name in names}
    return Histogram(edges=tuple(float(edge) for edge in edges), counts=counts)
