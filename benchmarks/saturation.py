"""What is left of a service that is asked for several times more than it can answer.

    python -m benchmarks.saturation [--bundle BUNDLE --image FILE] [--seconds 300] [--factor 2 --factor 5]

Open model: requests fall due by the clock whether or not earlier ones are answered. First the knee is looked for: the
rate at which most requests are answered within the objective. Then the service gets several times that, for minutes.
Meanwhile another process asks ``/livez`` ten times a second. Goodput counts answers within the objective, from when a
request was due; a shed answer is timed from when the request was sent. The event loop's lag is the service's own
histogram, the memory that of its processes. Generator and service share the machine: run it where nothing else runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.request import urlopen

import typer

from attack_client.generator import Connections, Payload, Sample, Traffic, closed_loop, open_loop
from attack_client.wire import Target
from benchmarks import results
from benchmarks.digits import bundle_or_digits, image_or_digit
from cli.demo import running_service
from cli.output import print_table
from mithridate.evaluation import percentile

_KNEE = (0.8, 1.0, 1.1, 1.2, 1.35, 1.5)
_SHED = 429
_PROBES = 10
"""Of ``/livez``, a second."""

_PROBE = """
import http.client, json, sys, time
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=30)
due = time.perf_counter()
while True:
    due += 1 / float(sys.argv[2])
    time.sleep(max(0.0, due - time.perf_counter()))
    sent = time.perf_counter()
    try:
        connection.request("GET", "/livez")
        response = connection.getresponse()
        response.read()
        status = response.status
    except (OSError, http.client.HTTPException):
        connection.close()  # the next request opens another
        status = 0
    print(json.dumps([status, 1000 * (time.perf_counter() - sent)]), flush=True)
"""


def main(
    bundle: Path | None = None,
    image: Path | None = None,
    seconds: float = 300.0,
    factor: Annotated[list[float] | None, typer.Option()] = None,
    connections: int = 192,
    objective_ms: float = 1000.0,
    name: str = "saturation",
) -> None:
    bundle = bundle_or_digits(bundle)
    content = image_or_digit(image)
    os.environ.setdefault("MITHRIDATE_THREADS", "1")
    with running_service(bundle, 0) as url:
        service = _Service(url, content, connections, objective_ms / 1000)
        capacity = service.capacity()
        steps = [service.step(share * capacity, 15.0) for share in _KNEE]
        knee = max(steps, key=lambda step: float(step["goodput"]))
        print(f"knee: {knee['goodput']:.0f} answers a second within {objective_ms:g} ms", flush=True)
        loads = []
        for times in factor or [2.0, 5.0]:
            loads.append({"factor": times, **service.load(times * knee["goodput"], seconds)})
            print(json.dumps({key: value for key, value in loads[-1].items() if key != "statuses"}), flush=True)
    settings = {"seconds": seconds, "connections": connections, "objective_ms": objective_ms}
    path = results.write(name, {**settings, "knee": knee, "knee_steps": steps, "saturation": loads})
    print_table(
        f"asked for more than it can answer; {path.name}",
        ["times the knee", "goodput / knee", "/livez p99 ms", "loop lag p99 ms", "shed p99 ms", "memory"],
        [
            [
                f"{row['factor']:g}",
                f"{row['goodput'] / knee['goodput']:.3f}",
                f"{row['livez_ms']['p99']:.1f}",
                f"{row['loop_lag_p99_ms']:.1f}",
                f"{row['shed_ms']['p99']:.1f}",
                f"{100 * row['memory_growth']:+.2f} %",
            ]
            for row in loads
        ],
    )


class _Service:
    def __init__(self, url: str, image: bytes, connections: int, objective: float) -> None:
        self._url, self._objective = url, objective
        target = Target.parse(url)
        self._port = int(url.rpartition(":")[2])
        self._traffic = Traffic(clean=(Payload("clean", 0, target.predict(image)),))
        self._few = Connections(target=target, count=16, timeout_seconds=60)
        self._many = Connections(target=target, count=connections, timeout_seconds=60)

    def capacity(self) -> float:
        """Answers a second that sixteen clients get, each asking again once it is answered."""
        closed_loop(self._few, self._traffic, seconds=5)
        samples = closed_loop(self._few, self._traffic, seconds=10).samples
        return sum(sample.status == 200 for sample in samples) / 10

    def step(self, rate: float, seconds: float) -> dict[str, Any]:
        samples = open_loop(self._many, self._traffic, rate=rate, seconds=seconds, warmup_seconds=2).samples
        return self._summary([one for one in samples if one.due >= 0], rate, seconds)

    def load(self, rate: float, seconds: float) -> dict[str, Any]:
        """Ten seconds to begin with, which do not count; then the memory, the lag and the rest are those of after."""
        open_loop(self._many, self._traffic, rate=rate, seconds=10)
        before = self._metrics()
        with _probing(self._port) as answers:
            samples = open_loop(self._many, self._traffic, rate=rate, seconds=seconds).samples
        after = self._metrics()
        live = [milliseconds for status, milliseconds in answers if status == 200]
        if len(answers) < 0.95 * _PROBES * seconds:
            raise RuntimeError(f"/livez was asked {len(answers)} times in {seconds:g} s, not {_PROBES} a second")
        found = self._summary(samples, rate, seconds)
        return {
            **found,
            "livez_ms": _spread(live),
            "livez_failed": len(answers) - len(live),
            "loop_lag_p99_ms": 1000 * _lag(before, after),
            "memory_bytes": [_memory(before), _memory(after)],
            "memory_growth": _memory(after) / _memory(before) - 1,
        }

    def _summary(self, samples: Sequence[Sample], rate: float, seconds: float) -> dict[str, Any]:
        good = sum(one.status == 200 and one.done - one.due <= self._objective for one in samples)
        shed = [1000 * (one.done - one.sent) for one in samples if one.status == _SHED and one.sent is not None]
        answered = [1000 * (one.done - one.due) for one in samples if one.status == 200]
        other = Counter(one.error or str(one.status) for one in samples if one.status not in (200, _SHED))
        return {
            "rate": rate,
            "requests": len(samples),
            "goodput": good / seconds,
            "statuses": dict(Counter(str(one.status) for one in samples)),
            "other_errors": dict(other),
            "answered_ms": _spread(answered),
            "shed_ms": _spread(shed),
        }

    def _metrics(self) -> str:
        with urlopen(f"{self._url}/metrics") as answer:  # noqa: S310 (our own service)
            return str(answer.read().decode())


@contextmanager
def _probing(port: int) -> Iterator[list[tuple[int, float]]]:
    """Fills the list at the end of the block."""
    found: list[tuple[int, float]] = []
    with tempfile.TemporaryFile("w+") as said:  # not a pipe: nobody reads before the end, and a full one would stop it
        command = [sys.executable, "-c", _PROBE, str(port), str(_PROBES)]
        probe = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL)
        try:
            yield found
        finally:
            time.sleep(0.3)
            probe.terminate()
            probe.wait()
            said.seek(0)
            whole = [line for line in said if line.endswith("\n")]
            found += [(int(status), float(ms)) for status, ms in map(json.loads, whole)]


def _spread(milliseconds: Sequence[float]) -> dict[str, float]:
    if not milliseconds:
        return {"n": 0, "p50": 0.0, "p99": 0.0, "max": 0.0}
    ordered = sorted(milliseconds)
    return {
        "n": len(ordered),
        "p50": percentile(ordered, 0.5),
        "p99": percentile(ordered, 0.99),
        "max": ordered[-1],
    }


def _lag(before: str, after: str) -> float:
    """Seconds: the upper end of the bucket in which the 99th percentile of what came in between lies."""

    def buckets(text: str) -> dict[float, float]:
        found = re.findall(r'mithridate_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)', text)
        return {float(bound): float(count) for bound, count in found}

    first, last = buckets(before), buckets(after)
    counts = {bound: last[bound] - first.get(bound, 0.0) for bound in sorted(last)}
    total = max(counts.values())
    return next(bound for bound, count in counts.items() if count >= 0.99 * total)


def _memory(text: str) -> float:
    return sum(map(float, re.findall(r"mithridate_resident_memory_bytes\{[^}]*\} (\S+)", text)))


if __name__ == "__main__":
    typer.run(main)
